"""Reading checkpoints: damaged and malicious ones are refused with a message that says what to do."""

import json
import os
import pickle
from pathlib import Path

import checkpoint_folders
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.load_state_dict.checkpoint import Checkpoint, CheckpointError
from helpers.load_state_dict.checkpoint_keys import plan_state_dict
from helpers.load_state_dict.rounding import RoundingReport, rounded, rounded_dtype
from helpers.models import ModelError
from helpers.models.architecture import architecture_of, read_config
from helpers.models.dtypes import DTYPES, torch_dtype


def empty_model(folder):
    return architecture_of(read_config(folder)).empty_model()


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "model"
    checkpoint_folders.save_t5(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    folder = tmp_path / "model"
    checkpoint_folders.save_llama(folder)
    return folder


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def test_a_truncated_shard_is_named(sharded):
    victim = shards(sharded)[1]
    os.truncate(victim, victim.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=rf"{victim.name} is damaged or incomplete .*download it again"):
        Checkpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\xff" * 8 + b"{}", b"<html>404</html>"])
def test_a_garbage_shard_is_named(content, sharded):
    victim = shards(sharded)[0]
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{victim.name} is damaged or incomplete"):
        Checkpoint(sharded)


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(sharded):
    shards(sharded)[2].unlink()
    with pytest.raises(
        CheckpointError, match=r"names the shard model-00003-of-\d+\.safetensors, which .* lacks"
    ):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(sharded):
    index_file = sharded / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["decoder.extra.weight"] = shards(sharded)[0].name
    index_file.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"promises 1 tensors that no shard holds \(decoder\.extra\.weight"
    ):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weights": {}}'])
def test_a_damaged_index_is_named(text, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint(sharded)


def test_an_index_cannot_name_a_file_outside_its_folder(sharded, tmp_path):
    first = shards(sharded)[0]
    first.rename(tmp_path / "outside.safetensors")
    index_file = sharded / "model.safetensors.index.json"
    index_file.write_text(index_file.read_text().replace(first.name, "../outside.safetensors"))
    with pytest.raises(CheckpointError, match=r"is refused: '../outside.safetensors' is not the plain name"):
        Checkpoint(sharded)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(zipped, tmp_path):
    content = {"weight": torch.zeros(3), "payload": Malicious(tmp_path / "executed")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused|is damaged"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_bin_is_named(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(10_000)}, file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)


def test_a_bin_of_something_else_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no weights: expected one of model\.safetensors"):
        Checkpoint(tmp_path)


def test_missing_tensors_are_listed(llama):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of the \d+ tensors .*layers\.1\.mlp\.up_proj.*model\.norm"
    ):
        plan_state_dict(Checkpoint(llama), empty_model(llama))


def test_tensors_of_another_shape_are_told(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    with pytest.raises(CheckpointError, match=r"has shape \(261, 32\), but config\.json says \(1000, 32\)"):
        plan_state_dict(Checkpoint(llama), empty_model(llama))


def test_surplus_tensors_are_listed(llama):
    tensors = load_file(llama / "model.safetensors") | {"value_head.weight": torch.zeros(3)}
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert plan_state_dict(Checkpoint(llama), empty_model(llama)).unused == ["value_head.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "'vit' models do not generate text from text"),
        ({"model_type": "no-such-model"}, "not the config of a model that transformers knows"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_configs_of_other_kinds_are_refused(change, message, llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        empty_model(llama)


@pytest.mark.parametrize("values", [[1, -2, 3], [True, False, True]])
@pytest.mark.parametrize("dtype", [torch_dtype(name) for name in DTYPES])
def test_integers_and_booleans_keep_their_dtype(values, dtype):
    source = torch.tensor(values)
    chunks = list(rounded(source, dtype, "buffer", RoundingReport()))
    assert rounded_dtype(source.dtype, dtype) == source.dtype
    assert torch.equal(torch.cat(chunks), source) and chunks[0].dtype == source.dtype


def test_rounding_in_chunks_equals_rounding_at_once_and_reports_the_same(monkeypatch):
    monkeypatch.setattr("helpers.load_state_dict.rounding.CHUNK", 64)
    source = torch.randn(33, 31, generator=torch.Generator().manual_seed(0)) ** 9
    source.clamp_(-60_000, 60_000)
    source.view(-1)[::50] = 0
    report = RoundingReport()
    result = torch.cat(list(rounded(source, torch.float16, "weight", report))).view(source.shape)
    expected = source.half()
    assert torch.equal(result, expected)
    became_zero = (source != 0) & (expected == 0)
    error = ((expected.float() - source).abs() / source.abs())[(source != 0) & ~became_zero]
    assert (report.numbers, report.flushed) == (source.numel(), int(became_zero.sum()))
    assert report.flushed > 0
    assert report.largest_relative_error == pytest.approx(error.max().item())
