"""Reads a Vertex AI CustomJob: whether it can run here, its timeout and variables, filters that match it."""

from __future__ import annotations

import json
import re
from typing import Any

from google.cloud.aiplatform_v1.types import job_state

from ..front.grpc_service import invalid_argument, unimplemented

DEFAULT_TIMEOUT_SECONDS = 7 * 24 * 3600
_TERM = re.compile(r'\s*(display_name|displayName|state|labels\.[\w-]+)\s*(=|:)\s*("[^"]*"|[^\s"]+)\s*')


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
    if not pool.machine_spec.machine_type:
        raise invalid_argument("worker_pool_specs[0].machine_spec.machine_type is missing.")
    if pool.HasField("python_package_spec"):
        spec = pool.python_package_spec
        if not (spec.executor_image_uri and spec.package_uris and spec.python_module):
            raise invalid_argument(
                "A python_package_spec needs executor_image_uri, package_uris and python_module."
            )
    elif not pool.container_spec.image_uri:
        raise invalid_argument(
            "worker_pool_specs[0] needs a container_spec with image_uri, or a python_package_spec."
        )


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


def parse_filter(text: str) -> list[tuple[str, str, str]]:
    """The terms of a filter such as `state="JOB_STATE_RUNNING" AND labels.made-by=me`: all must hold."""
    if not text.strip():
        return []
    terms = [_TERM.fullmatch(term) for term in re.split(r"\bAND\b", text)]
    if None in terms:
        raise unimplemented(
            f"the filter {text!r}; use terms of display_name, state and labels.KEY joined by AND."
        )
    return [(t[1], t[2], t[3].strip('"')) for t in terms if t]


def matches(job: Any, name: str, operator: str, value: str) -> bool:
    """Whether a CustomJob satisfies one term of a filter."""
    if name.startswith("labels."):
        key = name.removeprefix("labels.")
        return key in job.labels and ((operator, value) == (":", "*") or job.labels[key] == value)
    if name == "state":
        return job_state.JobState(job.state).name == value
    return job.display_name == value
