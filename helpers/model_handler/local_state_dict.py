"""Fetches a state dict to this machine's disk from wherever it is: once, checked, in the dtype to compute in.

All the processes of a machine map the same file, so that its pages are in memory only once. A lock lets the
first process fetch while the others wait.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from helpers.files import storage
from helpers.files.cache import cache_folder, private_folder
from helpers.files.names import inside
from helpers.files.transfer import crc32c_of
from helpers.files.whole_file import whole_or_absent
from helpers.load_state_dict.manifest import Manifest, read_companion, read_manifest
from helpers.load_state_dict.mapped_model import LoadError, read_state_dict
from helpers.load_state_dict.state_dict_file import StateDictFile
from helpers.models.dtypes import dtype_name

log = logging.getLogger(__name__)

# A worker that waits longer than this for another one's download reports it rather than hanging.
LOCK_SECONDS = 3600


@dataclass(frozen=True)
class LocalStateDict:
    """A state dict on this machine.

    Attributes:
        file: the `.pt` file, in the dtype that was asked for.
        folder: config.json, generation_config.json and the tokenizer's files.
        manifest: the manifest of the state dict that it was made from.
        stamp: tells the file from another one that takes its place.
    """

    file: Path
    folder: Path
    manifest: Manifest
    stamp: str

    def is_there(self) -> bool:
        """Whether the file is still the one that was fetched: a state dict on this machine is not copied, and
        a conversion may replace it at any time."""
        return self.file.is_file() and _stamp(self.file) == self.stamp


def state_dict_cache() -> Path:
    """Where copies are kept: `STATE_DICT_CACHE`, or a folder of the user's own cache. Each state dict has a
    folder in it that only this user can write to."""
    return Path(os.environ.get("STATE_DICT_CACHE") or cache_folder("state_dicts"))


def fetch(
    state_dict_path: str, dtype: torch.dtype | None = None, cache_dir: str | Path | None = None
) -> LocalStateDict:
    """The state dict on this machine's disk, checked against its manifest, in `dtype`.

    A copy already there is used as it is. The weights of a state dict on this machine, in the right dtype,
    are not copied.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`, with its companion folder beside it.
        dtype: the dtype to compute in; None keeps the file's own.
        cache_dir: where copies are kept; see `state_dict_cache`.

    Raises:
        FileNotFoundError, PermissionError, storage.StorageError: it cannot be read.
        CacheError: another user of this machine could have changed the copy.
        LoadError, CompanionError: it is not what its manifest says.
    """
    manifest = read_manifest(state_dict_path)
    while True:
        try:
            return _fetch(state_dict_path, manifest, dtype, cache_dir)
        except (FileNotFoundError, ValueError):
            there = read_manifest(state_dict_path)
            if there.version == manifest.version:
                raise
            manifest = there  # it was replaced while it was being fetched


def _fetch(
    state_dict_path: str, manifest: Manifest, dtype: torch.dtype | None, cache_dir: str | Path | None
) -> LocalStateDict:
    cache = private_folder(folder_of(state_dict_path, manifest.crc32c, cache_dir))
    convert = dtype is not None and manifest.dtype != dtype_name(dtype)
    with FileLock(cache / "lock", timeout=LOCK_SECONDS):
        folder = cache / f"model-{manifest.version}"
        fetch_companions(state_dict_path, manifest, folder)
        converted = cache / f"{dtype_name(dtype)}.pt"
        if convert and _is_as_made(converted):
            return LocalStateDict(converted, folder, manifest, _stamp(converted))
        in_cloud = storage.is_cloud(state_dict_path)
        file = cache / "model.pt" if in_cloud else Path(state_dict_path)
        if in_cloud and not file.is_file():
            _download(state_dict_path, file, manifest.bytes)
        try:
            stamp = _check(file, manifest, cache / "checked")
        except LoadError:
            if in_cloud:
                file.unlink(missing_ok=True)  # the next try fetches it again: it may be whole by then
            raise
        if not convert:
            return LocalStateDict(file, folder, manifest, stamp)
        _convert(file, converted, dtype)
        if _stamp(file) != stamp:  # it may have been converted from the file that took its place
            converted.unlink()
            raise LoadError(f"{file} was replaced while it was being read: try again.")
        _stamp_file(converted).write_text(_stamp(converted))
        if in_cloud:
            file.unlink()  # the disk of a worker is paid for, and this copy has served its purpose
        return LocalStateDict(converted, folder, manifest, _stamp(converted))


def drop_older_copies(state_dict_path: str, crc32c: str, cache_dir: str | Path | None = None) -> None:
    """Deletes this machine's copies of earlier state dicts at the path, to free disk space.

    A process that still maps one can go on with it: the pages stay until it lets go of them.

    Args:
        state_dict_path: as for `fetch`.
        crc32c: the checksum of the state dict whose copies stay.
        cache_dir: as for `fetch`.
    """
    current = folder_of(state_dict_path, crc32c, cache_dir)
    key = current.name.removesuffix(_hex(crc32c))
    for folder in current.parent.glob(f"{glob.escape(key)}*"):
        if folder != current:
            for file in folder.glob("*.pt"):
                file.unlink(missing_ok=True)
            for engine_file in folder.glob("ctranslate2-*/"):
                shutil.rmtree(engine_file, ignore_errors=True)


def folder_of(state_dict_path: str, crc32c: str, cache_dir: str | Path | None) -> Path:
    """The folder in the cache for a state dict, and for what is made from it."""
    # The path is in the key because two models may share a name, the checksum because a file may be replaced.
    path_key = hashlib.sha256(str(state_dict_path).encode()).hexdigest()[:8]
    name = f"{Path(state_dict_path).stem}-{path_key}-{_hex(crc32c)}"
    return Path(cache_dir or state_dict_cache()) / name


def _hex(crc32c: str) -> str:
    return base64.b64decode(crc32c).hex()


def fetch_companions(state_dict_path: str, manifest: Manifest, folder: Path) -> None:
    """Copies what stands beside a state dict, so that it stays as it was checked."""
    folder.mkdir(exist_ok=True)
    for name in manifest.files:
        file = inside(folder, name)
        if not file.is_file():
            with whole_or_absent(file) as copy:
                copy.write(read_companion(state_dict_path, manifest, name))


def _download(state_dict_path: str, file: Path, size: int) -> None:
    started = time.monotonic()
    log.info("Fetching %s (%.2f GB)", state_dict_path, size / 1e9)
    storage.download(state_dict_path, file, _logged_progress(size))
    log.info("Fetched %s in %.1f s", state_dict_path, time.monotonic() - started)


def _logged_progress(total: int):
    """Logs every tenth of `total` bytes: on a worker, a long download shows only in the log."""
    done = logged = 0

    def progress(moved: int) -> None:
        nonlocal done, logged
        done += moved
        if total and done * 10 // total > logged:
            logged = done * 10 // total
            log.info("Fetched %d %%", logged * 10)

    return progress


def _check(file: Path, manifest: Manifest, checked: Path) -> str:
    """Checks size and checksum against the manifest; the checksum only once while the file is unchanged.

    Returns the stamp of the file that was checked.
    """
    if not file.is_file():
        raise LoadError(f"There is no state dict {file}: make it with `python -m helpers.load_state_dict`.")
    status = file.stat()
    if status.st_size != manifest.bytes:
        raise LoadError(
            f"{file} is damaged: it has {status.st_size} bytes, but its manifest says {manifest.bytes}. "
            "Make it again with `python -m helpers.load_state_dict`."
        )
    stamp = _stamp(file)
    note = f"{file.resolve()} {stamp}"
    if checked.is_file() and checked.read_text() == note:
        return stamp
    if crc32c_of(file) != manifest.crc32c:
        raise LoadError(
            f"{file} is damaged: its checksum differs from its manifest's. Make it again with "
            "`python -m helpers.load_state_dict`."
        )
    checked.write_text(note)
    return stamp


def _stamp(file: Path) -> str:
    """Changes when a file is written to, and when another takes its place."""
    status = file.stat()
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _stamp_file(converted: Path) -> Path:
    return converted.with_name(f"{converted.name}.made")


def _is_as_made(converted: Path) -> bool:
    """Whether a converted copy is there, and is the file that this user's conversion left behind."""
    try:
        return _stamp_file(converted).read_text() == _stamp(converted)
    except FileNotFoundError:
        return False


def _convert(file: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes the state dict with its floating-point tensors in `dtype`, tensor by tensor."""
    started = time.monotonic()
    source = read_state_dict(file)
    shared: dict[tuple, list[str]] = {}  # names that share one tensor, by where it is in the file
    for name, tensor in source.items():
        shared.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    groups = list(shared.values())

    def target_dtype(tensor: torch.Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    places = [(source[g[0]].shape, target_dtype(source[g[0]]), g) for g in groups]
    with whole_or_absent(target) as output:
        state_dict = StateDictFile(output, list(source), places)
        for index, group in enumerate(groups):
            tensor = source[group[0]]
            converted = tensor.to(target_dtype(tensor))
            if dtype == torch.float16 and (converted.isinf() & ~tensor.isinf()).any():
                raise LoadError(f"{group[0]} does not fit into float16: compute in bfloat16 or float32.")
            state_dict.write(index, [converted.flatten()])
        state_dict.finish()
    log.info("Converted to %s for this machine in %.1f s", dtype_name(dtype), time.monotonic() - started)
