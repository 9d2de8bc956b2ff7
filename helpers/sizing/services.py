"""Machine types that the services of Google Cloud accept, which are fewer than Compute Engine has.

Vertex AI's custom jobs take a list of their own. Dataflow takes nearly all, and some only under conditions.

Sources, Google Cloud's documentation:

* Vertex AI: https://cloud.google.com/vertex-ai/docs/training/configure-compute. E2, N2 and the beginning
  of N1 were read there; the sizes of C2, M1 and the GPU families are from other public tables.
* Dataflow: https://cloud.google.com/dataflow/docs/guides/configure-worker-vm and
  https://cloud.google.com/dataflow/docs/guides/use-arm-vms
"""

from __future__ import annotations

from helpers.sizing.machine_types import CATALOGUE, MachineTypeError, check_machine_type

_VERTEX_TRAINING = {
    "e2-standard": "4 8 16 32",
    "e2-highmem": "2 4 8 16",
    "e2-highcpu": "16 32",
    "n2-standard": "4 8 16 32 48 64 80",
    "n2-highmem": "2 4 8 16 32 48 64 80",
    "n2-highcpu": "16 32 48 64 80",
    "n1-standard": "4 8 16 32 64 96",
    "n1-highmem": "2 4 8 16 32 64 96",
    "n1-highcpu": "16 32 64 96",
    "c2-standard": "4 8 16 30 60",
    "m1-ultramem": "40 80 160",
    "m1-megamem": "96",
    "g2-standard": "4 8 12 16 24 32 48 96",
    "a2-highgpu": "1g 2g 4g 8g",
    "a2-megagpu": "16g",
    "a2-ultragpu": "1g 2g 4g 8g",
    "a3-highgpu": "1g 2g 4g 8g",
    "a3-megagpu": "8g",
    "a3-ultragpu": "8g",
    "a4-highgpu": "8g",
    "a4x-highgpu": "4g",
}
VERTEX_TRAINING = frozenset(
    f"{kind}-{size}" for kind, sizes in _VERTEX_TRAINING.items() for size in sizes.split()
)
"""The machine types of Vertex AI's custom jobs."""

VERTEX_TRAINING_FAMILIES = tuple(dict.fromkeys(kind.split("-")[0] for kind in _VERTEX_TRAINING))

# Their own images are of another architecture than Beam's and this project's.
ARM_FAMILIES = frozenset({"t2a", "c4a", "n4a"})
# Compute Engine starts these only as Spot or Flex-start machines, which a streaming job cannot have.
NEVER_ON_DEMAND = frozenset({"a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g"})
# Machines of these families take no Persistent Disk.
HYPERDISK_FAMILIES = frozenset({"n4", "n4d", "c4", "c4a", "c4d"})


def check_vertex_training(name: str) -> None:
    """Checks that a Vertex AI custom job can have a machine type.

    Raises:
        MachineTypeError: it cannot; the message lists those of the same kind, or the families.
    """
    if name in VERTEX_TRAINING:
        return
    family, kind = name.split("-")[0], name.rpartition("-")[0]
    if sizes := _VERTEX_TRAINING.get(kind):
        advice = f"of {kind} it takes {', '.join(f'{kind}-{size}' for size in sizes.split())}"
    elif family in VERTEX_TRAINING_FAMILIES:
        kinds = [one for one in _VERTEX_TRAINING if one.split("-")[0] == family]
        advice = f"of {family} it takes {', '.join(kinds)}"
    else:
        advice = f"it takes the families {', '.join(VERTEX_TRAINING_FAMILIES)}"
    raise MachineTypeError(
        f"Vertex AI's custom jobs have no machine type {name!r}: {advice}. e2-highmem-2 (2 vCPUs, 16 GB) "
        "converts a model of any size."
    )


def check_dataflow_worker(name: str, *, has_own_image: bool = False) -> None:
    """Checks that a worker of a streaming Dataflow job can have a machine type.

    Args:
        name: the machine type.
        has_own_image: whether the job names an image, which may be of another architecture.

    Raises:
        MachineTypeError: there is no such type, or a streaming job cannot have it.
    """
    check_machine_type(name)
    if name.split("-")[0] in ARM_FAMILIES and not has_own_image:
        raise MachineTypeError(
            f"{name} has an Arm processor, and the images of Beam and of `python -m helpers.dataflow image "
            "build` are for x86: choose n4, c3, c4 or n2, or give an image for Arm."
        )
    if name in NEVER_ON_DEMAND:
        raise MachineTypeError(
            f"{name} starts only as a Spot or Flex-start machine, which a streaming job cannot have: choose "
            "g2 (L4) or a2 (A100)."
        )


def needs_reservation(name: str) -> bool:
    """Whether Compute Engine has a machine type for those only who reserved it, as the large ones of A3."""
    machine = CATALOGUE.get(name)
    return machine is not None and machine.family == "a3"
