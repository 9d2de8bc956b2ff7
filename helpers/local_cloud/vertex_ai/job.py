"""Reads a Vertex AI CustomJob: whether it can run here, its timeout and its variables."""

from __future__ import annotations

import json
import re
from typing import Any

from ..front.grpc_service import invalid_argument, unimplemented

# https://cloud.google.com/vertex-ai/docs/training/configure-compute
MACHINE_TYPE = re.compile(
    r"e2-standard-(4|8|16|32)|e2-highmem-(2|4|8|16)|e2-highcpu-(16|32)"
    r"|n2-(standard-(4|8|16|32|48|64|80)|highmem-(2|4|8|16|32|48|64|80)|highcpu-(16|32|48|64|80))"
    r"|n1-(standard-(4|8|16|32|64|96)|highmem-(2|4|8|16|32|64|96)|highcpu-(16|32|64|96))"
    r"|c2-standard-(4|8|16|30|60)|m1-ultramem-(40|80|160)|m1-megamem-96"
    r"|g2-standard-(4|8|12|16|24|32|48|96)|a2-(highgpu-[1248]g|megagpu-16g|ultragpu-[1248]g)"
    r"|a3-(highgpu-[1248]g|megagpu-8g|ultragpu-8g)|a4-highgpu-8g|a4x-highgpu-4g"
)
DEFAULT_TIMEOUT_SECONDS = 7 * 24 * 3600


def check(job: Any) -> None:
    """Raises the RpcError that the creator of a CustomJob should see, if any."""
    if not job.display_name:
        raise invalid_argument("display_name is missing.")
    pools = [p for p in job.job_spec.worker_pool_specs if p.ByteSize()]
    if not pools:
        raise invalid_argument("job_spec.worker_pool_specs is empty.")
    if len(pools) > 1 or pools[0].replica_count > 1:
        raise unimplemented("a custom job with more than one replica.")
    pool = pools[0]
    machine_type = pool.machine_spec.machine_type
    if not machine_type:
        raise invalid_argument("worker_pool_specs[0].machine_spec.machine_type is missing.")
    if not MACHINE_TYPE.fullmatch(machine_type):
        raise invalid_argument(f'Machine type "{machine_type}" is not supported.')
    disk = pool.disk_spec.boot_disk_size_gb
    if disk and not 100 <= disk <= 64000:
        raise invalid_argument(f"boot_disk_size_gb must be between 100 and 64000, not {disk}.")
    if not pool.container_spec.image_uri:
        raise invalid_argument("worker_pool_specs[0] needs a container_spec with image_uri.")


def timeout_seconds(job: Any) -> float:
    """How long a CustomJob may run."""
    timeout = job.job_spec.scheduling.timeout
    return timeout.seconds + timeout.nanos / 1e9 or DEFAULT_TIMEOUT_SECONDS


def job_variables(job: Any) -> dict[str, str]:
    """The environment variables of a training container.

    https://cloud.google.com/vertex-ai/docs/training/code-requirements#environment-variables
    """
    variables = {
        "CLOUD_ML_JOB_ID": job.name.rpartition("/")[2],
        "CLOUD_ML_PROJECT_ID": job.name.split("/")[1],
        "CLUSTER_SPEC": json.dumps(
            {
                "cluster": {"workerpool0": ["127.0.0.1:2222"]},
                "environment": "cloud",
                "task": {"type": "workerpool0", "index": 0},
            }
        ),
    }
    output = job.job_spec.base_output_directory.output_uri_prefix.rstrip("/")
    if output:
        variables |= {
            "AIP_MODEL_DIR": f"{output}/model/",
            "AIP_CHECKPOINT_DIR": f"{output}/checkpoints/",
            "AIP_TENSORBOARD_LOG_DIR": f"{output}/logs/",
        }
    return variables
