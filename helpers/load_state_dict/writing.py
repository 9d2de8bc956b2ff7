"""Converts a checkpoint folder on this machine, tensor by tensor, to a state dict and companion folder."""

import importlib.metadata
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from helpers.files.transfer import crc32c_of
from helpers.files.whole_file import free_bytes, partial_path, whole_or_absent
from helpers.load_state_dict import versions
from helpers.load_state_dict.checkpoint import Checkpoint
from helpers.load_state_dict.checkpoint_keys import Weight, plan_state_dict
from helpers.load_state_dict.companion_files import check_tokenizer, files_to_copy, write_companion_files
from helpers.load_state_dict.manifest import Manifest
from helpers.load_state_dict.rounding import RoundingReport, rounded, rounded_dtype
from helpers.load_state_dict.state_dict_file import Place, StateDictFile
from helpers.models.architecture import architecture_of, read_config
from helpers.models.dtypes import torch_dtype

THREADS = min(8, os.cpu_count() or 1)

SPARE_BYTES = 64 * 2**20
"""Disk space that must be free besides the state dict's: for the companion folder."""


def write_state_dict(
    model_name: str, folder: Path, path: Path, dtype: str, source: str, progress: bool = True
) -> Manifest:
    """Writes a state dict, read back, and its companion folder, which appear at one moment.

    Args:
        model_name: for the manifest.
        folder: an ordinary checkpoint.
        path: a local path that ends with `.pt`, which only the caller is writing; an existing state dict is
            replaced.
        dtype: the name of a dtype.
        source: for the manifest.
        progress: whether to show a progress bar of the bytes written.

    Raises:
        ModelError, CheckpointError, RoundingError, OSError: as `helpers.load_state_dict.convert`.
    """
    model = architecture_of(read_config(folder)).empty_model()
    plan = plan_state_dict(Checkpoint(folder), model)
    companions = files_to_copy(folder)
    if not check_tokenizer(folder, companions):
        tqdm.write(f"No tokenizer in {folder}: to serve the model, put its files there and convert again")
    target = torch_dtype(dtype)
    places = [(w.spec.shape, rounded_dtype(w.spec.dtype, target), w.names) for w in plan.weights]
    size = sum(shape.numel() * kind.itemsize for shape, kind, _ in places)
    _check_disk(path, size)
    if plan.unused:
        tqdm.write(
            f"Not used from {folder}: {len(plan.unused)} tensors that the model has no place for, such as "
            f"{plan.unused[0]}"
        )
    with tempfile.TemporaryDirectory() as copy:
        files = write_companion_files(folder, companions, copy)
        with (
            whole_or_absent(path) as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar,
        ):
            state_dict = StateDictFile(file, plan.names, places)
            report = _write_weights(state_dict, plan.weights, target, bar)
            state_dict.finish()
            _read_back(file.name, plan.names, places)
            manifest = Manifest(
                model_name=model_name,
                dtype=dtype,
                parameters=report.numbers,
                bytes=os.path.getsize(file.name),
                crc32c=crc32c_of(file.name),
                tied=[weight.names for weight in plan.weights if len(weight.names) > 1],
                files=files,
                checksums={name: crc32c_of(Path(copy, name)) for name in files},
                source=source,
                flushed_to_zero=report.flushed_share,
                largest_relative_error=report.largest_relative_error,
                versions={
                    name: importlib.metadata.version(name)
                    for name in ("safetensors", "torch", "transformers")
                },
            )
            staged = versions.stage(path, manifest, copy, versions.LOCAL_WRITER)
        versions.settle(path, manifest, copy, staged, overwrite=True)
    return manifest


def _write_weights(
    state_dict: StateDictFile, weights: list[Weight], dtype: torch.dtype, bar: tqdm
) -> RoundingReport:
    def write(index: int) -> tuple[RoundingReport, int]:
        report = RoundingReport()
        weight = weights[index]
        chunks = rounded(weight.load(), dtype, weight.names[0], report, may_be_infinite=weight.is_buffer)
        size = state_dict.write(index, chunks)
        return report, size

    total = RoundingReport()
    torch_threads = torch.get_num_threads()
    # Several threads, each with one torch thread: for chunks this small, torch's own threads spend their time
    # waiting for each other, most of all on a machine that has other work too.
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = [pool.submit(write, index) for index in range(len(weights))]
        try:
            for task in as_completed(tasks):
                report, size = task.result()
                total += report
                bar.update(size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(torch_threads)
    return total


def _check_disk(path: Path, size: int) -> None:
    leftover, free = partial_path(path), free_bytes(path)
    if leftover.exists():
        free += leftover.stat().st_blocks * 512
    if free < size + SPARE_BYTES:
        raise OSError(
            f"{path} needs {(size + SPARE_BYTES) / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free in "
            f"{path.parent}: free some, or write to another disk (for gs:// paths: set XDG_CACHE_HOME to it)"
        )


def _read_back(file_name: str, names: list[str], places: list[Place]) -> None:
    """Reads the file as its users will. The checksums cover its bytes; this checks its structure."""
    found = torch.load(file_name, mmap=True, weights_only=True)
    if list(found) != names:
        raise RuntimeError(
            "the state dict does not have the names written to it: report this, with torch's version"
        )
    for shape, dtype, shared in places:
        same = {found[name].untyped_storage().data_ptr() for name in shared}
        if len(same) > 1 or any((found[name].shape, found[name].dtype) != (shape, dtype) for name in shared):
            raise RuntimeError(f"{shared[0]} did not come out as written: report this, with torch's version")
