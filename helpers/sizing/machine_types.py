"""Compute Engine's machine types, and the smallest one that fits.

A catalogue of the families that a Dataflow worker or a Vertex AI job of this series may run on, as Google
published them in `CATALOGUE_DATE`. It has sizes but no prices: prices differ by region and contract, so
a price comes from the user (see `cost`).

Sources, Google Cloud's documentation:

* general purpose: https://cloud.google.com/compute/docs/general-purpose-machines
* with GPUs: https://cloud.google.com/compute/docs/accelerator-optimized-machines
* processor generations: https://cloud.google.com/compute/docs/cpu-platforms

Left out: shared-core and custom types, bare metal, types with local disks (`-lssd`), and the sizes of C4
that came later (24, 144 and 288 vCPUs). Where those pages give a machine's memory in GB, they mean GiB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

CATALOGUE_DATE = "2025-05"
GIB = 2**30


class MachineTypeError(ValueError):
    """No machine type fits the request: the message says which family to try next."""


@dataclass(frozen=True)
class MachineType:
    """One machine type.

    Attributes:
        memory_gb: memory of the whole machine, in Google's GB (2**30 bytes).
        gpu: the GPU's accelerator type, as `--worker_accelerator` wants it; empty without a GPU.
        gpu_memory_gb: memory of ONE of its GPUs, in the maker's GB (10**9 bytes).
    """

    name: str
    vcpus: int
    memory_gb: int
    gpu: str = ""
    gpu_count: int = 0
    gpu_memory_gb: int = 0

    def __str__(self) -> str:
        gpu = f", with {self.gpu} of {self.gpu_memory_gb} GB" if self.gpu else ""
        return f"{self.name}, {self.memory_gb} GB{gpu}"

    @property
    def family(self) -> str:
        """The family, for example `n2`."""
        return self.name.split("-")[0]

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * GIB

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of one GPU, in bytes."""
        return self.gpu_memory_gb * 10**9


# family → kind → (GB of memory per vCPU, vCPU counts). C4's memory is rounded down to whole GB, as published.
_GENERAL_PURPOSE: dict[str, dict[str, tuple[float, tuple[int, ...]]]] = {
    "e2": {
        "standard": (4, (2, 4, 8, 16, 32)),
        "highmem": (8, (2, 4, 8, 16)),
        "highcpu": (1, (2, 4, 8, 16, 32)),
    },
    "n2": {
        "standard": (4, (2, 4, 8, 16, 32, 48, 64, 80, 96, 128)),
        "highmem": (8, (2, 4, 8, 16, 32, 48, 64, 80, 96, 128)),
        "highcpu": (1, (2, 4, 8, 16, 32, 48, 64, 80, 96)),
    },
    "n2d": {
        "standard": (4, (2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 224)),
        "highmem": (8, (2, 4, 8, 16, 32, 48, 64, 80, 96)),
        "highcpu": (1, (2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 224)),
    },
    "n4": {
        "standard": (4, (2, 4, 8, 16, 32, 48, 64, 80)),
        "highmem": (8, (2, 4, 8, 16, 32, 48, 64, 80)),
        "highcpu": (2, (2, 4, 8, 16, 32, 48, 64, 80)),
    },
    "c3": {
        "standard": (4, (4, 8, 22, 44, 88, 176)),
        "highmem": (8, (4, 8, 22, 44, 88, 176)),
        "highcpu": (2, (4, 8, 22, 44, 88, 176)),
    },
    "c4": {
        "standard": (3.75, (2, 4, 8, 16, 32, 48, 96, 192)),
        "highmem": (7.75, (2, 4, 8, 16, 32, 48, 96, 192)),
        "highcpu": (2, (2, 4, 8, 16, 32, 48, 96, 192)),
    },
}

# The one type that departs from its family's formula.
_EXCEPTIONS = {"n2-highmem-128": 864}

