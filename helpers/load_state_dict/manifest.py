"""A state dict's companion folder, and the manifest in it, which says what the state dict holds.

A state dict is `.../NAME.pt`; its companion folder is `.../NAME/`, with the model's config.json,
generation_config.json, tokenizer files and manifest.json. A worker needs nothing else.
"""

import base64
import json
import os
from dataclasses import asdict, dataclass, field, fields

from helpers.files import storage
from helpers.files.names import check_plain
from helpers.models.dtypes import DTYPES

MANIFEST = "manifest.json"


class WrongModelError(ValueError):
    """A state dict that was made from another model than the one that is asked for."""


@dataclass(frozen=True)
class Manifest:
    """What a state dict holds, and how to tell that it arrived whole.

    Attributes:
        model_name: the name of the model it was converted from.
        dtype: the dtype of its floating-point tensors: "float16", "bfloat16" or "float32".
        parameters: how many numbers it holds, each shared tensor counted once.
        bytes: the size of the `.pt` file.
        crc32c: the checksum of the `.pt` file, in base64, as Cloud Storage writes it.
        tied: groups of names in the state dict that share one tensor.
        files: the names of the other files in the companion folder.
        source: the fingerprint of the checkpoint folder it was made from; empty for a model given by name.
        flushed_to_zero: the share of its numbers, 0 to 1, that are zero here but not in the source.
        largest_relative_error: the largest among its non-zero numbers, against the source.
        versions: the versions of the packages that wrote it.
    """

    model_name: str
    dtype: str
    parameters: int
    bytes: int
    crc32c: str
    tied: list[list[str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    source: str = ""
    flushed_to_zero: float = 0.0
    largest_relative_error: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def describes(self, state_dict_path: str | os.PathLike) -> bool:
        """Whether the file or object at a path is, by its size and checksum, the one that was written.

        Raises:
            FileNotFoundError, PermissionError, StorageError: it could not be read.
        """
        return storage.size_and_crc32c(state_dict_path) == (self.bytes, self.crc32c)

    def is_of(self, model_name: str | None) -> bool:
        """Whether the state dict was made from the model of a name; None stands for any."""
        return model_name in (None, self.model_name)

    def check_model(self, state_dict_path: str | os.PathLike, model_name: str | None) -> None:
        """Checks that the state dict at a path was made from the model of a name; see `is_of`.

        Raises:
            WrongModelError: it was made from another model.
        """
        if not self.is_of(model_name):
            raise WrongModelError(
                f"{state_dict_path} was made from {self.model_name!r}, not from {model_name!r}: give that "
                "name, or the path of the other model's state dict"
            )


def companion_folder(state_dict_path: str | os.PathLike) -> str:
    """The folder beside a state dict: `gs://BUCKET/flan-t5-xl.pt` → `gs://BUCKET/flan-t5-xl`.

    Raises:
        ValueError: the path does not end with `NAME.pt`.
    """
    path = str(state_dict_path)
    folder = path.removesuffix(".pt")
    if folder == path or folder.endswith(("/", "\\")) or not folder:
        raise ValueError(f"{path!r} is not the path of a state dict: it must end with a name and .pt")
    if storage.is_cloud(path):
        storage.parse(path)
    return folder


def manifest_path(state_dict_path: str | os.PathLike) -> str:
    """Where the manifest of a state dict is.

    Raises:
        ValueError: as `companion_folder`.
    """
    return f"{companion_folder(state_dict_path)}/{MANIFEST}"


def read_manifest(state_dict_path: str | os.PathLike) -> Manifest:
    """Reads the manifest of a state dict, from this machine or from Cloud Storage.

    Raises:
        FileNotFoundError: there is none, or its bucket does not exist.
        PermissionError, StorageError: Cloud Storage could not be queried.
        ValueError: it is not a manifest.
    """
    path = manifest_path(state_dict_path)
    try:
        text = storage.read_bytes(path)
    except storage.BucketNotFoundError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist: {state_dict_path} was not written, or not completely, by "
            "`python -m helpers.load_state_dict`; run that again"
        ) from error
    try:
        values = json.loads(text)
        known = {entry.name for entry in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in values.items() if name in known})
        _check_values(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest ({error}): convert the model again") from error


def _check_values(manifest: Manifest) -> None:
    """Refuses values that no conversion writes: a bucket may be written to by others.

    Raises:
        ValueError, TypeError: one of them is not what it should be.
    """
    texts = (manifest.model_name, manifest.dtype, manifest.crc32c, manifest.source)
    if not all(isinstance(text, str) for text in texts) or manifest.dtype not in DTYPES:
        raise ValueError("a name, dtype or checksum is not one")
    if len(base64.b64decode(manifest.crc32c, validate=True)) != 4:
        raise ValueError("crc32c is not a checksum")
    for count in (manifest.parameters, manifest.bytes):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**63:
            raise ValueError("a size is not one")
    if not isinstance(manifest.files, list) or len(set(manifest.files)) != len(manifest.files):
        raise ValueError("files is not a list of names")
    for name in manifest.files:
        check_plain(name)
