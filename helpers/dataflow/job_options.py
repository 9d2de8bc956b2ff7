"""Defaults for a Dataflow job that serves a language model.

Dataflow's own defaults suit many small elements: a process for each vCPU, a dozen threads in each, up
to a hundred workers, each element exactly once. A language model is one large thing that uses every core.
Whatever the user gives on the command line is kept, also in `--experiments` and
`--dataflow_service_options`.

How Beam 2.77 reads the options: `apache_beam.options.pipeline_options`; how they reach the job:
`apache_beam.runners.dataflow.internal.apiclient`.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)

from helpers.dataflow.job_guard import CANCEL_AFTER_DRAINING_SECONDS, DRAIN_LABEL
from helpers.dataflow.worker_image import WORKER
from helpers.files.labels import SERIES, label_value, labels_in
from helpers.files.package import build_wheel
from helpers.load_state_dict import Manifest, read_companion, read_manifest
from helpers.load_state_dict.engine_file.description import ENGINE
from helpers.model_handler import AnsweringOptions
from helpers.model_handler.engines.packed_weights import ENGINE as PACKED
from helpers.models.dtypes import DTYPE_BYTES
from helpers.sizing import machine_types
from helpers.sizing.machine_types import MachineType, MachineTypeError
from helpers.sizing.services import HYPERDISK_FAMILIES, check_dataflow_worker
from helpers.sizing.sizes import COMPUTE_BYTES, SYSTEM_DISK_BYTES, Sizing, compute_dtype_on, size_model

# Room to grow under load, and a bound on what a forgotten job costs. Dataflow's own bound is 100 workers.
MAX_WORKERS = 4
# Dataflow's bundles are small, often of one message, and a thread works on each. As many as fill the largest
# batch wait for the model, and a few more read and write. A message that waits costs its own size, and is not
# acknowledged before it is answered: Dataflow extends its deadline meanwhile.
SPARE_THREADS = 4
MAX_THREADS = 300
MINIMUM_WORKER_DISK_GB = 30
WORKER_DISK_STEP_GB = 10
ACCELERATOR = "worker_accelerator"

# Allowances for what a worker without an image downloads and unpacks, and for a GPU's driver. Google's own
# examples give workers with a GPU 50 GB.
CPU_PACKAGES_BYTES, CUDA_PACKAGES_BYTES = 5_000_000_000, 25_000_000_000
DRIVER_BYTES = 20_000_000_000

# Dataflow's own limit, as a net below the guard's: it cancels the job. Google names it for batch jobs, and
# whether it holds for streaming ones a first real run has to show.
TIME_LIMIT = "max_workflow_runtime_walltime_seconds"

STALLED_MINUTES = 60
"""After so long in one step, loading a model included, Beam ends a worker's process, and its messages are
tried again in a new one: what hangs in a library's own code cannot be ended otherwise."""


class OptionError(ValueError):
    """Invalid or conflicting options; the message says what to do."""


