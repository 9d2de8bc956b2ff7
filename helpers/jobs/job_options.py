"""What a Dataflow job that serves a language model is asked for, where the user has not chosen.

Dataflow's own defaults are made for many small elements: a process for each vCPU, a dozen threads in each, up
to a hundred workers, each element exactly once. A language model is one large thing that uses every core.
Whatever a user gives on the command line is kept, in ``--experiments`` and ``--dataflow_service_options``
too.

How Beam 2.77 reads the options: ``apache_beam.options.pipeline_options``; how they reach the job:
``apache_beam.runners.dataflow.internal.apiclient``.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from pathlib import Path

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)

from helpers import machine_types
from helpers.files import storage
from helpers.jobs.job_guard import DRAIN_LABEL
from helpers.labels import label_value
from helpers.machine_types import MachineType, MachineTypeError
from helpers.package import build_wheel
from helpers.sizing import SYSTEM_DISK_BYTES, Sizing, compute_dtype_on, size_model
from helpers.state_dicts.manifest import Manifest, companion_folder, read_manifest

SERIES = {"series": "streaming-llm"}
"""The label by which jobs of these notebooks are found again; see ``helpers.jobs.job_list``."""

# Room to grow under load, and a bound on what a forgotten job costs. Dataflow's own bound is 100 workers.
MAX_WORKERS = 4
# A model answers one batch at a time. Further threads read, write and gather the next ones meanwhile.
HARNESS_THREADS = 4
# That a machine is chosen for, with the handler's own batches; longer prompts go in smaller ones.
WORKLOAD = {"batch_size": 32, "prompt_tokens": 512, "response_tokens": 256}
MINIMUM_DISK_GB = 30
DISK_STEP_GB = 10
ACCELERATOR = "worker_accelerator"


class OptionError(ValueError):
    """Options that do not go together; the message says what to do."""


def set_defaults(
    options: PipelineOptions,
    *,
    model_name: str,
    state_dict_path: str,
    device: str | None = None,
    max_response_tokens: int = 256,
    max_batch_size: int = 32,
    max_batch_tokens: int = 32_768,
    exactly_once: bool = False,
    max_run_minutes: float | None = None,
) -> None:
    """Chooses what the user has not chosen.

    Args:
        options: of the job; changed in place.
        model_name: as the pipeline's.
        state_dict_path: ``gs://.../NAME.pt``; its size and its model's decide on the machine and its disk.
        device: ``"cuda"`` asks for a machine with a GPU.
        max_response_tokens, max_batch_size, max_batch_tokens: as the handler's; they bound a batch's memory.
        exactly_once: whether Dataflow is to remove duplicates, for more latency and cost.
        max_run_minutes: noted on the job, for ``helpers.jobs.job_guard`` and ``job_list`` to hold it to.

    Raises:
        OptionError: a GPU is asked for on a machine that has none, the state dict is another model's, or the
            time is none.
        FileNotFoundError, PermissionError, StorageError: the state dict or its manifest cannot be read.
        MachineTypeError, SizingError: no machine is large enough, or the model is of no known kind.
    """
    if max_run_minutes is not None and not 0 < max_run_minutes < math.inf:
        raise OptionError(f"max_run_minutes is {max_run_minutes}: it must be above 0.")
    manifest = read_manifest(state_dict_path)
    if manifest.model_name != model_name:  # each worker would refuse it, and be started again for ever
        raise OptionError(
            f"{state_dict_path} was made from {manifest.model_name!r}, not from {model_name!r}: give that "
            "name, or the path of the other model's state dict."
        )
    worker = options.view_as(WorkerOptions)
    if not worker.machine_type:
        workload = workload_of(max_response_tokens, max_batch_size, max_batch_tokens)
        sizing = size_for_serving(state_dict_path, manifest, on_gpu=wants_gpu(device), **workload)
        worker.machine_type = sizing.serve.machine.name
    cloud = options.view_as(GoogleCloudOptions)
    _set_accelerator(cloud, worker.machine_type, device)
    _set_processes(options.view_as(DebugOptions))
    _set_delivery(cloud, exactly_once)
    _set_scaling(worker)
    worker.disk_size_gb = worker.disk_size_gb or disk_gb(manifest, worker.machine_type)
    _set_labels(cloud, model_name, max_run_minutes)
    if not cloud.job_name:
        # Two runs may be under way at a time; the name tells which is which.
        cloud.job_name = valid_job_name(f"ask-{Path(model_name).name}")[:47].rstrip("-")
        cloud.job_name += time.strftime("-%Y%m%d-%H%M%S")


def wants_gpu(device: str | None) -> bool:
    """Whether a GPU is asked for: ``"cuda"``, or one of several, as ``"cuda:0"``."""
    return (device or "").startswith("cuda")


def torch_threads(options: PipelineOptions) -> int | None:
    """Threads of torch for each process of a worker; None for torch's own choice, one for each vCPU.

    With ``--experiments=use_multiple_sdk_containers`` there is a process for each vCPU already.
    """
    many = options.view_as(DebugOptions).lookup_experiment("use_multiple_sdk_containers")
    return 1 if many else None


def stage_helpers(options: PipelineOptions, folder: str) -> None:
    """Sends this package along to the workers, as a wheel.

    Beam's container installs a wheel that is sent along over whatever version of it the image has, and after
    that those of its dependencies that the image has not. With the image of ``helpers.worker_image`` that is
    none. Without an image, each worker installs torch and the others when it starts, over the network.

    Args:
        options: of the job; changed in place.
        folder: for the wheel, which must be there until the job is submitted.
    """
    setup = options.view_as(SetupOptions)
    setup.extra_packages = [*(setup.extra_packages or []), str(build_wheel(folder))]


def workload_of(
    max_response_tokens: int = 256, max_batch_size: int = 32, max_batch_tokens: int = 32_768
) -> dict[str, int]:
    """What a machine is chosen for, from the handler's arguments of the same names."""
    largest = max_batch_tokens // (WORKLOAD["prompt_tokens"] + max_response_tokens)
    return {
        "batch_size": max(1, min(max_batch_size, largest)),
        "prompt_tokens": WORKLOAD["prompt_tokens"],
        "response_tokens": max_response_tokens,
    }


