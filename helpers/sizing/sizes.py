"""Which machine a model needs: to convert its checkpoint, and to serve it.

There are two methods. `project` is what this package does: a checkpoint is converted tensor by tensor, in
memory that does not grow with the model, and served from a mapped half-precision file. `sample` is the rule
of thumb of Google's published sample: 4 bytes a parameter to serve and 6 to convert.

Sizes are in bytes; a machine's GB are 2**30 bytes, as Google counts them, and all other GB are 10**9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.models import load_config
from helpers.models.dtypes import DTYPE_BYTES, dtype_name
from helpers.sizing import machine_types, services
from helpers.sizing.machine_types import MachineType, MachineTypeError
from helpers.sizing.model_memory import (
    ParameterCount,
    SizingError,
    activation_bytes,
    dtype_bytes,
    kv_cache_bytes,
    packed_bytes,
    parameter_count,
)

METHODS = ("project", "sample")

ENGINES = {
    "torch": tuple(DTYPE_BYTES),
    "torch_packed": ("float32", "bfloat16"),
    "ctranslate2": ("float32", "bfloat16", "int8"),
}
"""What the project serves with, and the dtypes that each computes in."""

COMPUTE_BYTES = DTYPE_BYTES | {"int8": 1}
"""Bytes of a weight in memory, by the dtype to compute in."""

# The workload that is sized unless another is given. Prompts of 512 tokens are what flan-t5 was made for.
BATCH_SIZE = 1
PROMPT_TOKENS = 512
RESPONSE_TOKENS = 256

# Memory of a process before any model is in it, measured on Linux with Python 3.11, torch 2.13 (CPU, 2
# threads), transformers 5.23 and apache-beam 2.77. To measure it on your machine:
# python -m helpers.measuring --overhead
WORKER_BYTES = 605_000_000  # Beam's worker with torch and transformers, after its first generation
# helpers.load_state_dict at work; the same for a model of any size. Measured between 385 and 421 MB,
# depending on which tensors happen to be in progress at once.
CONVERTER_BYTES = 403_000_000
SCRIPT_BYTES = 375_000_000  # a script with torch and transformers, as the sample converts

# The part of these that is library pages once everything is imported. How many are resident depends on the
# page cache, not on the model: a worker had 159 to 220 MB with the same files, more when they had just been
# written. helpers.measuring.memory always counts this many.
LIBRARY_BYTES = {"convert": 84_000_000, "serve": 159_000_000}

# An allowance, not measured here: the driver's context and torch's kernels on the GPU, and as much again on
# the host. It differs by driver and card.
CUDA_CONTEXT_BYTES = 700_000_000

# Also an allowance: the operating system's image, and the unpacked container image with torch.
SYSTEM_DISK_BYTES = 25_000_000_000
MINIMUM_CONVERT_DISK_GB = 100  # Vertex AI's minimum for a boot disk
CONVERT_DISK_STEP_GB = 50

# The families to convert and to serve on. E2 is the cheapest. N4 serves Dataflow jobs that use Streaming
# Engine, and starts at 2 vCPUs.
FAMILIES = {"project": ("e2", "n4"), "sample": ("e2", "n2")}

# Left free for the operating system and for Dataflow's own processes. The published tables leave nothing
# free, but count a machine's GB as 10**9 bytes, 7 % less than it has.
HEADROOM = {"project": 0.15, "sample": 1 - 10**9 / machine_types.GIB}

# An allowance as well, for Dataflow's own processes on a worker: the runner's harness, containers, logging.
# Google's sample went from 8 to 16 GB for its smallest models because of "the rest of the memory used by each
# worker". To be measured on a first real worker: docs/first_real_run.md.
SERVICE_BYTES = {"project": 2_000_000_000, "sample": 0}


@dataclass(frozen=True)
class Phase:
    """What converting or serving needs.

    Attributes:
        memory_bytes: the memory that the machine is chosen by (on a GPU machine, the GPU's).
        parts: what memory_bytes is made of.
        peak_bytes: the most that the process is predicted to hold at a time, comparable to what
            `helpers.measuring.memory` measures. With the project's method it is memory_bytes.
        machine: the smallest that fits.
        disk_gb: the boot disk; None for serving.
    """

    memory_bytes: int
    parts: dict[str, int]
    peak_bytes: int
    machine: MachineType
    disk_gb: int | None = None


@dataclass(frozen=True)
class Sizing:
    """A model's sizes and the machines it needs.

    Attributes:
        parameters: how many the published checkpoint has, counting shared ones once.
        weights_bytes: the size of the weights in each dtype.
        dtype: the state dict's dtype.
        compute_dtype: the dtype of the weights in memory while serving: float32 where the machines have no
            half-precision arithmetic, unless another was asked for.
        engine: what serves; see `ENGINES`.
        cost_per_hour: what one serving machine costs, in the currency of the price given; None without a
            price.
    """

    model_name: str
    method: str
    dtype: str
    compute_dtype: str
    batch_size: int
    prompt_tokens: int
    response_tokens: int
    headroom: float
    parameters: int
    weights_bytes: dict[str, int]
    convert: Phase
    serve: Phase
    engine: str
    cost_per_hour: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract of `--json`, as plain values."""
        return {
            "model_name": self.model_name,
            "parameters": self.parameters,
            "weights_bytes": self.weights_bytes,
            "convert": _phase_json(self.convert),
            "serve": _phase_json(self.serve),
            "method": self.method,
            "dtype": self.dtype,
            "engine": self.engine,
            "compute_dtype": self.compute_dtype,
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "headroom": self.headroom,
            "cost_per_hour": self.cost_per_hour,
        }


def size_model(
    model_name: str,
    *,
    dtype: str = "float16",
    method: str = "project",
    batch_size: int = BATCH_SIZE,
    prompt_tokens: int = PROMPT_TOKENS,
    response_tokens: int = RESPONSE_TOKENS,
    processes: int = 1,
    family: str | None = None,
    convert_family: str | None = None,
    headroom: float | None = None,
    price_per_hour: float | Mapping[str, float] | None = None,
    engine: str | None = None,
    compute_dtype: str | None = None,
) -> Sizing:
    """Sizes a model from its config: no weights are downloaded, and for the bundled configs nothing at all.

    Args:
        model_name: a folder, a hub name, or the packaged model; see `helpers.models.load_config`.
        dtype: the state dict's dtype: `float16`, `bfloat16` or `float32`.
        method: `project` or `sample`.
        batch_size: prompts generated together.
        prompt_tokens: the length of the longest prompt.
        response_tokens: the most tokens to generate per prompt.
        processes: workers on the machine. They share weights that engine torch maps; all else is counted
            once per process.
        family: the machine family to serve on, which may be a GPU family; by default `FAMILIES`.
        convert_family: the machine family to convert on.
        headroom: share of the machine's memory left free; `HEADROOM` by default. `SERVICE_BYTES` come on top.
        price_per_hour: the serving machine's price, or prices by machine type.
        engine: what serves, with the project's method: one of `ENGINES`; by default torch, unless it is to
            compute in int8.
        compute_dtype: what it computes in; by default what machines of the family are fast in, and float32
            with CTranslate2.

    Raises:
        ModelError: no such model.
        SizingError: a model of an unsupported kind, or a workload that makes no sense.
        MachineTypeError: an unknown family, or no machine of it is large enough.
    """
    _check_workload(method, batch_size, prompt_tokens, response_tokens, processes)
    stored_bytes = dtype_bytes(dtype)
    config = load_config(model_name)
    count = parameter_count(config)
    default_convert, default_serve = FAMILIES[method]
    family = family or default_serve
    headroom = HEADROOM[method] if headroom is None else headroom

    download = count.checkpoint * (4 if method == "sample" else _published_bytes(config))
    disk_gb = disk_size_gb(download + count.checkpoint * stored_bytes)
    memory, parts, peak = _convert(method, count, stored_bytes)
    machine = _converting_machine(memory, method, convert_family or default_convert, headroom)
    convert = Phase(memory, parts, peak, machine, disk_gb)

    if method == "sample" and (engine or compute_dtype):
        raise SizingError("The sample's method knows no engines: leave them out, or the method.")
    engine = engine or ("ctranslate2" if compute_dtype == "int8" else "torch")
    if method == "sample" or (engine == "ctranslate2" and family not in machine_types.GPU_FAMILIES):
        compute_dtype = compute_dtype or "float32"
    compute_dtype = compute_dtype or compute_dtype_on(family, dtype)
    _check_engine(engine, compute_dtype)
    if engine == "torch_packed" and family in machine_types.GPU_FAMILIES:
        raise SizingError(
            "torch_packed computes on CPUs only: choose another engine, or a family without GPUs."
        )
    # Where weights are 8-bit integers, all else is float32.
    numbers = "float32" if compute_dtype == "int8" else compute_dtype
    workload = (batch_size, prompt_tokens, response_tokens, numbers)
    cache, activations = kv_cache_bytes(config, *workload), activation_bytes(config, *workload)
    if method == "sample":
        weights = count.checkpoint * 4
        loading = count.built * 4 + count.checkpoint * stored_bytes
        peak = processes * (WORKER_BYTES + max(loading, count.built * 4 + cache + activations))
        serve = Phase(
            weights, {"weights": weights}, peak, _machine(method, weights, family, headroom, processes)
        )
    else:
        weights = count.checkpoint * COMPUTE_BYTES[compute_dtype]
        each = {"KV cache": cache, "activations": activations}
        if family in machine_types.GPU_FAMILIES:
            parts = {"weights": processes * weights}  # processes do not share GPU memory
            each["CUDA context"] = CUDA_CONTEXT_BYTES
        else:
            # Torch maps the weights from a file, which processes share; the others have their own.
            parts = {"weights": weights if engine == "torch" else processes * weights}
            each["Python worker"] = WORKER_BYTES
        parts |= {name: processes * size for name, size in each.items()}
        if engine == "ctranslate2" and family in machine_types.INTEL_FAMILIES:
            # Intel's processors, or perhaps: the largest of the two moments counts.
            copy, left = packed_bytes(config, count.checkpoint, compute_dtype)
            serving = sum(parts.values()) + processes * left
            loading = processes * (WORKER_BYTES + weights + copy)
            parts["weights packed"] = max(serving, loading) - sum(parts.values())
        memory = sum(parts.values())
        serve = Phase(memory, parts, memory, _machine(method, memory, family, headroom, processes))

    return Sizing(
        model_name=model_name,
        method=method,
        dtype=dtype,
        compute_dtype=compute_dtype,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        headroom=headroom,
        parameters=count.checkpoint,
        weights_bytes={name: count.checkpoint * size for name, size in DTYPE_BYTES.items()},
        convert=convert,
        serve=serve,
        cost_per_hour=_price(price_per_hour, serve.machine),
        engine=engine,
    )


def compute_dtype_on(family: str, dtype: str) -> str:
    """The dtype in which machines of a family compute with, and so hold, a state dict of `dtype`.

    Half precision is computed as bfloat16 where every machine of the family has the instructions for it, and
    as float32 elsewhere, because emulated half precision is slower than float32.
    """
    if dtype != "float32" and family in machine_types.BFLOAT16_FAMILIES:
        return "bfloat16"
    return "float32"


def disk_size_gb(files_bytes: int) -> int:
    """The boot disk to convert on: the download, the output and the system, in steps of 50 GB."""
    needed = (files_bytes + SYSTEM_DISK_BYTES) / 1e9
    return max(MINIMUM_CONVERT_DISK_GB, math.ceil(needed / CONVERT_DISK_STEP_GB) * CONVERT_DISK_STEP_GB)


def _convert(method: str, count: ParameterCount, stored_bytes: int) -> tuple[int, dict[str, int], int]:
    """For converting: the memory to choose the machine by, its parts, and the peak."""
    if method == "project":
        return CONVERTER_BYTES, {"converter": CONVERTER_BYTES}, CONVERTER_BYTES
    parts = {"float32 copy": count.checkpoint * 4, "converted copy": count.checkpoint * stored_bytes}
    # Today's transformers maps safetensors: the float32 copy is file pages that are read once and that the
    # system may drop, so a process short of memory can do without them. The rule of thumb counts them.
    return sum(parts.values()), parts, SCRIPT_BYTES + parts["converted copy"]


def _converting_machine(memory: int, method: str, family: str, headroom: float) -> MachineType:
    """The smallest machine of a family that a Vertex AI custom job can have.

    The sample's table was not checked against that: it has e2-standard-2, where Vertex AI takes
    e2-standard-4.
    """
    if method == "sample":
        return machine_types.smallest(memory, family=family, headroom=headroom)
    if family not in services.VERTEX_TRAINING_FAMILIES and family in machine_types.CPU_FAMILIES:
        raise MachineTypeError(
            f"Vertex AI's custom jobs have no {family} machines: convert on e2 or n2, whatever serves."
        )
    return machine_types.smallest(memory, family=family, headroom=headroom, among=services.VERTEX_TRAINING)


def _machine(method: str, memory: int, family: str, headroom: float, processes: int) -> MachineType:
    """The smallest machine of a family to serve on, by its own memory or by its GPU's."""
    if family not in machine_types.GPU_FAMILIES:
        return machine_types.smallest(memory + SERVICE_BYTES[method], family=family, headroom=headroom)
    host = processes * (WORKER_BYTES + CUDA_CONTEXT_BYTES) + SERVICE_BYTES[method]
    return machine_types.smallest_gpu(memory, family=family, headroom=headroom, host_memory_bytes=host)


def _published_bytes(config) -> int:
    """Bytes per number in the published checkpoint; float32 where the config does not say."""
    name = dtype_name(getattr(config, "dtype", None) or "float32")
    return DTYPE_BYTES.get(name, 4)


def _check_engine(engine: str, compute_dtype: str) -> None:
    if engine not in ENGINES:
        raise SizingError(f"Unknown engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    if compute_dtype not in ENGINES[engine]:
        raise SizingError(
            f"{engine} does not compute in {compute_dtype!r}: use {', '.join(ENGINES[engine])}."
        )


def _check_workload(method: str, *counts: int) -> None:
    if method not in METHODS:
        raise SizingError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    for name, count in zip(
        ("batch_size", "prompt_tokens", "response_tokens", "processes"), counts, strict=True
    ):
        if not isinstance(count, int) or count < 1:
            raise SizingError(f"{name}={count}: give a whole number of at least 1.")


def _price(price_per_hour: float | Mapping[str, float] | None, machine: MachineType) -> float | None:
    if isinstance(price_per_hour, Mapping):
        price_per_hour = price_per_hour.get(machine.name)
    return None if price_per_hour is None else machine_types.cost(price_per_hour)


def _phase_json(phase: Phase) -> dict[str, Any]:
    values: dict[str, Any] = {"memory_bytes": phase.memory_bytes}
    if phase.disk_gb is not None:
        values["disk_gb"] = phase.disk_gb
    values |= {"machine_type": phase.machine.name, "machine_memory_gb": phase.machine.memory_gb}
    if phase.machine.gpu:
        values |= {"gpu": phase.machine.gpu, "gpu_memory_gb": phase.machine.gpu_memory_gb}
    return values | {"peak_bytes": phase.peak_bytes, "parts": phase.parts}
