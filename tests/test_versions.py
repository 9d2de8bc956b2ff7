"""Weights, tokenizer, template and config are one version: readers see all of the old or all of the new."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint

from helpers.files import storage
from helpers.files.whole_file import FileBusyError, only_writer
from helpers.load_state_dict import (
    CompanionError,
    ReplacedError,
    conversion,
    convert,
    read_manifest,
    versions,
)
from helpers.load_state_dict.manifest import companion_folder
from helpers.model_handler import local_state_dict
from helpers.model_handler.local_state_dict import fetch
from helpers.model_handler.served_model import ModelSource, forget, serve

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["helpers.load_state_dict.writing", "google.cloud.storage", "tiny_models"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Two checkpoints of one architecture, with other weights, another vocabulary, template and config."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "other"):
        save_checkpoint("llama", folder / name)
    other = folder / "other"
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = [word for word, number in tokenizer["model"]["vocab"].items() if number >= 5]
    tokenizer["model"]["vocab"] |= dict(zip(reversed(words), range(5, 5 + len(words)), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for template in other.glob("*.jinja"):
        template.write_text("OTHER " + template.read_text())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    return {name: str(folder / name) for name in ("one", "other")}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each model's version consists of."""
    folder = tmp_path_factory.mktemp("whole")
    for name, model in models.items():  # a state dict holds the name of its file
        convert(model, folder / name / "m.pt", progress=False)
    return {name: read(str(folder / name / "m.pt"), folder / "cache") for name in models}


