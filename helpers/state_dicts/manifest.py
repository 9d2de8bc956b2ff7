"""What lies beside a state dict: its companion folder, and the manifest in it that tells what the file holds.

A state dict is `.../NAME.pt`; its companion folder is `.../NAME/`, with the model's config.json,
generation_config.json, tokenizer files and manifest.json. A worker needs nothing else.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields

from helpers.files import storage
from helpers.files.transfer import crc32c_of

__all__ = ["MANIFEST", "Manifest", "companion_folder", "crc32c_of", "manifest_path", "read_manifest"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a state dict holds, and how to tell that it arrived whole.

    Attributes:
        model_name: the name it was converted from.
        dtype: of its floating-point tensors: "float16", "bfloat16" or "float32".
        parameters: how many numbers it holds, each shared tensor counted once.
        bytes: the size of the `.pt` file.
        crc32c: of the `.pt` file, in base64, as Cloud Storage writes it.
        tied: groups of names in the state dict that share one tensor.
        files: the names of the other files in the companion folder.
        source: the fingerprint of the checkpoint folder that it was made from; empty for a model by name.
        flushed_to_zero: the share of its numbers, 0 to 1, that are zero here and not in the source.
        largest_relative_error: of its numbers that are not zero, against the source.
        versions: of the packages that wrote it.
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
        PermissionError, StorageError: Cloud Storage could not be asked.
        ValueError: it is not a manifest.
    """
    path = manifest_path(state_dict_path)
    try:
        text = storage.read_bytes(path)
    except storage.BucketNotFoundError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist: {state_dict_path} was not written, or not to its end, by "
            "`python -m helpers.load_state_dict`; run that again"
        ) from error
    try:
        values = json.loads(text)
        known = {entry.name for entry in fields(Manifest)}
        return Manifest(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest ({error}): convert the model again") from error