def size_for_serving(
    state_dict_path: str,
    manifest: Manifest,
    *,
    on_gpu: bool = False,
    family: str | None = None,
    **workload: int,
) -> Sizing:
    """The sizes of a model that was converted: by the config beside its state dict, with no hub.

    Args:
        state_dict_path: ``.../NAME.pt``.
        manifest: of it.
        on_gpu: whether to choose a machine with a GPU, of the smallest kind that fits.
        family: of the machine, rather than ``on_gpu``.
        workload: ``batch_size``, ``prompt_tokens``, ``response_tokens``, ``processes`` of ``size_model``;
            without them ``WORKLOAD``.

    Raises:
        FileNotFoundError, PermissionError, StorageError: the config cannot be read.
        MachineTypeError, SizingError: no machine is large enough, or the model is of no known kind.
    """
    workload = WORKLOAD | workload
    families = [family] if family or not on_gpu else list(machine_types.GPU_FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        config = storage.read_bytes(f"{companion_folder(state_dict_path)}/config.json")
        (Path(folder) / "config.json").write_bytes(config)
        for number, candidate in enumerate(families, 1):
            try:
                return size_model(folder, dtype=manifest.dtype, family=candidate, **workload)
            except MachineTypeError:
                if number == len(families):
                    raise
    raise AssertionError("unreachable: the last family returns or raises")


def disk_gb(manifest: Manifest, machine_type: str) -> int:
    """A worker's disk: the system, and the state dict as it comes and as it is computed in.

    The latter twice, because a new state dict is taken up while the old one serves.
    """
    family = machine_type.split("-")[0]
    widens = compute_dtype_on(family, manifest.dtype) == "float32" and manifest.dtype != "float32"
    held = manifest.bytes * (1 + 2 * (2 if widens else 1))
    steps = math.ceil((SYSTEM_DISK_BYTES + held) / 1e9 / DISK_STEP_GB)
    return max(MINIMUM_DISK_GB, steps * DISK_STEP_GB)


def valid_job_name(text: str) -> str:
    """A name that Dataflow takes: lower-case letters, digits and dashes, from a letter on, at most 63."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"job-{name}".strip("-")
    return name[:63].rstrip("-")


def _set_accelerator(cloud: GoogleCloudOptions, machine_type: str, device: str | None) -> None:
    # Only as a service option: Dataflow refuses a job that has it and a resource hint of the same kind.
    service_options = cloud.dataflow_service_options or []
    if device == "cpu" or any(option.startswith(f"{ACCELERATOR}=") for option in service_options):
        return
    machine: MachineType | None = machine_types.CATALOGUE.get(machine_type)
    if machine is not None and machine.gpu:
        # G2, A2 and A3 machines have their GPUs built in, and Dataflow wants them named nevertheless. The
        # driver is installed when a worker starts: the images have none.
        accelerator = f"type:{machine.gpu};count:{machine.gpu_count};install-nvidia-driver"
        cloud.dataflow_service_options = [*service_options, f"{ACCELERATOR}={accelerator}"]
    elif wants_gpu(device):
        raise OptionError(
            f"--device=cuda, and the machine type {machine_type} has no GPU that is known here: leave "
            "--machine_type out, name one of the g2, a2 or a3 families, or name the GPU to attach: "
            f"--dataflow_service_options='{ACCELERATOR}=type:nvidia-tesla-t4;count:1;install-nvidia-driver'."
        )


def _set_processes(debug: DebugOptions) -> None:
    # Otherwise Dataflow starts a process for each vCPU, each with a thread of torch for each vCPU.
    if not debug.lookup_experiment("use_multiple_sdk_containers"):
        debug.add_experiment("no_use_multiple_sdk_containers")
    debug.number_of_worker_harness_threads = debug.number_of_worker_harness_threads or HARNESS_THREADS


def _set_delivery(cloud: GoogleCloudOptions, exactly_once: bool) -> None:
    # Exactly-once is Dataflow's default. It writes every element down between steps and shuffles to find
    # duplicates, while the topic that the responses go to is at-least-once in any case: a reader tells
    # duplicates by prompt_message_id.
    service_options = cloud.dataflow_service_options or []
    if not exactly_once and not any(option.startswith("streaming_mode_") for option in service_options):
        cloud.dataflow_service_options = [*service_options, "streaming_mode_at_least_once"]
    # All streaming jobs of Beam's Python use it: the workers' disks hold no state, and fewer workers do.
    cloud.enable_streaming_engine = True


def _set_scaling(worker: WorkerOptions) -> None:
    # Each worker fetches and loads the model before it helps, so one is where a stream begins.
    if worker.num_workers is None:
        worker.num_workers = 1
    if worker.max_num_workers is None and worker.autoscaling_algorithm != "NONE":
        worker.max_num_workers = max(MAX_WORKERS, worker.num_workers)


def _set_labels(cloud: GoogleCloudOptions, model_name: str, max_run_minutes: float | None) -> None:
    labels = {**SERIES, "step": "deploy", "model": label_value(Path(model_name).name)}
    if max_run_minutes is not None:
        labels[DRAIN_LABEL] = str(math.ceil(time.time() + max_run_minutes * 60))
    # The user's come last, and so win.
    cloud.labels = [f"{key}={value}" for key, value in labels.items()] + (cloud.labels or [])