@pytest.fixture(params=["this machine", "Cloud Storage"])
def path(request, bucket, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    local = request.param == "this machine"
    return str(tmp_path / "out" / "m.pt") if local else f"gs://{bucket.name}/folder/m.pt"


def read(path: str, cache: Path) -> dict[str, bytes]:
    """What a worker that has nothing yet gets from a path."""
    shutil.rmtree(cache, ignore_errors=True)
    while True:
        got = fetch(path, None, cache)
        files = {name: (got.folder / name).read_bytes() for name in got.manifest.files}
        content = {**files, "weights": got.file.read_bytes()}
        if got.is_there():  # as whoever loads it asks
            return content


def version_at(path: str, whole, cache: Path) -> str:
    """Which version a worker gets; it fails if that is a mixture."""
    content = read(path, cache)
    names = [name for name, version in whole.items() if version == content]
    if not names:
        parts = {n: [v for v in whole if whole[v].get(n) == content[n]] for n in content}
        pytest.fail(f"a mixture: {parts}")
    return names[0]


def convert_until(step: int, model: str, path: str, cache: str, overwrite: bool) -> None:
    """A conversion that is killed after so many changes to files, objects and folders."""
    os.environ["XDG_CACHE_HOME"] = cache  # the fork server has another
    counter = itertools.count(1)

    def killed_after(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if next(counter) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.replace = killed_after(os.replace)
    for name in ("upload", "delete", "delete_folder"):
        setattr(storage, name, killed_after(getattr(storage, name)))
    convert(model, path, progress=False, overwrite=overwrite)


def start(target, *args) -> multiprocessing.Process:
    child = children.Process(target=target, args=args)
    child.start()
    return child


def names_at(path: str) -> set[str]:
    folder = companion_folder(path)
    names = {f"{folder}/{name}" for name in storage.names_in(folder)}
    return names | {p for p in (path, f"{path}.lock", f"{path}.partial") if storage.exists(p)}


def test_a_kill_at_any_step_of_an_overwriting_conversion_leaves_a_whole_version(
    path, models, whole, tmp_path
):
    convert(models["one"], path, progress=False)
    steady = names_at(path)
    there, seen = "one", set()
    for step in itertools.count(1):
        wanted = "other" if there == "one" else "one"
        child = start(convert_until, step, models[wanted], path, os.environ["XDG_CACHE_HOME"], True)
        child.join(300)
        there = version_at(path, whole, tmp_path / "cache")
        seen.add(there == wanted)
        if child.exitcode != -signal.SIGKILL:
            break
        assert step < 100
    assert child.exitcode == 0
    assert there == wanted
    assert step > 15, "fewer steps than there are files"
    assert seen == {True, False}
    assert names_at(path) == steady, "an interrupted conversion has left something behind"


def test_a_kill_at_any_step_of_a_first_conversion_leaves_nothing_or_a_whole_version(
    path, models, whole, tmp_path
):
    for step in itertools.count(1):
        child = start(convert_until, step, models["one"], path, os.environ["XDG_CACHE_HOME"], False)
        child.join(300)
        if child.exitcode != -signal.SIGKILL:
            break
        assert step < 100
        if storage.exists(path):
            assert version_at(path, whole, tmp_path / "cache") == "one"
            convert(models["one"], path, progress=False)  # goes on where the other ended
            folder = companion_folder(path)
            there = {
                name: storage.read_bytes(f"{folder}/{name}") for name in whole["one"].keys() - {"weights"}
            }
            assert there == {name: whole["one"][name] for name in there}
            assert not [name for name in names_at(path) if "/versions/" in name], step
            for name in names_at(path):
                storage.delete(name)
    assert child.exitcode == 0
    assert step > 15


def convert_or_tell(model: str, path: str, cache: str, overwrite: bool) -> None:
    os.environ["XDG_CACHE_HOME"] = cache  # as on two machines
    try:
        convert(model, path, progress=False, overwrite=overwrite)
    except (FileExistsError, FileBusyError):
        raise SystemExit(3) from None


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_conversions_to_one_path_one_is_whole_and_the_other_is_told(
    overwrite, path, models, whole, tmp_path
):
    moments = random.Random(int(overwrite))
    for attempt in range(4):
        if overwrite and attempt == 0:
            convert(models["one"], path, progress=False)
        kill = attempt % 2 == 1
        caches = [str(tmp_path / f"cache-{name}") for name in models]
        both = [
            start(convert_or_tell, model, path, cache, overwrite)
            for model, cache in zip(models.values(), caches, strict=True)
        ]
        if kill:
            both[attempt % 4 // 2].join(moments.uniform(0.1, 0.6))
            both[attempt % 4 // 2].kill()
        for child in both:
            child.join(300)
        codes = [child.exitcode for child in both]
        assert set(codes) <= {0, 3, -signal.SIGKILL}, codes
        if storage.exists(path):
            there = version_at(path, whole, tmp_path / "cache")
            if not kill and not overwrite:
                assert sorted(codes) == [0, 3]
                assert there == list(models)[codes.index(0)]
            if not kill and overwrite:
                assert 0 in codes
        if not overwrite:
            for name in names_at(path):
                storage.delete(name)


def test_readers_beside_writers_see_only_whole_versions(path, models, whole, tmp_path):
    convert(models["one"], path, progress=False)
    seen = []
    for name in ("other", "one", "other"):
        child = start(convert_or_tell, models[name], path, str(tmp_path / "c"), True)
        while child.is_alive():
            seen.append(version_at(path, whole, tmp_path / "cache"))
        assert child.exitcode == 0
    assert {"one", "other"} <= set(seen)


def test_a_version_that_loses_after_its_weights_were_there_says_so(bucket, models, tmp_path, monkeypatch):
    """The other conversion comes between the first one's weights and its manifest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = f"gs://{bucket.name}/m.pt"
    upload, done = storage.upload, []

    def upload_then_be_overtaken(file, target, *args, **kwargs):
        upload(file, target, *args, **kwargs)
        if str(target) == path and not done:
            done.append(True)
            with monkeypatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
                convert(models["other"], path, progress=False, overwrite=True)

    monkeypatch.setattr(storage, "upload", upload_then_be_overtaken)
    with pytest.raises(ReplacedError, match="another conversion has written"):
        convert(models["one"], path, progress=False)
    assert read_manifest(path).model_name == models["other"]
    versions.check_companions(path, read_manifest(path))
    assert not [name for name in names_at(path) if "/versions/" in name]


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "config.json"])
def test_a_write_that_was_held_up_does_not_undo_what_came_meanwhile(
    name, bucket, models, whole, tmp_path, monkeypatch
):
    """One conversion has looked and checked, and is about to write, when the other puts back what was there
    before, every byte of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = f"gs://{bucket.name}/folder/m.pt"
    convert(models["other"], path, progress=False)
    upload, done = storage.upload, []

    def held_up(file, target, *args, before=None, **kwargs):
        def check_and_be_overtaken():
            before()
            if not done:
                done.append(True)
                with monkeypatch.context() as patch:
                    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
                    convert(models["other"], path, progress=False, overwrite=True)

        is_it = str(target) == f"{companion_folder(path)}/{name}"
        upload(file, target, *args, before=check_and_be_overtaken if is_it else before, **kwargs)

    monkeypatch.setattr(storage, "upload", held_up)
    with pytest.raises(ReplacedError):
        convert(models["one"], path, progress=False, overwrite=True)
    assert done
    assert version_at(path, whole, tmp_path / "cache") == "other"


def test_an_upload_whose_answer_was_lost_is_not_taken_for_another_ones(
    bucket, models, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = f"gs://{bucket.name}/folder/m.pt"
    upload = storage.upload

    def lose_the_answer(file, target, *args, **kwargs):
        upload(file, target, *args, **kwargs)
        if str(target) == path:
            raise FileExistsError("the repetition found it there")

    monkeypatch.setattr(storage, "upload", lose_the_answer)
    convert(models["one"], path, progress=False)
    assert version_at(path, whole, tmp_path / "cache") == "one"


def test_a_file_that_is_replaced_while_it_is_checked_is_not_served_under_the_old_name(
    models, whole, tmp_path, monkeypatch
):
    path = tmp_path / "out" / "m.pt"
    convert(models["one"], path, progress=False)
    checksum, done = local_state_dict.crc32c_of, []

    def be_overtaken(file):
        found = checksum(file)
        if not done:
            done.append(True)
            convert(models["other"], path, progress=False, overwrite=True)
        return found

    monkeypatch.setattr(local_state_dict, "crc32c_of", be_overtaken)
    model, manifest = ModelSource(str(path), cache_dir=str(tmp_path / "cache")).load()
    assert done
    assert manifest.model_name == models["other"]
    assert model.tokenizer.chat_template.startswith("OTHER")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_companion_file_that_was_changed_is_noticed(name, path, models, tmp_path):
    convert(models["one"], path, progress=False)
    file = tmp_path / "changed"
    file.write_text("{}")
    storage.upload(file, f"{companion_folder(path)}/{name}", overwrite=True)
    with pytest.raises(CompanionError, match=f"{name} is not there, or is not the one .*--overwrite"):
        ModelSource(path, cache_dir=str(tmp_path / "cache")).load()
    with pytest.raises(FileExistsError):
        convert(models["one"], path, progress=False)
    convert(models["one"], path, progress=False, overwrite=True)
    ModelSource(path, cache_dir=str(tmp_path / "cache")).load()


def test_another_tokenizer_beside_the_same_weights_is_another_version(path, models, tmp_path):
    """A worker that has the weights fetches the files beside them; a process that serves takes them up."""
    model = tmp_path / "model"
    shutil.copytree(models["one"], model)
    convert(str(model), path, progress=False)
    source = ModelSource(path, cache_dir=str(tmp_path / "cache"))
    before = serve(source).tokenizer.chat_template
    (model / "chat_template.jinja").write_text("NEW " + before)
    with pytest.raises(FileExistsError):
        convert(str(model), path, progress=False)
    weights = storage.size_and_crc32c(path)
    convert(str(model), path, progress=False, overwrite=True)
    assert storage.size_and_crc32c(path) == weights
    assert serve(source).tokenizer.chat_template == "NEW " + before
    forget(source)


def test_manifests_without_checksums_are_read_as_before(models, tmp_path):
    path = tmp_path / "m.pt"
    convert(models["one"], path, progress=False)
    manifest = tmp_path / "m" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "checksums": {}}))
    assert read_manifest(path).checksums == {}
    ModelSource(str(path), cache_dir=str(tmp_path / "cache")).load()


def test_two_conversions_on_one_machine_exclude_each_other(models, tmp_path):
    with only_writer(tmp_path / "m.pt"), pytest.raises(FileBusyError, match="another process is writing"):
        convert(models["one"], tmp_path / "m.pt", progress=False)
    convert(models["one"], tmp_path / "m.pt", progress=False)
    assert not list(tmp_path.glob("*.lock"))


def test_who_converts_at_the_same_time_to_the_same_path_waits_and_finds_it_done(
    bucket, models, tmp_path, monkeypatch, capsys
):
    from conftest import wait_until  # not above: it takes a second, and each child imports this module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = f"gs://{bucket.name}/m.pt"
    upload = storage.upload

    is_told, is_busy = threading.Event(), conversion.is_busy

    def look(*given):
        if found := is_busy(*given):
            is_told.set()
        return found

    def upload_later(file, target, *args, **kwargs):
        if str(target) == path:
            assert is_told.wait(300), "nobody else came"
        return upload(file, target, *args, **kwargs)

    monkeypatch.setattr(conversion, "is_busy", look)
    monkeypatch.setattr(storage, "upload", upload_later)
    first = threading.Thread(target=convert, args=(models["one"], path), kwargs={"progress": False})
    first.start()
    wait_until(lambda: list((tmp_path / "xdg").rglob("upload.lock")), "the first one did not begin")
    manifest = convert(models["one"], path)
    first.join()
    assert manifest == read_manifest(path)
    said = capsys.readouterr().out
    assert "waiting until it has ended" in said
    assert "Nothing to do" in said
    assert list((tmp_path / "xdg" / "streaming-llm" / "conversions").iterdir()) == []