_GPU = (
    MachineType("g2-standard-4", 4, 16, "nvidia-l4", 1, 24),
    MachineType("g2-standard-8", 8, 32, "nvidia-l4", 1, 24),
    MachineType("g2-standard-12", 12, 48, "nvidia-l4", 1, 24),
    MachineType("g2-standard-16", 16, 64, "nvidia-l4", 1, 24),
    MachineType("g2-standard-24", 24, 96, "nvidia-l4", 2, 24),
    MachineType("g2-standard-32", 32, 128, "nvidia-l4", 1, 24),
    MachineType("g2-standard-48", 48, 192, "nvidia-l4", 4, 24),
    MachineType("g2-standard-96", 96, 384, "nvidia-l4", 8, 24),
    MachineType("a2-highgpu-1g", 12, 85, "nvidia-tesla-a100", 1, 40),
    MachineType("a2-highgpu-2g", 24, 170, "nvidia-tesla-a100", 2, 40),
    MachineType("a2-highgpu-4g", 48, 340, "nvidia-tesla-a100", 4, 40),
    MachineType("a2-highgpu-8g", 96, 680, "nvidia-tesla-a100", 8, 40),
    MachineType("a2-megagpu-16g", 96, 1360, "nvidia-tesla-a100", 16, 40),
    MachineType("a2-ultragpu-1g", 12, 170, "nvidia-a100-80gb", 1, 80),
    MachineType("a2-ultragpu-2g", 24, 340, "nvidia-a100-80gb", 2, 80),
    MachineType("a2-ultragpu-4g", 48, 680, "nvidia-a100-80gb", 4, 80),
    MachineType("a2-ultragpu-8g", 96, 1360, "nvidia-a100-80gb", 8, 80),
    MachineType("a3-highgpu-1g", 26, 234, "nvidia-h100-80gb", 1, 80),
    MachineType("a3-highgpu-2g", 52, 468, "nvidia-h100-80gb", 2, 80),
    MachineType("a3-highgpu-4g", 104, 936, "nvidia-h100-80gb", 4, 80),
    MachineType("a3-highgpu-8g", 208, 1872, "nvidia-h100-80gb", 8, 80),
    MachineType("a3-megagpu-8g", 208, 1872, "nvidia-h100-mega-80gb", 8, 80),
    MachineType("a3-ultragpu-8g", 224, 2952, "nvidia-h200-141gb", 8, 141),
)


def _general_purpose() -> Iterable[MachineType]:
    for family, kinds in _GENERAL_PURPOSE.items():
        for kind, (gb_per_vcpu, counts) in kinds.items():
            for vcpus in counts:
                name = f"{family}-{kind}-{vcpus}"
                yield MachineType(name, vcpus, _EXCEPTIONS.get(name, math.floor(gb_per_vcpu * vcpus)))


CATALOGUE: dict[str, MachineType] = {machine.name: machine for machine in (*_general_purpose(), *_GPU)}
CPU_FAMILIES = tuple(_GENERAL_PURPOSE)
GPU_FAMILIES = ("g2", "a2", "a3")

# Families whose machines are known to compute in bfloat16: C3 has Sapphire Rapids, and AMX was measured on
# C4. N4 has Emerald Rapids, which can, but no source tells whether its virtual machines may. Sizing counts 4
# bytes a weight there until a worker's log has told (`helpers.model_handler` writes one at start). Whatever
# the family, a worker asks its own processor.
BFLOAT16_FAMILIES = frozenset({"c3", "c4", *GPU_FAMILIES})

# Families whose processors are Intel's; E2's may be.
INTEL_FAMILIES = frozenset({"e2", "n2", "n4", "c3", "c4"})

# GPU families that anyone with the quota can start; A3 needs a reservation, or is Spot or Flex-start.
ON_DEMAND_GPU_FAMILIES = ("g2", "a2")

