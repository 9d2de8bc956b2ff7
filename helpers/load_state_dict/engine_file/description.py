"""An engine's file: a folder with what the engine reads, and engine.json, which is written last.

Beside a state dict `.../NAME.pt` it is `.../NAME/engines/ctranslate2-DTYPE/`. One that was made from another
version of the state dict, or by a later version of the engine, is not used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from packaging.version import InvalidVersion, Version

from helpers.files import storage
from helpers.files.names import check_plain, inside
from helpers.files.transfer import crc32c_of
from helpers.load_state_dict.manifest import Manifest, companion_folder
from helpers.sizing import sizes

ENGINE = "ctranslate2"

ENGINE_DTYPES = sizes.ENGINES[ENGINE]
"""What CTranslate2 computes in on a CPU; bfloat16 only on some."""

ENGINES = "engines"
"""The folder in the companion folder for the files of engines."""

DESCRIPTION = "engine.json"


class EngineError(ValueError):
    """An engine that is not installed, or cannot take a model; the message says why, and what to do."""


@dataclass(frozen=True)
class Reference:
    """What transformers makes of a fixed sample, so that an engine can be checked against it.

    Attributes:
        prompt: token ids.
        response: token ids that follow it; not what the model would say.
        log_probabilities: of each of the response's tokens, in float32.
    """

    prompt: list[int]
    response: list[int]
    log_probabilities: list[float]


@dataclass(frozen=True)
class EngineFile:
    """What the file of an engine holds.

    Attributes:
        engine: "ctranslate2".
        engine_version: the version that wrote it.
        dtype: what it is for computing in.
        source: the version of the state dict that it was made from, `Manifest.version`.
        files: the CRC-32C of each file, in base64, by name.
        sizes: the bytes of each.
        reference: see `Reference`.
    """

    engine: str
    engine_version: str
    dtype: str
    source: str
    files: dict[str, str]
    sizes: dict[str, int]
    reference: Reference

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(self.sizes.values())

    def to_json(self) -> str:
        """The text of engine.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def why_not_for(self, manifest: Manifest) -> str:
        """Why it cannot serve this version of a state dict on this machine; empty if it can."""
        if self.source != manifest.version:
            return "it was made from another version of the state dict"
        installed = engine_version()
        if installed is None:
            return f"{ENGINE} is not installed"
        try:
            made, here = Version(self.engine_version), Version(installed)
        except InvalidVersion:
            return "it does not name the engine's version"
        if made.major != here.major or made > here:
            return f"it was made by {ENGINE} {self.engine_version}, and {installed} is installed"
        return ""

    def damage_in(self, folder: str | Path) -> str:
        """Which of its files is not in a folder as it should be; empty if all are."""
        for name, checksum in self.files.items():
            file = inside(Path(folder), name)
            if not file.is_file() or file.stat().st_size != self.sizes[name] or crc32c_of(file) != checksum:
                return name
        return ""


def engine_version() -> str | None:
    """The version of CTranslate2 that is installed; None if it is not."""
    try:
        return importlib.metadata.version(ENGINE)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_folder(state_dict_path: str | os.PathLike, dtype: str) -> str:
    """Where the engine's file for a dtype is, beside a state dict."""
    return f"{companion_folder(state_dict_path)}/{ENGINES}/{ENGINE}-{dtype}"


def read_engine_file(state_dict_path: str | os.PathLike, dtype: str) -> EngineFile | None:
    """The description of the engine's file beside a state dict; None if there is none that is whole.

    Raises:
        PermissionError, StorageError: Cloud Storage could not be queried.
        ValueError: it is not a description.
    """
    path = f"{engine_folder(state_dict_path, dtype)}/{DESCRIPTION}"
    try:
        return parse(storage.read_bytes(path), path)
    except storage.BucketNotFoundError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None


def in_place(path: str | os.PathLike, manifest: Manifest, dtype: str) -> EngineFile | None:
    """The description of the engine's file beside a state dict, if that is whole and can serve this version
    of it.

    Raises:
        PermissionError, StorageError: as `read_engine_file`.
    """
    try:
        found = read_engine_file(path, dtype)
    except ValueError:
        return None
    if found is None or found.why_not_for(manifest):
        return None
    target = engine_folder(path, dtype)
    for name, checksum in found.files.items():
        try:
            if storage.size_and_crc32c(f"{target}/{name}") != (found.sizes[name], checksum):
                return None
        except storage.BucketNotFoundError:
            raise
        except FileNotFoundError:
            return None
    return found


def parse(text: bytes, path: str | os.PathLike) -> EngineFile:
    """The description that a file holds.

    Raises:
        ValueError: it is not one.
    """
    try:
        values = json.loads(text)
        reference = Reference(**values.pop("reference"))
        known = {one.name for one in fields(EngineFile)}
        found = EngineFile(
            **{name: value for name, value in values.items() if name in known}, reference=reference
        )
        _check_values(found)
        return found
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} does not describe the file of an engine ({error}): make it again"
        ) from error


def _check_values(found: EngineFile) -> None:
    """Refuses values that nothing here writes: a bucket may be written to by others."""
    texts = (found.engine, found.engine_version, found.dtype, found.source)
    if not all(isinstance(text, str) for text in texts) or found.engine != ENGINE:
        raise ValueError("an engine, version or dtype is not one")
    if not isinstance(found.files, dict) or not found.files or found.files.keys() != found.sizes.keys():
        raise ValueError("the files are not those of an engine")
    for name, checksum in found.files.items():
        check_plain(name)
        if not isinstance(checksum, str) or not isinstance(found.sizes[name], int):
            raise ValueError(f"{name} has no checksum or size")
    tokens = [*found.reference.prompt, *found.reference.response]
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError("the sample is not one of token ids")
    if len(found.reference.log_probabilities) != len(found.reference.response):
        raise ValueError("the sample has not one probability for each token")
