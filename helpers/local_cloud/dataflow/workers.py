"""The workers that Dataflow starts: https://cloud.google.com/dataflow/docs/guides/configure-worker-vm"""

from __future__ import annotations

import re
from typing import Any

from ..front.grpc_service import invalid_argument

# The name of a type that exists in some form: a family, a kind, a size.
_NAME = re.compile(
    r"f1-micro|g1-small|e2-(micro|small|medium)|(e2|n2|n2d|n4|n1|)-?custom-\d+-\d+(-ext)?"
    r"|(n1|e2|n2|n2d|n4|n4d|c2|c2d|c3|c3d|c4|c4d|c4a|t2a|t2d|m1|m2|m3)-(standard|highmem|highcpu|megamem|ultramem)"
    r"-[1-9]\d*(-lssd)?|g2-standard-(4|8|12|16|24|32|48|96)|g4-standard-[1-9]\d*"
    r"|a2-(highgpu-[1248]g|megagpu-16g|ultragpu-[1248]g)|a3-(highgpu|megagpu|ultragpu)-[1248]g"
)
_NEVER_ON_DEMAND = re.compile(r"a3-highgpu-[124]g")
_HYPERDISK_ONLY = ("n4-", "n4d-", "c4-", "c4a-", "c4d-")
MIN_DISK_GB = 30


def check_worker_pool(pool: Any, is_streaming: bool) -> None:
    """Raises RpcError for workers that Dataflow or Compute Engine would refuse."""
    name, disk = pool.machine_type, pool.disk_type.rpartition("/")[2]
    if name and not _NAME.fullmatch(name):
        raise invalid_argument(f"Invalid value for field 'machineType': {name!r}: it does not exist.")
    if is_streaming and _NEVER_ON_DEMAND.fullmatch(name):
        raise invalid_argument(f"{name} is available as Spot or Flex-start only, not for streaming jobs.")
    if name.startswith(_HYPERDISK_ONLY) and disk.startswith("pd-"):
        raise invalid_argument(f"[{disk}, {name}] features are not compatible for creating instance.")
    if pool.disk_size_gb and pool.disk_size_gb < MIN_DISK_GB:
        raise invalid_argument(f"disk_size_gb must be at least {MIN_DISK_GB}, not {pool.disk_size_gb}.")
