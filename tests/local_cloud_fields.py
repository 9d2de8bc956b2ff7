"""Writes helpers/local_cloud/FIELDS.md: what becomes of each field of the clients' own request types.

python tests/local_cloud_fields.py
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from google.cloud import storage  # noqa: E402
from google.cloud.aiplatform_v1.types import job_service  # noqa: E402
from google.cloud.dataflow_v1beta3.types import jobs, messages, metrics  # noqa: E402
from google.cloud.monitoring_v3.types import metric_service  # noqa: E402
from google.iam.v1 import iam_policy_pb2  # noqa: E402
from google.pubsub_v1.types import pubsub  # noqa: E402

from helpers.local_cloud.cloud_storage import fields as cloud_storage  # noqa: E402
from helpers.local_cloud.dataflow import fields as dataflow  # noqa: E402
from helpers.local_cloud.front.fields import HONOURED, REFUSED, WITHOUT_EFFECT, Fields, every_field  # noqa: E402
from helpers.local_cloud.monitoring import fields as monitoring  # noqa: E402
from helpers.local_cloud.pubsub import fields as pub_sub  # noqa: E402
from helpers.local_cloud.vertex_ai import fields as vertex_ai  # noqa: E402

PAGE = ROOT / "helpers" / "local_cloud" / "FIELDS.md"
PACKAGES = (
    "google-cloud-aiplatform",
    "google-cloud-dataflow-client",
    "google-cloud-monitoring",
    "google-cloud-pubsub",
    "google-cloud-storage",
)

# Modules with the request types of each service, and its tables.
SERVICES = {
    "Pub/Sub": ((pubsub, iam_policy_pb2), pub_sub.TABLES),
    "Vertex AI": ((job_service,), vertex_ai.TABLES),
    "Dataflow": ((jobs, messages, metrics), dataflow.TABLES),
    "Cloud Monitoring": ((metric_service,), monitoring.TABLES),
}
_SPECIAL = {
    "CreateTopic": "Topic",
    "CreateSubscription": "Subscription",
    "AggregatedListJobs": "ListJobsRequest",
}


def request_type(modules, call: str):
    """The protobuf class of a call's request."""
    name = _SPECIAL.get(call, f"{call}Request")
    found = next(getattr(module, name) for module in modules if hasattr(module, name))
    return found.pb() if hasattr(found, "pb") else found


def named_in_client(pattern: str, *modules: str) -> list[str]:
    """The names that Google's Cloud Storage client writes in its source, as the pattern finds them."""
    folder = Path(storage.__file__).parent
    text = "".join((folder / f"{module}.py").read_text() for module in modules)
    return sorted(set(re.findall(pattern, text)))


_PROPERTY = r"_(?:properties\.get|properties\.setdefault|patch_property|scalar_property)\(\s*[\"'](\w+)[\"']"
_QUERY = (
    r"(?:(?:query_params|extra_params|params)\[|name_value_pairs\.append\(\(|_MATCH_\w+ = )[\"'](\w+)[\"']"
)


def storage_tables() -> dict[str, tuple[list[str], Fields]]:
    """What the client can send to Cloud Storage, by kind, with its table."""
    every = [name for table in cloud_storage.QUERIES.values() for name in table.honoured]
    query = Fields(frozenset(every), cloud_storage.QUERIES["buckets.list"].without_effect, frozenset())
    idle = {n for t in cloud_storage.QUERIES.values() for n in t.without_effect}
    return {
        "parameters of some call": (
            named_in_client(_QUERY, "blob", "bucket", "client", "_helpers"),
            Fields(query.honoured, frozenset(idle), frozenset()),
        ),
        "fields of a bucket": (named_in_client(_PROPERTY, "bucket"), cloud_storage.BUCKET),
        "fields of an object": (named_in_client(_PROPERTY, "blob"), cloud_storage.OBJECT),
    }


def rows() -> list[tuple[str, str, dict[str, list[str]]]]:
    """Each service and kind of request with its fields by what becomes of them."""
    found = []
    for kind, (names, table) in storage_tables().items():
        found.append(("Cloud Storage", kind, _sorted((name, table.of(name)) for name in names)))
    for service, (modules, tables) in SERVICES.items():
        for call, table in tables.items():
            descriptor = request_type(modules, call).DESCRIPTOR
            found.append((service, call, _sorted(every_field(descriptor, table))))
    return found


def _sorted(pairs) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {HONOURED: [], WITHOUT_EFFECT: [], REFUSED: []}
    for name, kind in pairs:
        kinds[kind].append(name)
    return kinds


def page() -> str:
    """The text of FIELDS.md."""
    lines = [
        "# What becomes of each field of a request",
        "",
        "Written by `python tests/local_cloud_fields.py` from the clients' own request types; a test holds",
        "it to them. README.md says why some fields have no effect here. A request that sets a refused one",
        "is answered with 501 or UNIMPLEMENTED, and the field's name.",
        "",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
        "",
        "| service | request | honoured | without effect | refused |",
        "|---|---|---|---|---|",
    ]
    for service, call, kinds in rows():
        cells = [", ".join(f"`{name}`" for name in names) or "–" for names in kinds.values()]
        lines.append(f"| {service} | {call} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Wrote {PAGE.relative_to(ROOT)}")
