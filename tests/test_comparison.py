"""A converted model's answers are compared with its checkpoint's."""

import shutil

import checkpoint_folders
import pytest
from safetensors.torch import load_file, save_file

from helpers.load_state_dict import convert
from helpers.measuring.comparison import compare

PROMPTS = ["a", "What is the capital of France?", "Why?"]


@pytest.mark.parametrize("save", [checkpoint_folders.save_t5, checkpoint_folders.save_llama])
def test_a_comparison_shows_equal_answers_and_names_the_first_difference(save, tmp_path):
    save(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "m32.pt", "float32", progress=False)
    for row, prompt in zip(
        compare(str(tmp_path / "m"), str(tmp_path / "m32.pt"), PROMPTS, 8), PROMPTS, strict=True
    ):
        assert row.prompt == prompt
        assert row.equal_tokens == row.tokens > 0 and row.source == row.converted

    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights[next(name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in weights)].neg_()
    shutil.copytree(tmp_path / "m", tmp_path / "other")
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    convert(str(tmp_path / "other"), tmp_path / "other.pt", "float32", progress=False)
    rows = compare(str(tmp_path / "m"), str(tmp_path / "other.pt"), PROMPTS, 8)
    assert any(row.equal_tokens < row.tokens and row.source != row.converted for row in rows)


def test_a_comparison_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    checkpoint_folders.save_t5(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "m.pt", progress=False)
    monkeypatch.setattr("helpers.measuring.comparison.HEADROOM", 2**40)
    with pytest.raises(MemoryError, match="compare on a larger machine"):
        compare(str(tmp_path / "m"), str(tmp_path / "m.pt"), PROMPTS)
