"""Puts a version of a state dict in place: weights, configs and tokenizer, all of them at one moment.

Neither a disk nor Cloud Storage can replace several files at once. So a version takes four steps:

1. Its companion files go into a folder of their own, `NAME/versions/VERSION/`, the manifest last (`stage`).
2. Its weights replace `NAME.pt`. This is the moment.
3. Its manifest, and then its companion files, replace those in `NAME/` (`settle`).
4. The folder of step 1 is deleted.

Readers take the manifest, of those in `NAME/` and `NAME/versions/`, that describes the weights which are
there, and each companion file from where its checksum is the manifest's. So they see the old version until
step 2 and the new one from then on, whatever is interrupted when. A version with the same weights but other
companion files takes the old one's place with the manifest in step 3.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from helpers.files import storage
from helpers.files.whole_file import only_writer
from helpers.load_state_dict.manifest import (
    MANIFEST,
    VERSIONS,
    Manifest,
    companion_folder,
    read_companion,
    read_manifest,
    settled_manifest,
)

ABANDONED_SECONDS = 7 * 24 * 3600
"""How old a folder in `versions/` must be to belong to no conversion that still goes on."""

LOCAL_WRITER = "local"
"""The writer of what is on this machine's disk: only one at a time can be writing it."""

ATTEMPTS = 10
"""How often a file is written anew that another conversion replaces at the same time."""


class ReplacedError(FileExistsError):
    """Another conversion has put its own version in place."""


def stage(
    state_dict_path: str | os.PathLike, manifest: Manifest, companions: str | os.PathLike, writer: str
) -> str:
    """Writes a version's companion files and manifest to a folder of their own.

    Args:
        state_dict_path: where the state dict will be.
        manifest: of the version.
        companions: a folder on this machine with the manifest's files.
        writer: a name that no other conversion uses at the same time. What an earlier one of that name has
            left behind is deleted in the end.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, PermissionError, OSError: as `storage.upload`.
    """
    folder = f"{companion_folder(state_dict_path)}/{VERSIONS}/{manifest.version}-{writer}"
    for name in manifest.files:
        storage.upload(Path(companions, name), f"{folder}/{name}", overwrite=True)
    with _as_file(manifest) as file:
        storage.upload(file, f"{folder}/{MANIFEST}", overwrite=True)
    return folder


def settle(
    state_dict_path: str | os.PathLike,
    manifest: Manifest,
    companions: str | os.PathLike,
    staged: str,
    overwrite: bool,
) -> None:
    """Moves a version's manifest and companion files to their places, once its weights are at theirs.

    Args:
        state_dict_path: the state dict's.
        manifest: of the version.
        companions: as for `stage`.
        staged: what `stage` returned. It is deleted once nothing needs it any more.
        overwrite: whether the version may replace another one with the same weights.

    Raises:
        ReplacedError: another conversion has put its version in place meanwhile; that one is whole.
        FileNotFoundError, PermissionError, OSError: as `storage.upload`.
    """
    folder, is_shared = companion_folder(state_dict_path), storage.is_cloud(state_dict_path)
    before = _manifest_at(state_dict_path)

    def weights_are_there() -> None:
        if not manifest.describes(state_dict_path):
            raise replaced(state_dict_path)
        other = _manifest_at(state_dict_path)
        is_other = other and other.version != manifest.version and other.describes(state_dict_path)
        if is_other and not overwrite:
            raise replaced(state_dict_path)

    def manifest_is_there() -> None:
        there = _manifest_at(state_dict_path)
        if there is None or there.version != manifest.version:
            raise replaced(state_dict_path)

    def replace(file: Path, name: str, check: Callable[[], None]) -> None:
        _replace(file, f"{folder}/{name}", check if is_shared else None)

    def delete(name: str) -> None:
        storage.delete(f"{folder}/{name}", before=manifest_is_there if is_shared else None)

    try:
        with _as_file(manifest) as file:
            replace(file, MANIFEST, weights_are_there)
        for name in manifest.files:
            replace(Path(companions, name), name, manifest_is_there)
        # Another model was here: whoever reads the folder as it is would take its tokenizer for this one's.
        for name in set(before.files if before else ()) - {*manifest.files}:
            delete(name)
        if is_shared:
            weights_are_there()
            manifest_is_there()
    except ReplacedError:
        storage.delete_folder(staged)
        raise
    storage.delete_folder(staged)
    delete_abandoned(state_dict_path, staged.rpartition("-")[2])


