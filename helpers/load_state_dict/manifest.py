"""A state dict's companion folder, and the manifest in it, which says what the state dict holds.

A state dict is `.../NAME.pt`; its companion folder is `.../NAME/`, with the model's config.json,
generation_config.json, tokenizer files and manifest.json. A worker needs nothing else.

All of these are one version, which takes the place of another at one moment (`versions` says how). Until it
has settled, some of its files may still be in `NAME/versions/`; the readers here find them.
"""

import base64
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields

from helpers.files import storage
from helpers.files.names import check_plain
from helpers.files.transfer import crc32c_of_bytes
from helpers.models.dtypes import DTYPES

MANIFEST = "manifest.json"

VERSIONS = "versions"
"""The folder in the companion folder for versions that are being put in place."""


class CompanionError(ValueError):
    """A companion file that is absent, or is not the one that its state dict was written with."""


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
        checksums: the CRC-32C of each of them, in base64; empty in manifests that were written before there
            were any.
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
    checksums: dict[str, str] = field(default_factory=dict)
    source: str = ""
    flushed_to_zero: float = 0.0
    largest_relative_error: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """A text that is the same only for the same weights with the same companion files."""
        content = (self.model_name, self.dtype, self.bytes, self.crc32c, sorted(self.checksums.items()))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def describes(self, state_dict_path: str | os.PathLike) -> bool:
        """Whether the file or object at a path is, by its size and checksum, the one that was written.

        Raises:
            FileNotFoundError, PermissionError, StorageError: it could not be read.
        """
        is_here = not storage.is_cloud(state_dict_path)
        if is_here and os.path.getsize(state_dict_path) != self.bytes:
            return False  # without reading it
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
    """Reads the manifest of the state dict that is at a path, on this machine or in Cloud Storage.

    Raises:
        FileNotFoundError: there is none, or its bucket does not exist.
        PermissionError, StorageError: Cloud Storage could not be queried.
        ValueError: it is not a manifest.
    """
    seen: object = ()  # nothing yet, which None is not
    while True:
        settled = settled_manifest(state_dict_path)
        if settled and _is_of_what_is_there(settled, state_dict_path):
            return settled
        for manifest, _ in staged_versions(state_dict_path):
            if _describes(manifest, state_dict_path):
                return manifest
        if settled == seen:  # else it was replaced meanwhile
            break
        seen = settled
    if settled:
        return settled  # of another state dict than the one that is there, which its readers will notice
    raise FileNotFoundError(
        f"{manifest_path(state_dict_path)} does not exist: {state_dict_path} was not written, or not "
        "completely, by `python -m helpers.load_state_dict`; run that again"
    )


def staged_versions(state_dict_path: str | os.PathLike) -> list[tuple[Manifest, str]]:
    """The versions of a state dict that are complete but for their weights, and the folder of each.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `read_manifest`.
    """
    folder = f"{companion_folder(state_dict_path)}/{VERSIONS}"
    found = []
    for name in storage.names_in(folder):
        version, _, rest = name.partition("/")
        if rest == MANIFEST:
            path = f"{folder}/{name}"
            try:
                found.append((parse_manifest(storage.read_bytes(path), path), f"{folder}/{version}"))
            except (FileNotFoundError, ValueError):  # it has just settled, or somebody else wrote it
                continue
    return found


def read_companion(state_dict_path: str | os.PathLike, manifest: Manifest, name: str) -> bytes:
    """The content of one of a version's companion files.

    Args:
        state_dict_path: the state dict's.
        manifest: what `read_manifest` says of it.
        name: one of the manifest's files.

    Raises:
        CompanionError: no file of that name is there with the checksum that the manifest has for it.
        FileNotFoundError, PermissionError, StorageError: as `read_manifest`.
    """
    expected = manifest.checksums.get(name)
    places = [companion_folder(state_dict_path)]
    for place in places:
        try:
            content = storage.read_bytes(f"{place}/{name}")
            if expected in (None, crc32c_of_bytes(content)):
                return content
        except storage.BucketNotFoundError:
            raise
        except FileNotFoundError:
            pass
        if place == places[0]:
            staged = staged_versions(state_dict_path)
            places += [folder for one, folder in staged if one.version == manifest.version]
    raise CompanionError(
        f"{places[0]}/{name} is not there, or is not the one that {state_dict_path} was written with: "
        "convert the model again, with --overwrite. To change its settings or its chat template, change them "
        "in its checkpoint"
    )


def settled_manifest(state_dict_path: str | os.PathLike) -> Manifest | None:
    """The manifest in a state dict's companion folder itself, whatever it describes; None if there is none.

    Raises:
        BucketNotFoundError, PermissionError, StorageError, ValueError: as `read_manifest`.
    """
    path = manifest_path(state_dict_path)
    try:
        return parse_manifest(storage.read_bytes(path), path)
    except storage.BucketNotFoundError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_of_what_is_there(manifest: Manifest, state_dict_path: str | os.PathLike) -> bool:
    """Whether a manifest goes with the state dict at a path, if there is one.

    A file on this machine is not read for that, unless a conversion was interrupted: where nothing is being
    put in place, there is no other manifest that could go with it.
    """
    if not storage.is_cloud(state_dict_path) and not staged_versions(state_dict_path):
        return True
    return _describes(manifest, state_dict_path, absent=True)


def _describes(manifest: Manifest, state_dict_path: str | os.PathLike, absent: bool = False) -> bool:
    try:
        return manifest.describes(state_dict_path)
    except storage.BucketNotFoundError:
        raise
    except FileNotFoundError:
        return absent


def parse_manifest(text: bytes, path: str) -> Manifest:
    """The manifest that a file holds.

    Args:
        text: the file's content.
        path: where it was found, for the error.

    Raises:
        ValueError: it is not a manifest.
    """
    try:
        values = json.loads(text)
        known = {entry.name for entry in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in values.items() if name in known})
        _check_values(manifest)
        return manifest
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest ({error}): convert the model again") from error


def _check_values(manifest: Manifest) -> None:
    """Refuses values that no conversion writes: a bucket may be written to by others.

    Raises:
        ValueError, TypeError: one of them is not what it should be.
    """
    texts = (manifest.model_name, manifest.dtype, manifest.crc32c, manifest.source)
    if not all(isinstance(text, str) for text in texts) or manifest.dtype not in DTYPES:
        raise ValueError("a name, dtype or checksum is not one")
    for count in (manifest.parameters, manifest.bytes):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**63:
            raise ValueError("a size is not one")
    if not isinstance(manifest.files, list) or len(set(manifest.files)) != len(manifest.files):
        raise ValueError("files is not a list of names")
    for name in manifest.files:
        check_plain(name)
    if not isinstance(manifest.checksums, dict) or {*manifest.checksums} not in (set(), {*manifest.files}):
        raise ValueError("the checksums are not those of its files")
    for checksum in (manifest.crc32c, *manifest.checksums.values()):
        if not isinstance(checksum, str) or len(base64.b64decode(checksum, validate=True)) != 4:
            raise ValueError(f"{checksum!r} is not a checksum")