# Below this a machine has no room for the operating system beside a Python worker with torch: highcpu types
# of 2 or 4 GB are never proposed. It is also the smallest machine of the published sample's tables.
MINIMUM_MEMORY_GB = 8


def get(name: str) -> MachineType:
    """The machine type of that name.

    Raises:
        MachineTypeError: it is not in the catalogue.
    """
    try:
        return CATALOGUE[name]
    except KeyError:
        raise MachineTypeError(
            f"Machine type {name!r} is not in this catalogue ({CATALOGUE_DATE}): "
            f"its families are {', '.join(CPU_FAMILIES + GPU_FAMILIES)}."
        ) from None


# The form of a name: https://cloud.google.com/compute/docs/machine-resource#machine_type_comparison
_NAME = re.compile(
    r"(f1-micro|g1-small|([a-z]+\d+[a-z]*-)?custom-(\d+|micro|small|medium)-\d+(-ext)?"
    r"|[a-z]+\d+[a-z]*-(micro|small|medium|[a-z]+-[1-9]\d*[gt]?(-[a-z]+)*))"
)


def check_machine_type(name: str) -> None:
    """Checks that a machine type of this name could exist, in this catalogue or out of it.

    Raises:
        MachineTypeError: it could not, such as `n4-standard-3`, `n4-standart-4` or `large`.
    """
    family, _, rest = name.partition("-")
    kind, _, size = rest.partition("-")
    kinds = _GENERAL_PURPOSE.get(family)
    hint = ""
    if kinds and kind in kinds and re.fullmatch(r"[1-9][0-9]*", size):
        # Google adds sizes now and then, but none has an odd number of vCPUs.
        counts = kinds[kind][1]
        if name in CATALOGUE or (int(size) % 2 == 0 and counts[0] < int(size) <= 2 * counts[-1]):
            return
        hint = f": its sizes are {', '.join(map(str, kinds[kind][1]))}"
    elif kinds and kind not in (*kinds, "custom", "micro", "small", "medium"):
        hint = f": {family} has {', '.join(kinds)}"
    elif _NAME.fullmatch(name):
        return
    raise MachineTypeError(f"There is no machine type {name!r}{hint or ': one is called n4-standard-4'}.")


def smallest(
    memory_bytes: int,
    *,
    family: str = "n4",
    headroom: float = 0.0,
    among: Collection[str] | None = None,
) -> MachineType:
    """The machine type of a CPU family that has enough memory and the fewest vCPUs.

    If several have equally few, the one with the least memory. vCPUs come first because one costs several
    times what a GB of memory does: a `highmem` type is cheaper than a `standard` one with the same memory
    and twice the vCPUs. Types below `MINIMUM_MEMORY_GB` are passed over.

    Args:
        memory_bytes: what must fit.
        family: one of `CPU_FAMILIES`.
        headroom: share of the machine's memory to leave free, from 0 up to 1.
        among: the names to choose from, such as those that a service accepts; by default all.

    Raises:
        MachineTypeError: an unknown family, a headroom out of range, or no machine that is large enough.
    """
    _check(headroom)
    if family in GPU_FAMILIES:
        raise MachineTypeError(f"{family} is a GPU family: use smallest_gpu().")
    if family not in CPU_FAMILIES:
        raise MachineTypeError(
            f"Unknown machine family {family!r}: choose one of {', '.join(CPU_FAMILIES)}, "
            f"or of the GPU families {', '.join(GPU_FAMILIES)}."
        )

    fitting = [
        machine
        for machine in CATALOGUE.values()
        if machine.family == family
        and machine.memory_gb >= MINIMUM_MEMORY_GB
        and (among is None or machine.name in among)
        and machine.memory_bytes * (1 - headroom) > memory_bytes
    ]
    if fitting:
        return min(fitting, key=lambda machine: (machine.vcpus, machine.memory_gb))
    raise MachineTypeError(
        f"{_gb(memory_bytes)} with {headroom:.0%} headroom is more than the largest {family} machine has "
        f"({_largest(family).name}, {_largest(family).memory_gb} GB). {_next_family(memory_bytes, headroom)}"
    )


