"""What rounding costs is counted rightly, and rates are measured in processes of their own."""

import pytest
from tiny_models import save_checkpoint

from helpers.load_state_dict import convert
from helpers.measuring import MeasureError, measure_throughput, rounding_loss
from helpers.measuring.rounding import PROMPTS, _common


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    # Where a CPU has AVX2 only, int8 changes a narrower one's random weights more than is allowed.
    save_checkpoint("llama", folder / "checkpoint", width=64)
    convert(str(folder / "checkpoint"), folder / "model.pt", progress=False)
    return str(folder / "model.pt")


def test_there_are_sixty_prompts_of_five_kinds():
    assert [len(prompts) for prompts in PROMPTS.values()] == [12] * 5
    assert len({prompt for prompts in PROMPTS.values() for prompt in prompts}) == 60


def test_float32_changes_nothing_and_int8_something(state_dict, tmp_path):
    exact, rounded = rounding_loss(
        state_dict, ("float32", "int8"), max_new_tokens=12, cache_dir=str(tmp_path)
    )
    assert (exact.changed, exact.equal_tokens, exact.changes) == (0, 1.0, [])
    assert (rounded.engine, rounded.dtype, rounded.prompts) == ("ctranslate2", "int8", 60)
    assert 0 < rounded.changed <= 60
    assert 0 < rounded.equal_tokens < 1
    assert len(rounded.changes) == rounded.changed


def test_tokens_are_equal_up_to_the_first_difference():
    assert _common([1, 2, 3], [1, 2, 3]) == 3
    assert _common([1, 2, 3], [1, 5, 3]) == 1
    assert _common([1, 2, 3], [1, 2]) == 2
    assert _common([], [1]) == 0


def test_rates_are_measured_for_each_engine(state_dict, tmp_path):
    found = measure_throughput(
        state_dict,
        batch_sizes=(1, 3),
        computing=[("torch", "float32"), ("ctranslate2", "float32"), ("ctranslate2", None)],
        response_tokens=4,
        repeats=1,
        cache_dir=str(tmp_path),
    )
    assert [(one.engine, one.dtype, one.batch_size) for one in found] == [
        ("torch", "float32", 1),
        ("ctranslate2", "float32", 1),
        ("torch", "float32", 3),
        ("ctranslate2", "float32", 3),
    ]
    assert all(one.tokens_per_second > 0 for one in found)


def test_what_cannot_be_measured_is_told(state_dict, tmp_path):
    with pytest.raises(MeasureError, match="torch does not compute in int8"):
        measure_throughput(state_dict, computing=[("torch", "int8")], cache_dir=str(tmp_path))
