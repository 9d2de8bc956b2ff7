"""Converts a model in a Vertex AI custom job, for when this machine's disk or connection is too small.

The job runs `python -m helpers.load_state_dict local`, the same code as here, from a wheel of this
package that is first put into the bucket. Nothing needs to be built: the default image is Python's own, into
which the job installs what the package needs. (Vertex AI's prebuilt training images have Python 3.10, on
which transformers 5 does not run.)
"""

import math
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from helpers.files import storage
from helpers.files.cache import cache_folder
from helpers.files.labels import SERIES
from helpers.files.package import build_wheel
from helpers.files.whole_file import free_bytes
from helpers.load_state_dict.conversion import describe, fingerprint, state_dict_in_place
from helpers.load_state_dict.custom_job import CustomJobError, CustomJobGoesOnError, run_custom_job
from helpers.load_state_dict.engine_file.description import ENGINE, in_place
from helpers.load_state_dict.manifest import Manifest, read_manifest
from helpers.models.checkpoint_files import checkpoint_files
from helpers.sizing.services import check_vertex_training
from helpers.sizing.sizes import MINIMUM_CONVERT_DISK_GB, size_model
from helpers.sizing.this_machine import machine_memory_bytes

# Docker Hub's image of Python, from Google's mirror of it: Docker Hub itself limits anonymous pulls by
# address, which many projects share.
# https://cloud.google.com/artifact-registry/docs/pull-cached-dockerhub-images
IMAGE = "mirror.gcr.io/library/python:3.12-slim"

TIMEOUT_MINUTES = 240

# An image that has torch keeps it. Otherwise torch comes from the given index, or from the package index with
# CUDA, which is several GB larger. All names come as positional parameters, which a shell takes as they are,
# with their spaces and quotes.
SCRIPT = """\
set -e
python -c 'import torch' 2>/dev/null || test "$1" = - || python -m pip install --quiet --index-url "$1" torch
python -m pip install --quiet "$2"
shift 2
exec python -m helpers.load_state_dict local "$@"
"""


def where_to_convert(model_name: str, dtype: str = "float16") -> tuple[str, str]:
    """Whether this machine has what a conversion takes.

    Args:
        model_name: a hub name, a folder, or the packaged model's name.
        dtype: the state dict's dtype.

    Returns:
        "here" or "Vertex AI", and the reason in one sentence.

    Raises:
        ModelError, SizingError, MachineTypeError: as `helpers.sizing.size_model`.
    """
    sizing = size_model(model_name, dtype=dtype)
    is_here = Path(model_name).expanduser().is_dir()
    disk = sizing.weights_bytes[dtype] + (0 if is_here else sizing.weights_bytes["float32"])
    free_disk, memory = free_bytes(cache_folder()), machine_memory_bytes()
    place = "here" if disk < free_disk and sizing.convert.memory_bytes < memory else "Vertex AI"
    return place, (
        f"{model_name} takes {disk / 1e9:.1f} GB of disk and {sizing.convert.memory_bytes / 1e9:.1f} GB of "
        f"memory to convert; this machine has {free_disk / 1e9:.1f} GB free and {memory / 1e9:.1f} GB"
    )