def delete_abandoned(state_dict_path: str | os.PathLike, writer: str) -> None:
    """Deletes what interrupted conversions have left in `versions/`: all of one writer's, and what is old.

    Args:
        state_dict_path: the state dict's.
        writer: as for `stage`.

    Raises:
        FileNotFoundError, PermissionError, OSError: as `storage.delete_folder`.
    """
    folder = f"{companion_folder(state_dict_path)}/{VERSIONS}"
    for version in {name.partition("/")[0] for name in storage.names_in(folder)}:
        is_own = version.rpartition("-")[2] == writer
        storage.delete_folder(f"{folder}/{version}", None if is_own else ABANDONED_SECONDS)
    if not storage.is_cloud(folder):
        storage.delete_folder(folder, ABANDONED_SECONDS)  # if nothing is in it any more


def finish(state_dict_path: str | os.PathLike, manifest: Manifest) -> None:
    """Settles a version whose conversion was interrupted after its weights had come to their place.

    Args:
        state_dict_path: the state dict's.
        manifest: what `read_manifest` says of it.

    Raises:
        CompanionError: one of its files is nowhere as it should be.
        ReplacedError: another version has taken its place.
        OSError: as `settle`.
    """
    folder = companion_folder(state_dict_path)
    if manifest.version == getattr(_manifest_at(state_dict_path), "version", None) and all(
        _is_there(f"{folder}/{name}", checksum) for name, checksum in manifest.checksums.items()
    ):
        if not storage.is_cloud(folder) and os.path.isdir(f"{folder}/{VERSIONS}"):
            with writing(state_dict_path):
                delete_abandoned(state_dict_path, LOCAL_WRITER)
        return
    with writing(state_dict_path), tempfile.TemporaryDirectory() as copy:
        if read_manifest(state_dict_path).version != manifest.version:
            raise replaced(state_dict_path)
        for name in manifest.files:
            file = Path(copy, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(read_companion(state_dict_path, manifest, name))
        writer = uuid.uuid4().hex[:8] if storage.is_cloud(state_dict_path) else LOCAL_WRITER
        staged = stage(state_dict_path, manifest, copy, writer)
        settle(state_dict_path, manifest, copy, staged, overwrite=True)


@contextmanager
def writing(state_dict_path: str | os.PathLike) -> Iterator[None]:
    """Keeps other conversions on this machine away from a path on this machine. In Cloud Storage, each write
    names the object that it may replace.

    Raises:
        FileBusyError: another conversion is writing the same path.
    """
    is_shared = storage.is_cloud(state_dict_path)
    with nullcontext() if is_shared else only_writer(state_dict_path):
        yield


def check_companions(state_dict_path: str | os.PathLike, manifest: Manifest) -> None:
    """Checks that every companion file of a version can be read.

    Raises:
        CompanionError: one of them is absent, or is another version's.
        FileNotFoundError, PermissionError, StorageError: as `read_manifest`.
    """
    folder = companion_folder(state_dict_path)
    for name in manifest.files:
        if not _is_there(f"{folder}/{name}", manifest.checksums.get(name)):
            read_companion(state_dict_path, manifest, name)


def _is_there(path: str, checksum: str | None) -> bool:
    try:
        return storage.size_and_crc32c(path)[1] == checksum or checksum is None
    except storage.BucketNotFoundError:
        raise
    except FileNotFoundError:
        return False


def _replace(file: Path, path: str, check: Callable[[], None] | None) -> None:
    """Writes a file in place of the one that is there, as long as `check` raises nothing.

    The check stands between the look at what will be replaced and its replacement. If another conversion
    replaces it after that look, this write is refused, and there is a new look and a new check.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # Even if it is the same: then another's write, which names what it may replace, comes to nothing.
            return storage.upload(file, path, overwrite=True, before=check, skip_identical=check is None)
        except ReplacedError:
            raise
        except FileExistsError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(0.1 * attempt)
    return None


def _manifest_at(state_dict_path: str | os.PathLike) -> Manifest | None:
    try:
        return settled_manifest(state_dict_path)
    except ValueError:
        return None


def replaced(state_dict_path: str | os.PathLike) -> ReplacedError:
    """What to raise where another conversion's version has come to a path meanwhile."""
    return ReplacedError(
        f"another conversion has written {state_dict_path} in the meantime: what is there is the other's, "
        "whole; look at it first, or convert to another path"
    )


@contextmanager
def _as_file(manifest: Manifest) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MANIFEST)
        file.write_text(manifest.to_json())
        yield file
