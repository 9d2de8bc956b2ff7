"""The engine's file on this machine: taken from beside the state dict, or made from it, once a machine."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from helpers.files import storage
from helpers.files.cache import private_folder
from helpers.files.whole_file import whole_folder
from helpers.load_state_dict.engine_file import EngineError, EngineFile, make, read_engine_file, why_not
from helpers.load_state_dict.engine_file.description import (
    DESCRIPTION,
    ENGINE,
    engine_folder,
    engine_version,
    parse,
)
from helpers.load_state_dict.manifest import Manifest, read_manifest
from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler.local_state_dict import LOCK_SECONDS, fetch, fetch_companions, folder_of

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often a file is made anew from a state dict that is replaced meanwhile."""


class ReplacedError(LoadError):
    """The state dict was replaced while its engine's file was made."""


@dataclass(frozen=True)
class LocalEngineFile:
    """An engine's file on this machine.

    Attributes:
        folder: what the engine reads.
        file: its description.
        companions: the folder with config.json, generation_config.json and the tokenizer's files.
        manifest: of the state dict that it was made from.
        refusal: a file for the reason why it is not used, once that is known.
    """

    folder: Path
    file: EngineFile
    companions: Path
    manifest: Manifest
    refusal: Path

    def refuse(self, reason: str) -> None:
        """Notes that it is not to be used, nor made again, on this machine."""
        self.refusal.write_text(reason)
        if self.folder.parent == self.refusal.parent:  # made here, rather than put beside the state dict
            shutil.rmtree(self.folder, ignore_errors=True)


def fetch_engine_file(
    state_dict_path: str, dtype: str, cache_dir: str | Path | None = None
) -> LocalEngineFile:
    """The engine's file of a state dict, on this machine's disk.

    One beside the state dict is used where it is, or copied from Cloud Storage, without the state dict. Else
    the file is made from the state dict, of which then no copy stays.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        dtype: what to compute in.
        cache_dir: where copies are kept; see `state_dict_cache`.

    Raises:
        EngineError: the engine cannot take the model, or was found not to compute it rightly.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
        CacheError, CompanionError, LoadError: as `fetch`.
        OSError: not enough disk space.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch_engine_file(state_dict_path, dtype, cache_dir)
        except ReplacedError:
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _fetch_engine_file(state_dict_path: str, dtype: str, cache_dir: str | Path | None) -> LocalEngineFile:
    manifest = read_manifest(state_dict_path)
    cache = private_folder(folder_of(state_dict_path, manifest.crc32c, cache_dir))
    companions = cache / f"model-{manifest.version}"
    # The version of the engine is in the name: another one may be installed the next time.
    target = cache / f"{ENGINE}-{engine_version()}-{dtype}-{manifest.version}"
    # The converters read transformers' configs, so that another version of it may change their minds.
    refusal = target.with_name(f"{target.name}.transformers-{version('transformers')}.refused")
    with FileLock(cache / "engine.lock", timeout=LOCK_SECONDS):
        with FileLock(cache / "lock", timeout=LOCK_SECONDS):
            fetch_companions(state_dict_path, manifest, companions)
        if reason := why_not(companions):
            raise EngineError(reason)
        if refusal.is_file():
            raise EngineError(f"{refusal.read_text()} (Found out earlier, and noted in {refusal}.)")
        if found := _whole(target, manifest):
            return LocalEngineFile(target, found, companions, manifest, refusal)
        if beside := _beside(state_dict_path, manifest, dtype):
            if not storage.is_cloud(state_dict_path):
                folder = Path(engine_folder(state_dict_path, dtype))
                if not beside.damage_in(folder):
                    return LocalEngineFile(folder, beside, companions, manifest, refusal)
                log.warning("%s is damaged, and is not used", folder)
            elif _download(state_dict_path, beside, dtype, target):
                return LocalEngineFile(target, beside, companions, manifest, refusal)
        log.info("Making the file of %s in %s, once on this machine", ENGINE, dtype)
        local = fetch(state_dict_path, None, cache_dir)
        if local.manifest.version != manifest.version:
            raise ReplacedError(f"{state_dict_path} was replaced while it was being read: try again.")
        try:
            made = make(local.file, local.folder, manifest.version, target, dtype)
        except EngineError as error:
            refusal.write_text(str(error))
            raise
        if not local.is_there():
            shutil.rmtree(target, ignore_errors=True)  # it may be of what took its place
            raise ReplacedError(f"{state_dict_path} was replaced while it was being read: try again.")
        if storage.is_cloud(state_dict_path):  # the disk of a worker is paid for
            with FileLock(cache / "lock", timeout=LOCK_SECONDS):
                local.file.unlink(missing_ok=True)
        return LocalEngineFile(target, made, companions, manifest, refusal)


def _whole(folder: Path, manifest: Manifest) -> EngineFile | None:
    """The file in this machine's cache, if it is there. Only this user can write to it, so it is as it was
    made; a look at the sizes finds a disk that was full, or cleaned."""
    try:
        found = parse((folder / DESCRIPTION).read_bytes(), folder)
    except (OSError, ValueError):
        return None
    for name, size in found.sizes.items():
        if not (folder / name).is_file() or os.path.getsize(folder / name) != size:
            return None
    return None if found.why_not_for(manifest) else found


def _beside(state_dict_path: str, manifest: Manifest, dtype: str) -> EngineFile | None:
    try:
        found = read_engine_file(state_dict_path, dtype)
    except ValueError as error:
        log.warning("%s", error)
        return None
    if found and (reason := found.why_not_for(manifest)):
        log.warning("%s is not used: %s", engine_folder(state_dict_path, dtype), reason)
        return None
    return found


def _download(state_dict_path: str, beside: EngineFile, dtype: str, target: Path) -> bool:
    """Copies an engine's file from Cloud Storage; whether it arrived as it was written."""
    source, started = engine_folder(state_dict_path, dtype), time.monotonic()
    try:
        with whole_folder(target) as new:
            for name in beside.files:
                storage.download(f"{source}/{name}", new / name, lambda moved: None)
            if damaged := beside.damage_in(new):
                raise LoadError(f"{source}/{damaged} is damaged, and is not used")
            (new / DESCRIPTION).write_text(beside.to_json())
    except (FileNotFoundError, LoadError) as error:  # the state dict can still be made into one
        log.warning("%s", error)
        return False
    log.info("Fetched %s (%.2f GB) in %.1f s", source, beside.bytes / 1e9, time.monotonic() - started)
    return True