def set_defaults(
    options: PipelineOptions,
    *,
    model_name: str,
    state_dict_path: str,
    answering: AnsweringOptions,
    exactly_once: bool = False,
    max_run_minutes: float | None = None,
    has_cuda: bool = True,
) -> None:
    """Sets the options that the user has left unset.

    Args:
        options: the job's options; changed in place.
        model_name: as for the pipeline.
        state_dict_path: `gs://.../NAME.pt`; its size and its model's determine the machine and its disk.
        answering: the device decides between machines with a GPU and without, and the largest batch on their
            memory.
        exactly_once: whether Dataflow removes duplicates, at more latency and cost.
        max_run_minutes: noted on the job, so that `helpers.dataflow.job_guard` and `job_list` can enforce it.
        has_cuda: whether workers without an image install CUDA's libraries with torch.

    Raises:
        OptionError: a GPU is asked for on a machine that has none, or an engine that does not compute on one
            on a machine that does; or the time is not above 0.
        WrongModelError: the state dict was made from another model.
        FileNotFoundError, PermissionError, StorageError: the state dict or its manifest cannot be read.
        MachineTypeError, SizingError: no machine is large enough, or the model cannot be sized.
    """
    if max_run_minutes is not None and not 0 < max_run_minutes < math.inf:
        raise OptionError(f"max_run_minutes is {max_run_minutes}: it must be above 0.")
    manifest = read_manifest(state_dict_path)
    manifest.check_model(state_dict_path, model_name)  # each worker would refuse it, and start again for ever
    worker = options.view_as(WorkerOptions)
    if worker.machine_type:
        check_dataflow_worker(worker.machine_type, has_own_image=bool(worker.sdk_container_image))
    else:
        on_gpu = wants_gpu(answering.device)
        sizing = size_for_serving(
            state_dict_path, manifest, on_gpu=on_gpu, **computing(answering), **answering.workload()
        )
        worker.machine_type = sizing.serve.machine.name
    if answering.engine == PACKED and answering.device != "cpu" and _has_gpu(worker.machine_type):
        raise OptionError(  # each worker would refuse it, and start again for ever
            f"engine {PACKED} computes on CPUs only, and {worker.machine_type} has a GPU: choose another of "
            "them, or device cpu."
        )
    cloud = options.view_as(GoogleCloudOptions)
    _set_accelerator(cloud, worker.machine_type, answering.device)
    _set_processes(options.view_as(DebugOptions), answering.max_batch_size)
    _set_delivery(cloud, exactly_once)
    _set_scaling(worker)
    if worker.element_processing_timeout_minutes is None:
        worker.element_processing_timeout_minutes = STALLED_MINUTES
    _check_disk_type(worker)
    worker.disk_size_gb = worker.disk_size_gb or disk_gb(
        manifest,
        worker.machine_type,
        computing(answering)["compute_dtype"],
        installs=not worker.sdk_container_image,
        has_cuda=has_cuda,
    )
    _set_time_limit(cloud, max_run_minutes)
    _set_labels(cloud, model_name, max_run_minutes)
    cloud.job_name = cloud.job_name or new_job_name(model_name)


def wants_gpu(device: str | None) -> bool:
    """Whether a GPU is asked for: `"cuda"`, or one of several, such as `"cuda:0"`."""
    return (device or "").lower().startswith("cuda")


def _has_gpu(machine_type: str) -> bool:
    return bool(getattr(machine_types.CATALOGUE.get(machine_type), "gpu", None))


def torch_threads(options: PipelineOptions) -> int | None:
    """How many torch threads each worker process gets; None for torch's own choice, one for each vCPU.

    With `--experiments=use_multiple_sdk_containers` there is already a process for each vCPU.
    """
    many = options.view_as(DebugOptions).lookup_experiment("use_multiple_sdk_containers")
    return 1 if many else None


def stage_helpers(
    options: PipelineOptions, folder: str, answering: AnsweringOptions, torch_index_url: str = ""
) -> None:
    """Sends this package along to the workers, as a wheel.

    Beam's container installs a wheel that is sent along over whatever version of it the image has, and after
    that those of its dependencies that the image has not. With the image of `helpers.dataflow.worker_image`
    that is none. Without an image, a requirements file goes along: each worker installs torch and the others
    when it starts, over the network, in the versions that this project is tested with rather than the newest.

    Args:
        options: of the job; changed in place.
        folder: for the files, which must be there until the job is submitted.
        answering: whether workers may use the engine that not all of them need.
        torch_index_url: the index of torch without CUDA; without it, torch comes from the usual one.
    """
    setup = options.view_as(SetupOptions)
    extras = [ENGINE] if may_use_ctranslate2(options, answering) else []
    setup.extra_packages = [*(setup.extra_packages or []), str(build_wheel(folder, extras))]
    if setup.requirements_file or options.view_as(WorkerOptions).sdk_container_image:
        return
    if _on_gpu(options, answering) and torch_index_url.rstrip("/").endswith("/cpu"):
        raise OptionError(
            f"torch from {torch_index_url} computes on no GPU: leave torch_index_url out, or name an "
            "index of torch with CUDA."
        )
    index = [f"--extra-index-url {torch_index_url}"] if torch_index_url else []
    path = Path(folder) / "requirements.txt"
    path.write_text("\n".join([*index, (WORKER / "requirements.txt").read_text()]))
    setup.requirements_file = str(path)
    # Beam would download every package here first, for the workers; it does not understand an index's line.
    setup.requirements_cache = "skip"


