"""A conversion that is killed, or run again: whole or absent at its destination, here or in Cloud Storage."""

import multiprocessing
import random
import shutil
from pathlib import Path

import checkpoint_folders
import pytest
from conftest import PATIENCE, wait_until
from transformers import T5Config

from helpers.files import storage, transfer
from helpers.files.transfer import crc32c_of
from helpers.files.whole_file import partial_path
from helpers.load_state_dict import convert
from helpers.load_state_dict.manifest import read_manifest
from helpers.measuring.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint_folders.save_t5(folder)
    return folder


def test_kill_9_at_any_moment_leaves_a_whole_file_or_none(tmp_path):
    """Kills before the file is written, while it is, and when it is whole; then a rerun that succeeds."""
    # Large enough that much of the time goes into writing.
    config = T5Config(vocab_size=32_128, d_model=1024, d_ff=1024, num_layers=1, num_heads=16)
    model = write_random_checkpoint(config, tmp_path / "m")
    path = tmp_path / "out" / "m.pt"
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["helpers.load_state_dict.writing", "transformers.models.t5.modeling_t5"])

    def start() -> multiprocessing.Process:
        child = children.Process(target=convert, args=(str(model), path), kwargs={"progress": False})
        child.start()
        return child

    def written() -> int | None:
        """When the partial file was last written to, if there is one."""
        return partial_path(path).stat().st_mtime_ns if partial_path(path).exists() else None

    moments = random.Random(0)
    killed = found_partial = 0
    for attempt in range(12):
        before = written()
        child = start()
        if attempt % 3:  # the others end at any moment of their start
            wait_until(
                lambda child=child, before=before: written() not in (None, before) or not child.is_alive(),
                "the conversion writes nothing",
            )
        child.join(moments.uniform(0, 0.1))
        killed += child.exitcode is None
        child.kill()
        child.join(PATIENCE)
        found_partial += written() not in (None, before)
        if path.exists():
            manifest = read_manifest(path)
            assert (path.stat().st_size, crc32c_of(path)) == (manifest.bytes, manifest.crc32c), attempt
            shutil.rmtree(tmp_path / "out")
    assert killed >= 4, "conversions ended before they were killed"
    assert found_partial >= 2, "hardly a kill came while the file was being written"

    convert(str(model), path, progress=False)
    assert {file.name for file in path.parent.iterdir()} == {"m", "m.pt"}
    assert not list(path.parent.rglob("*.partial"))


def _convert_slowly_to_cloud(model: str, path: str) -> None:
    transfer.PART_BYTES = 4096
    convert(model, path, progress=False)


def test_kill_9_during_an_upload_leaves_nothing_at_the_destination_and_a_rerun_goes_on(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PART_BYTES", 4096)
    checkpoint_folders.save_t5(tmp_path / "m")
    path = f"gs://{bucket.name}/folder/m.pt"
    context = multiprocessing.get_context("spawn")
    moments = random.Random(1)
    for _ in range(3):
        child = context.Process(target=_convert_slowly_to_cloud, args=(str(tmp_path / "m"), path))
        child.start()
        wait_until(
            lambda child=child: (
                any(bucket.client.list_blobs(bucket, prefix="folder/m.pt.parts/")) or not child.is_alive()
            ),
            "the upload did not begin",
        )
        child.join(moments.uniform(0, 0.05))
        child.kill()
        child.join(PATIENCE)
        if storage.exists(path):  # it was faster: then what is there is whole
            manifest = read_manifest(path)
            assert storage.size_and_crc32c(path) == (manifest.bytes, manifest.crc32c)
            storage.delete(path)
    manifest = convert(str(tmp_path / "m"), path, progress=False)
    assert storage.size_and_crc32c(path) == (manifest.bytes, manifest.crc32c)
    names = {blob.name for blob in bucket.client.list_blobs(bucket)}
    assert names == {"folder/m.pt", *(f"folder/m/{name}" for name in [*manifest.files, "manifest.json"])}
    assert list((tmp_path / "cache" / "streaming-llm" / "conversions").iterdir()) == []


def test_a_rerun_to_cloud_storage_does_nothing_and_another_needs_asking(bucket, t5, capsys):
    path = f"gs://{bucket.name}/m.pt"
    convert(str(t5), path)
    generation = bucket.get_blob("m.pt").generation
    capsys.readouterr()
    convert(str(t5), path)
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(str(t5), path, "bfloat16", progress=False)
    assert bucket.get_blob("m.pt").generation == generation
    convert(str(t5), path, "bfloat16", overwrite=True, progress=False)
    assert read_manifest(path).dtype == "bfloat16"
    assert storage.size_and_crc32c(path)[1] == read_manifest(path).crc32c


def test_a_bucket_that_does_not_exist_is_told_before_anything_is_read(cloud):
    with pytest.raises(FileNotFoundError, match=r"bucket 'no-such-bucket' .* does not exist: create"):
        convert("./a-model-that-is-not-looked-for", "gs://no-such-bucket/m.pt", progress=False)
