"""Converts a model's checkpoint to an ordinary half-precision state dict, in constant memory.

    python -m helpers.load_state_dict local --model-name google/flan-t5-xl --state-dict-path flan-t5-xl.pt

reads the checkpoint one tensor at a time, rounds it, and writes it to its place in the file, so a machine of
any size can convert a model of any size. The state dict holds every key of the model's `state_dict()`, and
any `torch.load(weights_only=True)` reads it. Its companion folder, beside it, holds everything else that a
worker needs (`helpers.load_state_dict.manifest`). `... vertex` does the same in a Vertex AI custom job.
"""

import hashlib
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from helpers.files import storage
from helpers.files.cache import cache_folder, private_folder
from helpers.files.whole_file import FileBusyError, is_busy, only_writer, whole_or_absent
from helpers.load_state_dict import versions
from helpers.load_state_dict.manifest import Manifest, companion_folder, read_manifest
from helpers.models import resolve
from helpers.models.checkpoint_files import checkpoint_files, companion_files, is_weights
from helpers.models.dtypes import DTYPES

WAIT_SECONDS = 3600
"""How long to wait for another process that converts to the same path in Cloud Storage, such as a second
notebook that was started at the same time."""


def convert(
    model_name: str,
    state_dict_path: str | os.PathLike,
    dtype: str = "float16",
    *,
    overwrite: bool = False,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
    engine_file: str | None = None,
) -> Manifest:
    """Writes a model's state dict and its companion folder, unless they are in place already.

    State dict and companion folder take the place of others at one moment, or not at all; `versions` says
    how. A conversion to Cloud Storage works on local disk first; after an interruption, a rerun continues
    from what is complete.

    Args:
        model_name: what `helpers.models.resolve` understands.
        state_dict_path: ends with `.pt`; a local path or `gs://BUCKET/NAME.pt`.
        dtype: for floating-point tensors: float16, bfloat16 or float32. Integers and booleans keep theirs.
        overwrite: whether to replace another state dict at the same path.
        progress: whether to show progress bars and messages.
        checkpoint: a folder to read the weights from, local or `gs://`, for a machine on which `model_name`
            cannot be resolved; one in Cloud Storage for a state dict in Cloud Storage.
        engine_file: what CTranslate2 is to compute in, of `engine_file.ENGINE_DTYPES`: its file is then made
            too, and put beside the state dict, so that workers need not make it. None makes none.

    Returns:
        The manifest, as it stands in the companion folder.

    Raises:
        ValueError: an unknown dtype, or a path that is not one for a state dict.
        ModelError: no such model.
        EngineError: the engine is not installed, or cannot take the model; the state dict is in place.
        CheckpointError: the checkpoint is incomplete, damaged or unsafe.
        RoundingError: a weight is NaN, or more than the dtype can hold.
        FileExistsError: there is another state dict at the path, and `overwrite` is False.
        FileNotFoundError, PermissionError: the bucket does not exist, or may not be written to.
        ReplacedError: another conversion has written the path meanwhile; what is there is the other's.
        OSError: not enough disk space (raised before starting), or another process is writing the same path.
    """
    path = str(state_dict_path)
    source = fingerprint(checkpoint or model_name)
    if manifest := state_dict_in_place(path, model_name, dtype, source, overwrite, progress):
        if storage.is_cloud(path) and work_folder(path).exists():  # of a conversion that was interrupted
            with suppress(FileBusyError), only_writer(work_folder(path) / "upload"):
                _delete_work(path)
        _make_engine_file(path, engine_file, progress)
        return manifest
    if storage.is_cloud(path):
        storage.check_writable(path)
        manifest = _convert_to_cloud(
            model_name, path, dtype, overwrite, progress, checkpoint, source, engine_file
        )
    else:
        with versions.writing(path):
            if storage.exists(path) and not overwrite:
                raise versions.replaced(path)
            manifest = _convert_here(model_name, Path(path), dtype, progress, checkpoint, source)
        _tell(path, manifest, progress)
        _make_engine_file(path, engine_file, progress)
    return manifest


def ensure(model_name: str, state_dict_path: str | os.PathLike, dtype: str = "float16") -> Manifest:
    """The manifest of a model's state dict: the one that is there, whatever its dtype, or else a new one.

    Raises:
        WrongModelError: the state dict at the path was made from another model.
        Others as for `convert`.
    """
    path = str(state_dict_path)
    if not storage.exists(path):
        return convert(model_name, path, dtype)
    manifest = read_manifest(path)
    manifest.check_model(path, model_name)
    print(f"{path} is in place. {describe(manifest)}")
    return manifest