def may_use_ctranslate2(options: PipelineOptions, answering: AnsweringOptions) -> bool:
    """Whether workers on the job's machines use CTranslate2: because it was asked for, or because it is
    faster on CPUs without bfloat16. On a GPU it needs a library besides, so workers there use it unasked only
    if it is in their image."""
    machine_type = options.view_as(WorkerOptions).machine_type or ""
    computes_in_bfloat16 = machine_type.partition("-")[0] in machine_types.BFLOAT16_FAMILIES
    is_open = answering.engine in (None, "auto") and not _on_gpu(options, answering)
    return (
        answering.engine == ENGINE
        or answering.dtype == "int8"
        or (is_open and (answering.dtype == "float32" or not computes_in_bfloat16))
    )


def _on_gpu(options: PipelineOptions, answering: AnsweringOptions) -> bool:
    return wants_gpu(answering.device) or _has_gpu(options.view_as(WorkerOptions).machine_type or "")


def size_for_serving(
    state_dict_path: str,
    manifest: Manifest,
    *,
    on_gpu: bool = False,
    family: str | None = None,
    **settings: Any,
) -> Sizing:
    """Sizes a converted model by the config beside its state dict, without a hub.

    Args:
        state_dict_path: `.../NAME.pt`.
        manifest: its manifest.
        on_gpu: whether to choose a machine with a GPU, of the smallest kind that fits.
        family: the machine's family, rather than `on_gpu`.
        settings: of `size_model`: `batch_size`, `prompt_tokens`, `response_tokens`, `processes`, without
            which the largest batch of the default answering options is sized; `engine`, `compute_dtype`.

    Raises:
        FileNotFoundError, PermissionError, StorageError: the config cannot be read.
        MachineTypeError, SizingError: no machine is large enough, or the kind of model is not known.
    """
    settings = AnsweringOptions().workload() | settings
    families = [family] if family or not on_gpu else list(machine_types.ON_DEMAND_GPU_FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        config = read_companion(state_dict_path, manifest, "config.json")
        (Path(folder) / "config.json").write_bytes(config)
        for number, candidate in enumerate(families, 1):
            try:
                return size_model(folder, dtype=manifest.dtype, family=candidate, **settings)
            except MachineTypeError:
                if number == len(families):
                    raise
    raise AssertionError("unreachable: the last family returns or raises")


def computing(answering: AnsweringOptions) -> dict[str, str | None]:
    """By what and in what workers compute, as far as it was asked for: the arguments of `size_model`."""
    dtype = None if answering.dtype in (None, "auto") else answering.dtype
    engine = None if answering.engine in (None, "auto") else answering.engine
    return {"engine": engine or (ENGINE if dtype == "int8" else "torch"), "compute_dtype": dtype}


def disk_gb(
    manifest: Manifest,
    machine_type: str,
    compute_dtype: str | None = None,
    *,
    installs: bool = False,
    has_cuda: bool = True,
) -> int:
    """A worker's disk: the system, the state dict as stored, and two copies in the dtype to compute in.

    Two, because a new state dict is taken up while the old one serves.

    Args:
        manifest: of the state dict.
        machine_type: of the worker; one with a GPU also has its driver.
        compute_dtype: the dtype to compute in, where it was asked for.
        installs: whether the worker installs the packages when it starts.
        has_cuda: whether CUDA's libraries are among them.
    """
    family = machine_type.split("-")[0]
    computed = COMPUTE_BYTES[compute_dtype or compute_dtype_on(family, manifest.dtype)]
    held = manifest.bytes * (1 + 2 * computed / DTYPE_BYTES[manifest.dtype])
    has_cuda = has_cuda or _has_gpu(machine_type)
    held += (CUDA_PACKAGES_BYTES if has_cuda else CPU_PACKAGES_BYTES) if installs else 0
    held += DRIVER_BYTES if _has_gpu(machine_type) else 0
    steps = math.ceil((SYSTEM_DISK_BYTES + held) / 1e9 / WORKER_DISK_STEP_GB)
    return max(MINIMUM_WORKER_DISK_GB, steps * WORKER_DISK_STEP_GB)


def valid_job_name(text: str) -> str:
    """A name that Dataflow accepts: up to 63 lower-case letters, digits and dashes, the first a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"job-{name}".strip("-")
    return name[:63].rstrip("-")


def new_job_name(model_name: str) -> str:
    """A name for a job that nobody has named: the model's, and the time, which tells runs apart."""
    return valid_job_name(f"ask-{Path(model_name).name}")[:47].rstrip("-") + time.strftime("-%Y%m%d-%H%M%S")


def _set_accelerator(cloud: GoogleCloudOptions, machine_type: str, device: str | None) -> None:
    # Only as a service option: Dataflow refuses a job that has both this and a resource hint for it.
    service_options = cloud.dataflow_service_options or []
    if device == "cpu" or any(option.startswith(f"{ACCELERATOR}=") for option in service_options):
        return
    machine: MachineType | None = machine_types.CATALOGUE.get(machine_type)
    if machine is not None and machine.gpu:
        # G2, A2 and A3 machines have their GPUs built in, but Dataflow wants them named all the same. The
        # driver is installed when a worker starts: the images have none.
        accelerator = f"type:{machine.gpu};count:{machine.gpu_count};install-nvidia-driver"
        cloud.dataflow_service_options = [*service_options, f"{ACCELERATOR}={accelerator}"]
    elif wants_gpu(device):
        raise OptionError(
            f"--device=cuda needs a GPU, but the machine type {machine_type} is not known to have one: leave "
            "--machine_type out, name one of the g2, a2 or a3 families, or name the GPU to attach: "
            f"--dataflow_service_options='{ACCELERATOR}=type:nvidia-tesla-t4;count:1;install-nvidia-driver'."
        )


def _set_processes(debug: DebugOptions, max_batch_size: int) -> None:
    # Otherwise Dataflow starts a process for each vCPU, each with a torch thread for each vCPU.
    if not debug.lookup_experiment("use_multiple_sdk_containers"):
        debug.add_experiment("no_use_multiple_sdk_containers")
    if not debug.number_of_worker_harness_threads:
        debug.number_of_worker_harness_threads = min(max_batch_size + SPARE_THREADS, MAX_THREADS)


def _set_delivery(cloud: GoogleCloudOptions, exactly_once: bool) -> None:
    # Exactly-once is Dataflow's default. It stores every element between steps and shuffles to find
    # duplicates, although the responses topic is at-least-once in any case: readers recognise duplicates by
    # prompt_message_id.
    service_options = cloud.dataflow_service_options or []
    if not exactly_once and not any(option.startswith("streaming_mode_") for option in service_options):
        cloud.dataflow_service_options = [*service_options, "streaming_mode_at_least_once"]
    # All streaming jobs of Beam's Python SDK use it: workers' disks hold no state, and fewer workers suffice.
    cloud.enable_streaming_engine = True


def _check_disk_type(worker: WorkerOptions) -> None:
    family, disk = worker.machine_type.split("-")[0], worker.disk_type or ""
    if family in HYPERDISK_FAMILIES and disk.rpartition("/")[2].startswith("pd-"):
        raise OptionError(
            f"{family} machines take no Persistent Disk ({disk}): leave --worker_disk_type out, or end "
            "it with hyperdisk-balanced."
        )


def _set_time_limit(cloud: GoogleCloudOptions, max_run_minutes: float | None) -> None:
    service_options = cloud.dataflow_service_options or []
    if max_run_minutes is None or any(option.startswith(f"{TIME_LIMIT}=") for option in service_options):
        return
    seconds = math.ceil(max_run_minutes * 60 + CANCEL_AFTER_DRAINING_SECONDS)
    cloud.dataflow_service_options = [*service_options, f"{TIME_LIMIT}={seconds}"]


def _set_scaling(worker: WorkerOptions) -> None:
    # Each worker fetches and loads the model before it helps, so a stream begins with one.
    if worker.num_workers is None:
        worker.num_workers = 1
    if worker.max_num_workers is None and worker.autoscaling_algorithm != "NONE":
        worker.max_num_workers = max(MAX_WORKERS, worker.num_workers)


def _set_labels(cloud: GoogleCloudOptions, model_name: str, max_run_minutes: float | None) -> None:
    labels = {**SERIES, "step": "deploy", "model": label_value(Path(model_name).name)}
    if max_run_minutes is not None:
        labels[DRAIN_LABEL] = str(math.ceil(time.time() + max_run_minutes * 60))
    own = []
    for given in cloud.labels or []:
        try:
            own += labels_in(given)
        except ValueError as error:
            raise OptionError(f"--labels: {error}.") from error
    # The user's labels come last, and so win.
    cloud.labels = [f"{key}={value}" for key, value in labels.items()] + own