def smallest_gpu(
    gpu_memory_bytes: int,
    *,
    family: str | None = None,
    headroom: float = 0.0,
    host_memory_bytes: int = 0,
) -> MachineType:
    """The machine type with the smallest GPU that holds the model.

    Of several, the one with the fewest GPUs, then the fewest vCPUs. The whole model must fit into one GPU:
    the handler of this series does not split a model across several.

    Args:
        gpu_memory_bytes: what must fit into one GPU.
        family: one of `GPU_FAMILIES`; those that need no reservation by default.
        headroom: share of the GPU's (and the machine's) memory to leave free, from 0 up to 1.
        host_memory_bytes: what must fit into the machine's own memory.

    Raises:
        MachineTypeError: an unknown family, a headroom out of range, or no GPU is large enough.
    """
    _check(headroom)
    if family is not None and family not in GPU_FAMILIES:
        raise MachineTypeError(f"Unknown GPU family {family!r}: choose one of {', '.join(GPU_FAMILIES)}.")

    fitting = [
        machine
        for machine in _GPU
        if machine.family in ((family,) if family else ON_DEMAND_GPU_FAMILIES)
        and machine.gpu_memory_bytes * (1 - headroom) > gpu_memory_bytes
        and machine.memory_bytes * (1 - headroom) > host_memory_bytes
    ]
    if fitting:
        return min(fitting, key=lambda m: (m.gpu_memory_gb, m.gpu_count, m.vcpus, m.memory_gb))

    if family is not None:
        try:
            other = smallest_gpu(gpu_memory_bytes, headroom=headroom, host_memory_bytes=host_memory_bytes)
        except MachineTypeError:
            other = None
        if other is not None:
            raise MachineTypeError(
                f"{_gb(gpu_memory_bytes)} with {headroom:.0%} headroom fits no single GPU of the {family} "
                f"family: use the {other.family} family ({other.name}, {other.gpu})."
            )
    raise MachineTypeError(
        f"{_gb(gpu_memory_bytes)} with {headroom:.0%} headroom is more than any single GPU of this catalogue "
        f"has ({max(m.gpu_memory_gb for m in _GPU)} GB): serve on CPUs, or choose a smaller model or batch."
    )


def cost(price_per_hour: float, hours: float = 1.0, workers: int = 1) -> float:
    """What `workers` machines cost for `hours`, in the currency of the price that the user gives.

    Raises:
        ValueError: a negative price or time, or fewer than one worker.
    """
    if not price_per_hour >= 0 or not hours >= 0 or workers < 1:
        raise ValueError(
            f"price_per_hour={price_per_hour}, hours={hours}, workers={workers}: "
            "give a price and a time of at least 0, and at least one worker."
        )
    return price_per_hour * hours * workers


def _largest(family: str) -> MachineType:
    return max((m for m in CATALOGUE.values() if m.family == family), key=lambda m: m.memory_gb)


def _next_family(memory_bytes: int, headroom: float) -> str:
    roomy = [
        _largest(family)
        for family in CPU_FAMILIES
        if _largest(family).memory_bytes * (1 - headroom) > memory_bytes
    ]
    if not roomy:
        return (
            "No family in this catalogue has such a machine: choose a smaller model, or one of Compute "
            "Engine's memory-optimized types (https://cloud.google.com/compute/docs/memory-optimized-machines)."
        )
    best = min(roomy, key=lambda machine: machine.memory_gb)
    return f"Use the {best.family} family, which goes up to {best.memory_gb} GB ({best.name})."


def _check(headroom: float) -> None:
    if not 0 <= headroom < 1:
        raise MachineTypeError(
            f"headroom={headroom}: give the share to leave free, from 0 up to 1 (0.1 is 10 %)."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
