"""Predicted against measured memory, and the measuring itself."""

import pytest
import torch
import transformers
from transformers import T5Config

from helpers.measuring.cpu import cpu_name
from helpers.measuring.memory import MeasureError, Measurement, measure_model
from helpers.measuring.process_memory import memory_of, run_and_measure
from helpers.measuring.random_checkpoint import write_random_checkpoint
from helpers.models import load_config
from helpers.sizing.machine_types import GIB
from helpers.sizing.model_memory import packed_bytes
from helpers.sizing.sizes import WORKER_BYTES, size_model

SMALL, BASE = "google/flan-t5-small", "google/flan-t5-base"


def compared(attempts: int = 3, **options) -> list[Measurement]:
    """Predicted against measured, on whatever machine this is.

    Memory is sampled every few milliseconds, so on a busy machine a sample may miss a peak, and none invents
    one: where a prediction seems too high, it is measured again, and the higher figure counts.
    """
    if torch.version.cuda:
        pytest.skip("the constants of helpers.sizing are those of torch's CPU build")
    tries = []
    for _ in range(attempts):
        tries.append(measure_model(**options))
        rows = [max(those, key=lambda row: row.measured) for those in zip(*tries, strict=True)]
        if rows[0].source == "rss":
            pytest.skip("this system does not tell anonymous memory from mapped files")
        if all(row.error < 0.1 for row in rows):
            break
    for row in rows:
        measured = [
            one.measured
            for those in tries
            for one in those
            if (one.method, one.phase) == (row.method, row.phase)
        ]
        assert abs(row.error) < 0.1, f"{row} on {cpu_name()}; measured: {measured}"
    return rows


@pytest.mark.parametrize("model", [SMALL])
def test_predictions_are_within_a_tenth_of_what_is_measured(model, tmp_path):
    rows = compared(model_name=model, folder=tmp_path)
    assert [(row.method, row.phase) for row in rows] == [
        ("sample", "convert"),
        ("sample", "serve"),
        ("project", "convert"),
        ("project", "serve"),
    ]
    served = rows[-1]  # mapped, with no copy beside it
    assert served.file_backed > size_model(model).weights_bytes["float16"]
    assert served.anonymous < WORKER_BYTES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [SMALL, pytest.param(BASE, marks=pytest.mark.slow)])
def test_predictions_for_the_second_engine_are_within_a_tenth_too(model, tmp_path):
    methods = ("ctranslate2-int8", "ctranslate2-float32")
    workload = {"batch_size": 16, "prompt_tokens": 128, "response_tokens": 16}
    rows = compared(model_name=model, methods=methods, folder=tmp_path, **workload)
    assert [(row.method, row.phase) for row in rows] == [(method, "serve") for method in methods]


def test_on_intels_processors_weights_are_counted_twice_while_they_are_packed():
    """1.04 GB were predicted, and 1.25 measured, with flan-t5-base's shape in int8 on a Xeon with AMX, before
    this was counted and what is freed was given back."""
    options = {"engine": "ctranslate2", "compute_dtype": "int8", "batch_size": 16, "prompt_tokens": 128}
    amd, intel = (
        size_model(BASE, family=family, response_tokens=16, **options).serve for family in ("n2d", "n2")
    )
    assert amd.memory_bytes == pytest.approx(1.04e9, rel=0.01)
    assert intel.memory_bytes - amd.memory_bytes == intel.parts["weights packed"]
    assert WORKER_BYTES + 2 * 198e6 + 49e6 <= intel.memory_bytes < 1.25e9
    copy, left = packed_bytes(load_config(BASE), 247_577_856, "int8")
    assert (copy, left) == (pytest.approx(198.2e6, rel=0.001), 0)


def test_a_random_checkpoint_is_an_ordinary_one_with_a_head_of_its_own(tmp_path):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, tie_word_embeddings=False
    )
    write_random_checkpoint(config, tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert not model.config.scale_decoder_outputs
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0


def test_a_model_larger_than_this_machine_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.measuring.memory.machine_memory_bytes", lambda: GIB)
    with pytest.raises(MeasureError, match=r"this machine has 1\.1: measure a smaller model"):
        measure_model(BASE, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_or_takes_too_long_is_reported():
    with pytest.raises(MeasureError, match="no-such-workload"):
        run_and_measure("helpers.measuring.memory_workloads", ["no-such-workload", "{}"])
    with pytest.raises(MeasureError, match=r"took longer than 0 s"):
        run_and_measure("http.server", ["0", "--bind", "127.0.0.1"], timeout=0.2)


def test_the_memory_of_this_process_is_known():
    memory = memory_of()
    assert 10e6 < memory.resident < 100 * GIB
    if memory.anonymous is not None:
        assert memory.anonymous + memory.file_backed == memory.resident >= memory.proportional
    with pytest.raises(ProcessLookupError):
        memory_of(2**22 + 1)