def state_dict_in_place(
    path: str, model_name: str, dtype: str, source: str, overwrite: bool = False, progress: bool = True
) -> Manifest | None:
    """The manifest of the state dict at `path`, if it is whole and as requested; prints a note if so.

    Where its conversion was interrupted while it moved the companion files to their places, this goes on
    with that.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, PermissionError: as `convert`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}: choose one of these")
    companion_folder(path)
    manifest = _in_place(path, model_name, dtype, source)
    if manifest:
        versions.finish(path, manifest)
    if manifest and progress:
        print(f"Nothing to do: {path} is in place and whole. {describe(manifest)}")
    if not manifest and not overwrite and storage.exists(path):
        raise FileExistsError(
            f"{path} already exists, but is not what {model_name} converted to {dtype} would be now: choose "
            "another path, or convert with --overwrite (overwrite=True)"
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
    return cache_folder("conversions") / hashlib.sha256(state_dict_path.encode()).hexdigest()[:16]


def fingerprint(model_or_folder: str | os.PathLike) -> str:
    """A text that changes whenever a checkpoint folder is changed.

    Empty for hub models and the packaged one, whose names suffice; a folder in Cloud Storage is named after
    it.
    """
    if storage.is_cloud(model_or_folder):
        return str(model_or_folder).rstrip("/").rpartition("/")[2]
    folder = Path(model_or_folder).expanduser()
    if not folder.is_dir():
        return ""
    weights = (name for name in checkpoint_files(folder) if is_weights(name))
    names = sorted({*weights, *companion_files(folder)})
    stats = [(name, (folder / name).stat()) for name in names]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_place(path: str, model_name: str, dtype: str, source: str) -> Manifest | None:
    try:
        manifest = read_manifest(path)
        as_asked = (manifest.model_name, manifest.dtype, manifest.source) == (model_name, dtype, source)
        if as_asked and manifest.describes(path):
            versions.check_companions(path, manifest)
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
    from helpers.load_state_dict.writing import write_state_dict  # torch and transformers take seconds

    return write_state_dict(model_name, folder, path, dtype, source, progress)


def _convert_to_cloud(
    model_name: str,
    path: str,
    dtype: str,
    overwrite: bool,
    progress: bool,
    checkpoint: str | os.PathLike | None,
    source: str,
    engine_file: str | None,
) -> Manifest:
    work = private_folder(work_folder(path))
    local = work / path.rpartition("/")[2]
    if progress and is_busy(work / "upload"):
        print(f"Another process of this machine is converting to {path}: waiting until it has ended")
    with only_writer(work / "upload", WAIT_SECONDS):
        private_folder(work)  # the other one may have removed it
        if manifest := state_dict_in_place(path, model_name, dtype, source, overwrite, progress):
            _delete_work(path)
            return manifest
        manifest = _in_place(str(local), model_name, dtype, source)
        if manifest:
            versions.finish(local, manifest)
        else:
            if checkpoint and storage.is_cloud(checkpoint):
                checkpoint = storage.download_folder(
                    str(checkpoint), work / f"checkpoint-{source}", sub_folders=True
                )
            manifest = _convert_here(model_name, local, dtype, progress, checkpoint, source)
        _upload(local, path, manifest, overwrite, progress)
        _tell(path, manifest, progress)
        _make_engine_file(path, engine_file, progress, local)
        _delete_work(path)
    return manifest


def _make_engine_file(path: str, dtype: str | None, progress: bool, local: Path | None = None) -> None:
    if dtype:
        from helpers.load_state_dict.engine_file import put_beside  # torch takes seconds

        put_beside(path, dtype, local=local, progress=progress)


def _tell(path: str, manifest: Manifest, progress: bool) -> None:
    if progress:
        print(f"Wrote {path}. {describe(manifest)}")


def _upload(local: Path, path: str, manifest: Manifest, overwrite: bool, progress: bool) -> None:
    companions = companion_folder(local)
    staged = versions.stage(path, manifest, companions, _writer(local.parent))
    try:
        with tqdm(
            total=manifest.bytes, unit="B", unit_scale=True, desc=f"upload {local.name}", disable=not progress
        ) as bar:
            storage.upload(local, path, overwrite, bar.update)
    except FileExistsError:
        # Where only the answer to the upload was lost, its repetition is told that the object is there.
        if not manifest.describes(path):
            storage.delete_folder(staged)
            raise
    versions.settle(path, manifest, companions, staged, overwrite)


def _writer(work: Path) -> str:
    """A name for the conversions that use a work folder: the same after an interruption."""
    file = work / "writer"
    if not file.exists():
        with whole_or_absent(file) as new:
            new.write(uuid.uuid4().hex[:8].encode())
    return file.read_text()


def _delete_work(path: str) -> None:
    """Deletes what was needed for a conversion to Cloud Storage, here and there."""
    work = work_folder(path)
    versions.delete_abandoned(path, _writer(work))
    shutil.rmtree(work)
