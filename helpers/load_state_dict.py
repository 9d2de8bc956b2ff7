"""A model's checkpoint to an ordinary half-precision state dict, in constant memory.

    python -m helpers.load_state_dict local --model-name google/flan-t5-xl --state-dict-path flan-t5-xl.pt

reads the checkpoint one tensor at a time, rounds it, and writes it into its place in the file: a machine of
any size converts a model of any size. The state dict holds every key of the model's `state_dict()`, and any
`torch.load(weights_only=True)` reads it. Beside it comes its companion folder with all else that a worker
needs (`helpers.state_dicts.manifest`). `... vertex` runs the same in a Vertex AI custom job.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm

from helpers.files import storage
from helpers.models import resolve
from helpers.packaged_model import default_cache
from helpers.state_dicts.manifest import MANIFEST, Manifest, companion_folder, read_manifest

DTYPES = ("float16", "bfloat16", "float32")


def convert(
    model_name: str,
    state_dict_path: str | os.PathLike,
    dtype: str = "float16",
    *,
    overwrite: bool = False,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> Manifest:
    """Writes a model's state dict and its companion folder, or does nothing where they are in place already.

    The file appears at its path whole, after its companion folder, or not at all. A conversion to Cloud
    Storage works on local disk first; after an interruption, a rerun goes on from what is whole.

    Args:
        model_name: what `helpers.models.resolve` understands.
        state_dict_path: ends with `.pt`; a local path or `gs://BUCKET/NAME.pt`.
        dtype: of floating-point tensors: float16, bfloat16 or float32. Integers and booleans keep theirs.
        overwrite: whether to replace another state dict at the same path.
        progress: whether to show bars, and what is being done.
        checkpoint: a folder to read the weights from, local or `gs://`, for a machine on which `model_name`
            cannot be resolved.

    Returns:
        The manifest, as it stands in the companion folder.

    Raises:
        ValueError: an unknown dtype, or a path that is no state dict's.
        ModelError: no such model.
        CheckpointError: the checkpoint is incomplete, damaged or unsafe.
        RoundingError: a weight is NaN, or more than the dtype can hold.
        FileExistsError: there is another state dict at the path, and `overwrite` is False.
        FileNotFoundError, PermissionError: a bucket that does not exist, or must not be written to.
        OSError: not enough disk (said before starting), or another process is writing the same path.
    """
    path = str(state_dict_path)
    source = fingerprint(checkpoint or model_name)
    if manifest := state_dict_in_place(path, model_name, dtype, source, overwrite, progress):
        return manifest
    if storage.is_cloud(path):
        storage.check_writable(path)
        manifest = _convert_to_cloud(model_name, path, dtype, overwrite, progress, checkpoint, source)
    else:
        manifest = _convert_here(model_name, Path(path), dtype, progress, checkpoint, source)
    if progress:
        print(f"Wrote {path}. {describe(manifest)}")
    return manifest


def ensure(model_name: str, state_dict_path: str | os.PathLike, dtype: str = "float16") -> Manifest:
    """The manifest of a model's state dict: of the one that is there, in whatever dtype, or of a new one.

    Raises:
        ValueError: the state dict at the path is another model's.
        And as `convert`.
    """
    path = str(state_dict_path)
    if not storage.exists(path):
        return convert(model_name, path, dtype)
    manifest = read_manifest(path)
    if manifest.model_name != model_name:
        raise ValueError(
            f"{path} was made from {manifest.model_name!r}, not from {model_name!r}: choose another path"
        )
    print(f"{path} is in place. {describe(manifest)}")
    return manifest


def state_dict_in_place(
    path: str, model_name: str, dtype: str, source: str, overwrite: bool = False, progress: bool = True
) -> Manifest | None:
    """The manifest of the state dict at `path`, if that is whole and what would be converted; says so.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, PermissionError: as `convert`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}: choose one of these")
    companion_folder(path)
    manifest = _in_place(path, model_name, dtype, source)
    if manifest and progress:
        print(f"Nothing to do: {path} is in place and whole. {describe(manifest)}")
    if not manifest and not overwrite and storage.exists(path):
        raise FileExistsError(
            f"{path} exists already, and is not what {model_name} in {dtype} would be now: choose another "
            "path, or convert with --overwrite (overwrite=True)"
        )
    return manifest


def describe(manifest: Manifest) -> str:
    """One line on what a state dict holds, and what rounding did to it."""
    return (
        f"{manifest.parameters:,} parameters in {manifest.dtype}, {manifest.bytes / 1e9:.2f} GB, crc32c "
        f"{manifest.crc32c}; {manifest.flushed_to_zero:.2%} rounded to zero, the others by at most "
        f"{manifest.largest_relative_error:.2%}"
    )


