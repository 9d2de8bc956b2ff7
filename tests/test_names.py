"""Names that come from outside: no file is written, read or copied anywhere but in its folder."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import save_checkpoint

from helpers.files.names import UnsafeNameError, check_plain, inside
from helpers.load_state_dict import CheckpointError, convert
from helpers.local_cloud.cloud_storage.names import file_of
from helpers.local_cloud.dataflow.dataflow_worker.staged_files import _plain

PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.txt", "/", "\\", "C:", "~", "-rf", "x\0y", "\n", "é", "link", " "]
)
SEVERAL = st.lists(PARTS, max_size=6)
NAMES = st.one_of(SEVERAL.map("/".join), SEVERAL.map("".join), st.text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("names")
    (place / "folder").mkdir()
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "a").write_text("x")
    (place / "folder" / "link").symlink_to(place / "elsewhere")
    return place / "folder"


@given(name=NAMES)
@example(name="../elsewhere/a")
@example(name="link/a")
@example(name="/etc/passwd")
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_leads_into_its_folder_or_is_refused(folder, name):
    try:
        path = inside(folder, name)
    except UnsafeNameError:
        return
    assert path.parent.resolve().is_relative_to(folder.resolve())
    assert path.resolve() == path.parent.resolve() / path.name, "no link on the way"
    assert check_plain(name) == name


@given(name=NAMES)
@settings(max_examples=300, deadline=None)
def test_a_staged_file_has_the_name_of_a_file(name):
    try:
        plain = _plain(name)
    except RuntimeError:
        return
    assert os.path.basename(plain) == plain
    assert plain not in ("", ".", "..")


@given(name=NAMES)
@example(name="../../elsewhere/a")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_objects_file_lies_in_its_bucket(folder, name):
    bucket = folder / "bucket"
    bucket.mkdir(exist_ok=True)
    path = file_of(folder, f"gs://bucket/{name}")
    assert path is None or path.is_relative_to(bucket)
    assert file_of(folder, f"gs://../elsewhere/{name}") is None


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "spiece.model"])
def test_what_a_checkpoint_links_to_is_not_copied_out_of_other_folders(name, tmp_path):
    save_checkpoint("llama", tmp_path / "m")
    (tmp_path / "secret").write_text((tmp_path / "m" / name).read_text() if name != "spiece.model" else "key")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    (tmp_path / "m" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"a link to .*secret, outside of the checkpoint"):
        convert(str(tmp_path / "m"), tmp_path / "out.pt", progress=False)
    assert not (tmp_path / "out.pt").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    revision = tmp_path / "models--x" / "snapshots" / "abc"
    save_checkpoint("llama", revision)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for file in list(revision.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..", "..", "blobs", file.name))
    convert(str(revision), tmp_path / "out.pt", progress=False)
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
