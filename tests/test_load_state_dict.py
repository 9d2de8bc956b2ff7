"""Conversion on this machine: what is written is what the checkpoint holds, whole, and in constant memory."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import checkpoint_folders
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, save_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LongT5Config,
    LongT5ForConditionalGeneration,
)

from helpers.files.transfer import crc32c_of
from helpers.files.whole_file import FileBusyError, partial_path, whole_or_absent
from helpers.load_state_dict import convert, writing
from helpers.load_state_dict.__main__ import main
from helpers.load_state_dict.checkpoint import CheckpointError
from helpers.load_state_dict.manifest import companion_folder, read_manifest
from helpers.load_state_dict.rounding import RoundingError
from helpers.measuring.random_checkpoint import write_random_checkpoint
from helpers.models import ModelError, load_config, packaged
from helpers.models.dtypes import DTYPES, torch_dtype


def t5_as_bin(folder: Path) -> None:
    model = checkpoint_folders.save_t5(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def t5_as_old_bin(folder: Path) -> None:
    model = checkpoint_folders.save_t5(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def t5_as_sharded_bin(folder: Path) -> None:
    state_dict = checkpoint_folders.save_t5(folder).state_dict()
    (folder / "model.safetensors").unlink()
    names = list(state_dict)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, held in shards.items():
        torch.save({name: state_dict[name].clone() for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def t5_without_shared(folder: Path) -> None:
    """As published for flan-t5-xl and others: the embedding under the encoder's and decoder's names."""
    checkpoint_folders.save_t5(folder)
    tensors = load_file(folder / "model.safetensors")
    shared = tensors.pop("shared.weight")
    for part in ("encoder", "decoder"):
        tensors[f"{part}.embed_tokens.weight"] = shared.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gpt2_without_prefix(folder: Path) -> None:
    checkpoint_folders.save_gpt2(folder)
    tensors = load_file(folder / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})


KINDS = {
    "t5 with a head of its own": checkpoint_folders.save_t5,
    "t5 tied": lambda folder: checkpoint_folders.save_t5(folder, distinct_head=False),
    "t5 under its parts' names": t5_without_shared,
    "t5 sharded": lambda folder: checkpoint_folders.save_t5(folder, max_shard_size="30KB"),
    "t5 bin": t5_as_bin,
    "t5 old bin": t5_as_old_bin,
    "t5 sharded bin": t5_as_sharded_bin,
    "llama tied": checkpoint_folders.save_llama,
    "llama untied": lambda folder: checkpoint_folders.save_llama(folder, tied=False),
    "gpt2 without prefix": gpt2_without_prefix,
    "mixture of experts": checkpoint_folders.save_mixtral,
}


def reference(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict as transformers itself loads it, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model_class = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
    return model_class.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint_folders.save_t5(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_byte_equal_to_those_of_from_pretrained(kind, tmp_path):
    KINDS[kind](tmp_path / "model")
    expected = reference(tmp_path / "model")
    for dtype in DTYPES:
        path = tmp_path / f"{dtype}.pt"
        convert(str(tmp_path / "model"), path, dtype, progress=False)
        found = torch.load(path, weights_only=True)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            rounded = tensor.to(torch_dtype(dtype))
            assert found[name].dtype == rounded.dtype
            assert torch.equal(found[name].view(torch.uint8), rounded.view(torch.uint8)), name


def test_a_t5_head_of_its_own_is_kept_although_transformers_would_tie_it(t5, tmp_path):
    manifest = convert(str(t5), tmp_path / "t5.pt", progress=False)
    found = torch.load(tmp_path / "t5.pt", weights_only=True)
    assert not torch.equal(found["lm_head.weight"], found["shared.weight"])
    embeddings = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert {found[name].untyped_storage().data_ptr() for name in embeddings} == {
        found["shared.weight"].untyped_storage().data_ptr()
    }
    assert [set(group) for group in manifest.tied] == [embeddings]


def test_an_absent_head_that_the_config_says_is_untied_is_an_error(tmp_path):
    checkpoint_folders.save_t5(tmp_path / "t5")
    file = tmp_path / "t5" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* lm_head\.weight"):
        convert(str(tmp_path / "t5"), tmp_path / "t5.pt", progress=False)
    assert not (tmp_path / "t5.pt").exists()


def test_a_long_t5_has_one_tensor_for_head_and_embeddings_whatever_its_config_says(tmp_path):
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    LongT5ForConditionalGeneration(LongT5Config(**shape)).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "m.pt", "float32", progress=False)
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert torch.equal(found["lm_head.weight"], weights["shared.weight"])


def test_a_tokenizer_that_needs_no_file_is_not_missing(t5, tmp_path, capsys):
    folder = tmp_path / "byt5"
    shutil.copytree(t5, folder)
    for file in folder.iterdir():
        if "token" in file.name:
            file.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer_class": "ByT5Tokenizer"}))
    convert(str(folder), tmp_path / "m.pt", progress=False)
    assert "No tokenizer" not in capsys.readouterr().out
    assert "No tokenizer" not in capsys.readouterr().err


def test_the_file_is_what_torch_save_would_have_written(t5, tmp_path):
    convert(str(t5), tmp_path / "ours.pt", progress=False)
    torch.save(torch.load(tmp_path / "ours.pt", weights_only=True), tmp_path / "theirs.pt")
    ours, theirs = zipfile.ZipFile(tmp_path / "ours.pt"), zipfile.ZipFile(tmp_path / "theirs.pt")
    assert ours.testzip() is None

    def tensors(archive):
        records = [info for info in archive.infolist() if "/data/" in info.filename]
        return [(r.filename.partition("/")[2], r.header_offset % 64, r.file_size, r.CRC) for r in records]

    assert [(n, s, c) for n, _, s, c in tensors(ours)] == [(n, s, c) for n, _, s, c in tensors(theirs)]
    same_members = [n.partition("/")[2] for n in ours.namelist()]
    assert same_members == [n.partition("/")[2] for n in theirs.namelist()]


def test_beams_stock_handler_loads_the_file(t5, tmp_path):
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
    from transformers import AutoConfig, T5ForConditionalGeneration

    convert(str(t5), tmp_path / "t5.pt", progress=False)
    handler = PytorchModelHandlerTensor(
        state_dict_path=str(tmp_path / "t5.pt"),
        model_class=T5ForConditionalGeneration,
        model_params={"config": AutoConfig.from_pretrained(tmp_path / "t5")},
        device="cpu",
    )
    model = handler.load_model()
    expected = reference(t5)["encoder.block.0.layer.0.SelfAttention.q.weight"].half().float()
    assert torch.equal(model.encoder.block[0].layer[0].SelfAttention.q.weight, expected)


def test_a_worker_needs_nothing_but_the_state_dict_and_its_companion_folder(tmp_path):
    checkpoint_folders.save_llama(tmp_path / "llama")
    manifest = convert(str(tmp_path / "llama"), tmp_path / "out" / "m.pt", progress=False)
    companion = Path(companion_folder(tmp_path / "out" / "m.pt"))
    assert (companion / "config.json").read_bytes() == (tmp_path / "llama" / "config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(companion).chat_template == tiny_models.CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(companion).eos_token_id == 4
    assert {file.name for file in companion.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest == read_manifest(tmp_path / "out" / "m.pt")
    assert manifest.parameters == sum(
        p.numel() for p in checkpoint_folders.save_llama(tmp_path / "x").parameters()
    )
    assert (manifest.bytes, manifest.crc32c) == (
        (tmp_path / "out" / "m.pt").stat().st_size,
        crc32c_of(tmp_path / "out" / "m.pt"),
    )


def test_a_generation_config_is_made_where_the_checkpoint_has_none(t5, tmp_path):
    shutil.copytree(t5, tmp_path / "t5")
    (tmp_path / "t5" / "generation_config.json").unlink()
    convert(str(tmp_path / "t5"), tmp_path / "out.pt", progress=False)
    made = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (made.decoder_start_token_id, made.eos_token_id, made.pad_token_id) == (0, 1, 0)


def with_value(folder: Path, value: float) -> str:
    checkpoint_folders.save_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("value", [70000.0, -1e30, 65520.0])
def test_a_weight_beyond_float16_stops_the_conversion_and_bfloat16_holds_it(value, tmp_path):
    model = with_value(tmp_path / "m", value)
    with pytest.raises(RoundingError, match=r"model\.norm\.weight holds .*bfloat16"):
        convert(model, tmp_path / "m.pt", progress=False)
    assert list(tmp_path.glob("m.pt*")) == []
    convert(model, tmp_path / "m.pt", "bfloat16", progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stops_the_conversion_in_every_dtype(value, tmp_path):
    model = with_value(tmp_path / "m", value)
    for dtype in DTYPES:
        with pytest.raises(RoundingError, match=r"model\.norm\.weight holds NaN or infinity"):
            convert(model, tmp_path / "m.pt", dtype, progress=False)
    assert not (tmp_path / "m.pt").exists()


def test_numbers_that_become_zero_are_counted(tmp_path):
    model = with_value(tmp_path / "m", 1e-9)
    manifest = convert(model, tmp_path / "m.pt", progress=False)
    flushed = sum(
        int(((t != 0) & (t.half() == 0)).sum()) for t in load_file(f"{model}/model.safetensors").values()
    )
    assert flushed >= 1
    assert manifest.flushed_to_zero == pytest.approx(flushed / manifest.parameters)
    assert convert(model, tmp_path / "b.pt", "bfloat16", progress=False).flushed_to_zero == 0


def test_a_second_run_does_nothing_and_says_so(t5, tmp_path, capsys):
    convert(str(t5), tmp_path / "t5.pt")
    before = (tmp_path / "t5.pt").stat()
    capsys.readouterr()
    convert(str(t5), tmp_path / "t5.pt")
    assert "Nothing to do" in capsys.readouterr().out
    assert (tmp_path / "t5.pt").stat().st_mtime_ns == before.st_mtime_ns


def test_another_state_dict_is_replaced_only_when_asked(t5, tmp_path):
    convert(str(t5), tmp_path / "t5.pt", progress=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(str(t5), tmp_path / "t5.pt", "bfloat16", progress=False)
    assert read_manifest(tmp_path / "t5.pt").dtype == "float16"
    convert(str(t5), tmp_path / "t5.pt", "bfloat16", overwrite=True, progress=False)
    assert torch.load(tmp_path / "t5.pt", weights_only=True)["shared.weight"].dtype == torch.bfloat16


def test_a_folder_that_was_trained_further_is_converted_anew(tmp_path):
    model = with_value(tmp_path / "m", 1.0)
    convert(model, tmp_path / "m.pt", progress=False)
    with_value(tmp_path / "m", 2.0)
    with pytest.raises(FileExistsError):
        convert(model, tmp_path / "m.pt", progress=False)
    convert(model, tmp_path / "m.pt", overwrite=True, progress=False)
    assert torch.load(tmp_path / "m.pt", weights_only=True)["model.norm.weight"][7] == 2


def test_a_damaged_state_dict_is_not_taken_for_one_in_place(t5, tmp_path):
    convert(str(t5), tmp_path / "t5.pt", progress=False)
    with open(tmp_path / "t5.pt", "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    with pytest.raises(FileExistsError):
        convert(str(t5), tmp_path / "t5.pt", progress=False)
    convert(str(t5), tmp_path / "t5.pt", overwrite=True, progress=False)
    assert crc32c_of(tmp_path / "t5.pt") == read_manifest(tmp_path / "t5.pt").crc32c


def test_files_of_the_model_that_was_there_before_do_not_stay(t5, tmp_path):
    shutil.copytree(t5, tmp_path / "first")
    (tmp_path / "first" / "spiece.model").write_bytes(b"of the first model")
    convert(str(tmp_path / "first"), tmp_path / "m.pt", progress=False)
    assert (tmp_path / "m" / "spiece.model").exists()
    convert(str(t5), tmp_path / "m.pt", overwrite=True, progress=False)
    assert not (tmp_path / "m" / "spiece.model").exists()


def test_a_full_disk_is_foreseen_and_told(t5, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SPARE_BYTES", 2**60)
    with pytest.raises(OSError, match=r"needs \d+\.\d+ GB of disk, and .* are free"):
        convert(str(t5), tmp_path / "t5.pt", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_all_the_same_leaves_nothing(t5, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    code = (
        "import resource, sys; from helpers.load_state_dict.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "local",
        f"--model-name={t5}",
        f"--state-dict-path={tmp_path}/t5.pt",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert f"no room for {tmp_path}/t5.pt" in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(t5, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="choose another folder"):
        convert(str(t5), tmp_path / "file" / "t5.pt", progress=False)


def test_two_conversions_to_one_path_do_not_mix(t5, tmp_path):
    with whole_or_absent(tmp_path / "t5.pt"):
        with pytest.raises(FileBusyError, match="another process is writing"):
            convert(str(t5), tmp_path / "t5.pt", progress=False)
        assert partial_path(tmp_path / "t5.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float8"}, ValueError, "not one of float16"),
        ({"state_dict_path": "model.safetensors"}, ValueError, r"must end with a name and \.pt"),
        ({"state_dict_path": "gs://bucket.pt"}, ValueError, "gs://BUCKET/FOLDER/NAME"),
        ({"model_name": "./no-such-folder"}, ModelError, "There is no folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(arguments, error, message, t5, tmp_path):
    given = {"model_name": str(t5), "state_dict_path": str(tmp_path / "t5.pt"), "progress": False} | arguments
    with pytest.raises(error, match=message):
        convert(**given)
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_spaces_quotes_and_accents(t5, tmp_path):
    path = tmp_path / 'it\'s a "mödel" $HOME' / "my state dict.pt"
    convert(str(t5), path, progress=False)
    assert torch.load(path, weights_only=True, mmap=True).keys() == reference(t5).keys()


def test_the_command_line_converts_and_explains_mistakes_in_one_line(t5, tmp_path, capsys):
    assert (
        main(["local", "--model-name", str(t5), f"--state-dict-path={tmp_path}/t5.pt", "--dtype=bfloat16"])
        == 0
    )
    assert read_manifest(tmp_path / "t5.pt").dtype == "bfloat16"
    capsys.readouterr()
    assert main(["local", "--model-name", "./nowhere", f"--state-dict-path={tmp_path}/x.pt"]) == 1
    assert capsys.readouterr().err.startswith("error: There is no folder")


PEAK_OF_CHILD = """
import sys, torch
print("ready", flush=True)
sys.stdin.readline()
from helpers.load_state_dict import convert, writing
convert(sys.argv[1], sys.argv[2], progress=False)
"""


def anonymous_megabytes(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    return next(
        (int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", ["large", pytest.param("xl", marks=pytest.mark.slow)])
def test_peak_anonymous_memory_does_not_depend_on_the_models_size(size, tmp_path):
    write_random_checkpoint(load_config(f"google/flan-t5-{size}"), tmp_path / "m")
    command = [sys.executable, "-c", PEAK_OF_CHILD, str(tmp_path / "m"), str(tmp_path / "m.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous_megabytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        deadline = time.monotonic() + 500
        while child.poll() is None and time.monotonic() < deadline:
            peak = max(peak, anonymous_megabytes(child.pid))
            time.sleep(0.005)
        child.kill()
    assert child.returncode == 0
    print(f"{size}: peak anonymous memory {peak - before:.0f} MB above the interpreter with torch")
    written = read_manifest(tmp_path / "m.pt").bytes
    assert written > (1.5e9 if size == "large" else 5.6e9)
    assert peak - before < 0.5 * 1.5e3, "it grows with the model"
    shutil.rmtree(tmp_path / "m")
    os.unlink(tmp_path / "m.pt")


def test_a_gguf_file_as_packaged_becomes_the_state_dict_that_transformers_reads_from_it(tmp_path):
    checkpoint_folders.write_gguf(tmp_path / "m.gguf")
    packaged._gguf_to_checkpoint(tmp_path / "m.gguf", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = model.state_dict()
    convert(str(tmp_path / "m"), tmp_path / "m.pt", progress=False)
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.half()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("ab")["input_ids"]


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(stored, tmp_path):
    model = save_checkpoint("llama", tmp_path / "m").to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "m")
    manifest = convert(str(tmp_path / "m"), tmp_path / "m.pt", "float32", progress=False)
    written = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(written[name], value.float()) for name, value in model.state_dict().items())
    assert (manifest.flushed_to_zero, manifest.largest_relative_error) == (0, 0)
