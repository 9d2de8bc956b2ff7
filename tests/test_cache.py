"""What this machine's users keep for themselves: others can neither put nor change anything there."""

import os

import pytest
from tiny_models import save_checkpoint

from helpers.files.cache import CacheError, private_folder
from helpers.files.whole_file import whole_or_absent
from helpers.load_state_dict import convert
from helpers.model_handler.local_state_dict import fetch

NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


def test_a_folder_is_made_for_this_user_alone(tmp_path):
    folder = private_folder(tmp_path / "a" / "b")
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").write_text("kept")
    assert private_folder(folder) == folder
    assert (folder / "file").read_text() == "kept"


@as_root
def test_another_users_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o700)
    os.chown(tmp_path / "folder", NOBODY, NOBODY)
    with pytest.raises(CacheError, match="not a folder of this user's own"):
        private_folder(tmp_path / "folder")


def test_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="not a folder of this user's own"):
        private_folder(tmp_path / "link")


@as_root
@pytest.mark.parametrize(
    ("owner", "mode", "is_fine"),
    [(0, 0o777, False), (0, 0o1777, True), (0, 0o755, True), (NOBODY, 0o755, False)],
)
def test_a_folder_whose_place_others_can_change_is_refused(owner, mode, is_fine, tmp_path):
    (tmp_path / "shared").mkdir()
    os.chown(tmp_path / "shared", owner, owner)
    (tmp_path / "shared").chmod(mode)
    if is_fine:
        private_folder(tmp_path / "shared" / "folder")
    else:
        with pytest.raises(CacheError, match="Others can replace"):
            private_folder(tmp_path / "shared" / "folder")


def test_a_folder_that_others_could_write_to_is_emptied_and_closed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("from anybody")
    (folder / "sub" / "file").write_text("from anybody")
    (folder / "link").symlink_to(tmp_path)
    folder.chmod(0o775)
    private_folder(folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path.is_dir()


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "file.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="cannot be written"), whole_or_absent(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture
def llama(tmp_path):
    save_checkpoint("llama", tmp_path / "checkpoint")
    convert(str(tmp_path / "checkpoint"), tmp_path / "m.pt", "float32", progress=False)
    return str(tmp_path / "m.pt")


@as_root
def test_a_state_dict_is_not_served_from_another_users_cache(llama, tmp_path):
    import torch

    made = fetch(llama, torch.bfloat16, tmp_path / "cache").file
    for place in (made.parent, *made.parent.rglob("*")):
        os.chown(place, NOBODY, NOBODY)
    with pytest.raises(CacheError, match="not a folder of this user's own"):
        fetch(llama, torch.bfloat16, tmp_path / "cache")


def test_a_converted_copy_that_was_changed_is_made_anew(llama, tmp_path):
    import torch

    made = fetch(llama, torch.bfloat16, tmp_path / "cache").file
    content = made.read_bytes()
    made.write_bytes(content[:-1000])
    assert fetch(llama, torch.bfloat16, tmp_path / "cache").file.read_bytes() == content


def test_a_place_where_none_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="name another place for copies with STATE_DICT_CACHE"):
        private_folder(tmp_path / "file" / "cache" / "folder")