def work_folder(state_dict_path: str) -> Path:
    """Where a state dict for Cloud Storage is made: always the same for the same path, so that a rerun finds
    what an interrupted one has done."""
    return default_cache() / "conversions" / hashlib.sha256(state_dict_path.encode()).hexdigest()[:16]


def fingerprint(model_or_folder: str | os.PathLike) -> str:
    """Tells a checkpoint folder from what it was before it was changed.

    Empty for a hub's or the packaged model, whose names tell; a folder in Cloud Storage is named by it.
    """
    if storage.is_cloud(model_or_folder):
        return str(model_or_folder).rstrip("/").rpartition("/")[2]
    folder = Path(model_or_folder).expanduser()
    if not folder.is_dir():
        return ""
    weights = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    stats = [(file.name, file.stat()) for file in [*weights, folder / "config.json"] if file.is_file()]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_place(path: str, model_name: str, dtype: str, source: str) -> Manifest | None:
    try:
        manifest = read_manifest(path)
        as_asked = (manifest.model_name, manifest.dtype, manifest.source) == (model_name, dtype, source)
        if as_asked and storage.size_and_crc32c(path) == (manifest.bytes, manifest.crc32c):
            return manifest
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    return None


def _convert_here(
    model_name: str,
    path: Path,
    dtype: str,
    progress: bool,
    checkpoint: str | os.PathLike | None,
    source: str,
) -> Manifest:
    folder = resolve(str(checkpoint or model_name))
    from helpers.state_dicts.conversion import (
        write_state_dict,  # not before: torch and transformers take seconds
    )

    return write_state_dict(model_name, folder, path, dtype, source, progress)


def _convert_to_cloud(
    model_name: str,
    path: str,
    dtype: str,
    overwrite: bool,
    progress: bool,
    checkpoint: str | os.PathLike | None,
    source: str,
) -> Manifest:
    work = work_folder(path)
    local = work / path.rpartition("/")[2]
    manifest = _in_place(str(local), model_name, dtype, source)
    if not manifest:
        if checkpoint and storage.is_cloud(checkpoint):
            checkpoint = storage.download_folder(str(checkpoint), work / f"checkpoint-{source}")
        manifest = _convert_here(model_name, local, dtype, progress, checkpoint, source)
    # The state dict comes last, and with it the whole; but over another one the manifest does: until then,
    # and if the upload is interrupted, the old manifest goes with the old state dict.
    late = [MANIFEST] if overwrite else []
    _upload_companions(local, path, [*manifest.files, *({MANIFEST} - {*late})])
    with tqdm(
        total=manifest.bytes, unit="B", unit_scale=True, desc=f"upload {local.name}", disable=not progress
    ) as bar:
        storage.upload(local, path, overwrite, bar.update)
    _upload_companions(local, path, late)
    shutil.rmtree(work)
    return manifest


def _upload_companions(local: Path, path: str, names: list[str]) -> None:
    for name in names:
        source, target = f"{companion_folder(local)}/{name}", f"{companion_folder(path)}/{name}"
        storage.upload(source, target, overwrite=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.load_state_dict", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="convert on this machine")
    _add_common_flags(local)
    local.add_argument("--checkpoint", help="folder to read the weights from, local or gs://")
    _add_vertex_flags(commands.add_parser("vertex", help="convert in a Vertex AI custom job"))
    values = vars(parser.parse_args(arguments))
    try:
        if values.pop("command") == "local":
            convert(**values)
        else:
            from helpers.state_dicts.vertex_conversion import (
                vertex,  # Google's client, which `local` does without
            )

            vertex(**values)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was left at the destination; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-name", required=True, help="a hub name, a folder, or the packaged model's name"
    )
    parser.add_argument("--state-dict-path", required=True, help="where to: NAME.pt or gs://BUCKET/NAME.pt")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="default: %(default)s")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another state dict at the same path"
    )


def _add_vertex_flags(parser: argparse.ArgumentParser) -> None:
    _add_common_flags(parser)
    parser.add_argument("--job-name", help="shown in the console; default: Load MODEL_NAME")
    parser.add_argument("--project", required=True, help="the Google Cloud project's id")
    parser.add_argument("--bucket", required=True, help="a bucket's name, for what the job needs")
    parser.add_argument("--location", required=True, help="a region, such as us-central1")
    parser.add_argument("--machine-type", help="default: what helpers.sizing finds sufficient")
    parser.add_argument("--disk-size-gb", type=int, help="at least 100; default: what helpers.sizing finds")
    parser.add_argument(
        "--image", help="a container image with Python 3.11 or newer", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--torch-index-url", default="", help="an index with torch without CUDA; default: the package index"
    )
    parser.add_argument("--timeout-minutes", type=int, help="default: 240", default=argparse.SUPPRESS)
    parser.add_argument("--service-account", help="that the job runs as; default: the project's own")
    parser.add_argument("--network", help="projects/NUMBER/global/networks/NAME")


if __name__ == "__main__":
    sys.exit(main())