def vertex(
    model_name: str,
    state_dict_path: str,
    *,
    project: str,
    bucket: str,
    location: str,
    job_name: str | None = None,
    machine_type: str | None = None,
    disk_size_gb: int | None = None,
    dtype: str = "float16",
    image: str = IMAGE,
    torch_index_url: str = "",
    timeout_minutes: int = TIMEOUT_MINUTES,
    service_account: str | None = None,
    network: str | None = None,
    overwrite: bool = False,
    engine_file: str | None = None,
) -> Manifest:
    """Converts a model in a Vertex AI custom job, waits for it, and verifies what it wrote.

    Does nothing where the state dict is in place already. While it waits, Ctrl-C asks whether to cancel the
    job; without a terminal to ask on, as in a notebook, Ctrl-C cancels it.

    Args:
        model_name: as for `helpers.load_state_dict.convert`; a local folder is uploaded to the bucket first.
        state_dict_path: `gs://BUCKET/NAME.pt`.
        project: the project that the job runs in.
        bucket: the name of a bucket for the job's files, best in the same region.
        location: a region, such as us-central1.
        job_name: shown in the console; "Load MODEL" by default.
        machine_type: one that Vertex AI's custom jobs can have; by default what `helpers.sizing` finds
            sufficient.
        disk_size_gb: in GB, at least 100; by default what sizing finds sufficient.
        dtype: float16, bfloat16 or float32.
        image: a container image with Python 3.11 or newer, and pip, that Vertex AI can pull.
        torch_index_url: an index with CPU-only torch, as PyTorch's installation page gives it; it saves the
            job a download of several GB.
        timeout_minutes: the time after which Vertex AI ends the job.
        service_account: the account the job runs as; by default the project's own for custom jobs. It needs
            the role roles/storage.objectUser on the bucket.
        network: `projects/NUMBER/global/networks/NAME`, to run in a VPC network.
        overwrite: whether to replace another state dict at the same path.
        engine_file: as for `convert`.

    Returns:
        The manifest of the state dict.

    Raises:
        ValueError: an invalid path, dtype, machine type, disk, timeout or model.
        FileExistsError: there is another state dict at the path, and `overwrite` is False.
        FileNotFoundError, PermissionError, StorageError: the bucket does not exist, or cannot be used.
        CustomJobError: the job could not be started, failed, was cancelled, or ran out of time.
    """
    bucket = bucket.removeprefix("gs://").rstrip("/")
    if not storage.is_cloud(state_dict_path):
        raise ValueError(
            f"{state_dict_path} is not in Cloud Storage: a job can only write to gs://BUCKET/NAME.pt"
        )
    if timeout_minutes < 1:
        raise ValueError(f"a timeout of {timeout_minutes} minutes is too short: give 1 or more")
    if disk_size_gb and disk_size_gb < MINIMUM_CONVERT_DISK_GB:
        raise ValueError(
            f"a disk of {disk_size_gb} GB is too small for Vertex AI: give {MINIMUM_CONVERT_DISK_GB} or more"
        )
    source = fingerprint(model_name)
    checkpoint = f"gs://{bucket}/checkpoints/{source}" if source else None
    manifest = state_dict_in_place(state_dict_path, model_name, dtype, source, overwrite)
    if manifest and (engine_file is None or in_place(state_dict_path, manifest, engine_file)):
        if checkpoint:  # left by a job that nobody waited for
            storage.delete_folder(checkpoint)
        return manifest
    if machine_type:
        check_vertex_training(machine_type)
    _check_not_gated(model_name)
    storage.check_writable(f"gs://{bucket}/packages")
    sizing = size_model(model_name, dtype=dtype)
    needed = sizing.convert
    machine_type = machine_type or needed.machine.name
    if not disk_size_gb:
        more = sizing.weights_bytes.get(engine_file, sizing.parameters) if engine_file else 0
        disk_size_gb = max(needed.disk_gb or 0, MINIMUM_CONVERT_DISK_GB) + math.ceil(more / 1e9)
    arguments = [
        torch_index_url or "-",
        _upload_wheel(bucket, [ENGINE] if engine_file else []),
        f"--model-name={model_name}",
        f"--state-dict-path={state_dict_path}",
        f"--dtype={dtype}",
    ]
    arguments += [f"--checkpoint={checkpoint}"] if checkpoint else []
    arguments += ["--overwrite"] if overwrite else []
    arguments += [f"--engine-file={engine_file}"] if engine_file else []
    worker_pool = {
        "machine_spec": {"machine_type": machine_type},
        "disk_spec": {"boot_disk_type": "pd-ssd", "boot_disk_size_gb": disk_size_gb},
        "replica_count": 1,
        "container_spec": {
            "image_uri": image,
            "command": ["sh", "-c", SCRIPT, "convert"],
            "args": arguments,
            # A log has no use for a bar that is redrawn ten times a second.
            "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, {"name": "TQDM_MININTERVAL", "value": "15"}],
        },
    }
    print(f"Converting {model_name} on Vertex AI: {machine_type}, {disk_size_gb} GB of disk")
    try:
        if checkpoint:
            _upload_checkpoint(Path(model_name).expanduser(), checkpoint)
        run_custom_job(
            job_name or f"Load {model_name}",
            worker_pool,
            project=project,
            location=location,
            bucket=bucket,
            labels={**SERIES, "step": "convert", "model": model_name, "dtype": dtype},
            timeout_minutes=timeout_minutes,
            service_account=service_account,
            network=network,
        )
    except CustomJobGoesOnError:
        checkpoint = None  # the job still reads it
        raise
    finally:
        if checkpoint:
            storage.delete_folder(checkpoint)
    manifest = read_manifest(state_dict_path)
    if not manifest.describes(state_dict_path):
        raise CustomJobError(
            f"{state_dict_path} does not match its manifest: convert again, with --overwrite"
        )
    print(f"Wrote {state_dict_path}, and its checksum is the manifest's. {describe(manifest)}")
    return manifest


def _check_not_gated(model_name: str) -> None:
    """Refuses a model that only this machine's token may download: the job has none, and a token in its
    environment could be read by all who may see the job.

    Raises:
        ValueError: the model is gated or private.
    """
    import huggingface_hub

    if Path(model_name).expanduser().is_dir() or not huggingface_hub.get_token():
        return
    try:
        found = huggingface_hub.HfApi().model_info(model_name, timeout=10)
    except Exception:  # no hub name, or no hub to ask: the job's log will tell
        return
    if found.gated or found.private:
        raise ValueError(
            f"{model_name} is gated or private, and a Vertex AI job has no token of yours: download "
            "it here, and give its folder, which is uploaded for the job; or convert it here, with `local`."
        )


def _upload_checkpoint(folder: Path, path: str) -> None:
    names = checkpoint_files(folder)
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="upload checkpoint") as bar:
        for name in names:
            storage.upload(folder / name, f"{path}/{name}", overwrite=True, progress=bar.update)


def _upload_wheel(bucket: str, extras: list[str]) -> str:
    """Uploads this package's wheel under a name made from its content; returns its path in a job."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(folder, extras)
        content = storage.crc32c_of(wheel).replace("/", "_").replace("+", "-").rstrip("=")
        name = f"packages/{content}-{wheel.stat().st_size}/{wheel.name}"
        storage.upload(wheel, f"gs://{bucket}/{name}")
    return f"/gcs/{bucket}/{name}"
