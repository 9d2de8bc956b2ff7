"""One permission at a time is taken away: a user sees one sentence with the role that grants it."""

import time
import uuid
from pathlib import Path

import nbformat
import papermill
import pytest
from google.api_core.exceptions import Forbidden
from tiny_models import save_checkpoint

from helpers import dataflow, notebook, pubsub
from helpers.dataflow import JobError
from helpers.files import access, storage
from helpers.load_state_dict import CustomJobError, convert, vertex
from helpers.local_cloud.front.permissions import FILE, NEEDED

LOCATION = "us-central1"
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def policy(cloud):
    """Takes permissions away, and gives them back at the end: `policy("user pubsub.topics.create")`."""
    file = cloud.folder / FILE

    def deny(*lines: str) -> None:
        file.write_text("".join(f"deny {line}\n" for line in lines))

    yield deny
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def stream(cloud, tmp_path_factory):
    """A tiny model's state dict in a bucket, and topics with subscriptions."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint("llama", folder)
    connection = notebook.connect(bucket=f"denied-{uuid.uuid4().hex[:12]}")
    path = connection.gs("models", "tiny.pt")
    convert(str(folder), path, progress=False)
    topics = [pubsub.create_topic(cloud.project, f"{name}-{connection.bucket}") for name in ("m", "r")]
    subscriptions = [pubsub.create_subscription(topic, topic.rpartition("/")[2]) for topic in topics]
    yield (
        {
            "model_name": str(folder),
            "state_dict_path": path,
            "temp_location": connection.gs("temp"),
            "messages_subscription": subscriptions[0],
            "responses_topic": topics[1],
            "max_response_tokens": 2,
        },
        topics,
        subscriptions,
    )
    pubsub.delete(*topics, *subscriptions)


@pytest.fixture(scope="module")
def job(cloud, stream):
    running = dataflow.submit(
        project=cloud.project, location=LOCATION, job_name=f"denied-{uuid.uuid4().hex[:8]}", **stream[0]
    )
    running.wait_for("RUNNING", timeout=300)
    yield running
    running.cancel()


PUBSUB = {
    "topics.create": lambda topics, subscriptions: pubsub.create_topic(topics[0].split("/")[1], "another"),
    "topics.publish": lambda topics, subscriptions: pubsub.publish(topics[1], ["x"]),
    "subscriptions.create": lambda topics, subscriptions: pubsub.create_subscription(topics[0], "another"),
    "subscriptions.consume": lambda topics, subscriptions: pubsub.collect(subscriptions[1], 1, timeout=5),
    "subscriptions.delete": lambda topics, subscriptions: pubsub.delete(subscriptions[0]),
    "topics.delete": lambda topics, subscriptions: pubsub.delete(topics[0]),
}


@pytest.mark.parametrize("name", PUBSUB)
def test_pubsub(name, policy, stream, cloud):
    policy(f"user pubsub.{name}")
    with pytest.raises(Forbidden, match="User not authorized to perform this action") as caught:
        PUBSUB[name](*stream[1:])
    text = access.explain(caught.value, cloud.project)
    assert f"lacks pubsub.{name}, which roles/pubsub.editor grants" in text


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("get", lambda path: storage.read_bytes(path)),
        ("list", lambda path: storage.names_in(path.rpartition("/")[0])),
        ("create", lambda path: storage.check_writable(path.replace("tiny", "new"))),
        ("delete", lambda path: storage.delete(path)),
    ],
)
def test_objects(name, call, policy, stream):
    policy(f"user storage.objects.{name}")
    with pytest.raises(PermissionError, match=f"storage.objects.{name}") as caught:
        call(stream[0]["state_dict_path"])
    assert "roles/storage.objectUser" in str(caught.value)


def test_buckets(policy):
    policy("user storage.buckets.create")
    with pytest.raises(notebook.ConnectionFailed, match=r"roles/storage\.admin"):
        notebook.connect(bucket=f"none-{uuid.uuid4().hex[:12]}")


def test_vertex_ai(policy, stream, cloud):
    policy("user aiplatform.customJobs.create")
    where = {
        "project": cloud.project,
        "location": LOCATION,
        "bucket": storage.parse(stream[0]["temp_location"])[0],
    }
    with pytest.raises(CustomJobError, match=r"roles/aiplatform\.user"):
        vertex(stream[0]["model_name"], stream[0]["state_dict_path"].replace("tiny", "other"), **where)


@pytest.mark.parametrize(
    ("permission", "role"),
    [
        ("dataflow.jobs.create", "roles/dataflow.developer"),
        ("iam.serviceAccounts.actAs", "roles/iam.serviceAccountUser"),
    ],
)
def test_submitting(permission, role, policy, stream, cloud):
    policy(f"user {permission}")
    with pytest.raises(JobError, match=role):
        dataflow.submit(project=cloud.project, location=LOCATION, job_name="never", **stream[0])
    assert not [one for one in dataflow.list_series(cloud.project, LOCATION) if one.name == "never"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("jobs.get", lambda job: job.state()),
        ("jobs.list", lambda job: dataflow.list_series(job.project, job.location)),
        ("jobs.updateContents", lambda job: job.scale(1, 2)),
        ("jobs.cancel", lambda job: job.cancel()),
        ("messages.list", lambda job: job.messages()),
        ("metrics.get", lambda job: job.counters()),
    ],
)
def test_a_running_job(name, call, policy, job, cloud):
    policy(f"user dataflow.{name}")
    with pytest.raises(Forbidden) as caught:
        call(job)
    assert f"lacks dataflow.{name}, which roles/dataflow.developer grants" in access.explain(
        caught.value, cloud.project
    )


def test_a_permission_that_is_revoked_in_mid_run_loses_nothing(policy, job, stream):
    """The job says why nothing comes, and goes on when it may."""
    _, topics, subscriptions = stream
    policy("workers pubsub.subscriptions.consume")
    ids = pubsub.publish_prompts(topics[0], ["one", "two"])
    deadline = time.monotonic() + 300
    while not any("not authorized" in text for text in job.errors()):
        assert time.monotonic() < deadline, "the job does not tell"
        time.sleep(0.5)
    assert job.state() == "RUNNING"
    policy()
    assert pubsub.collect_answers(subscriptions[1], ids, timeout=300).keys() == set(ids)


def test_workers_that_may_not_read_the_state_dict_say_so(policy, stream, cloud):
    policy("workers storage.objects.get")
    job = dataflow.submit(
        project=cloud.project, location=LOCATION, job_name=f"unread-{uuid.uuid4().hex[:8]}", **stream[0]
    )
    with pytest.raises(JobError, match=r"storage\.objects\.get"):
        job.wait_for("RUNNING", timeout=300)


# Each notebook with each permission missing: minutes, and so with `make test-all`.


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
@pytest.mark.parametrize("permission", sorted({name for names in NEEDED.values() for name in names}))
def test_a_notebook(path, permission, policy, stream, cloud, tmp_path):
    """It runs through without the permission, or stops with the permission and a role, and leaves no job."""
    parameters = {"bucket": storage.parse(stream[0]["temp_location"])[0]}
    if path.stem[:2] == "01":
        parameters |= {"measure": []}
    else:
        parameters |= {"model_name": stream[0]["model_name"]}
    if path.stem[:2] in ("03", "04", "05"):
        parameters |= {"max_response_tokens": 2}
    if path.stem[:2] == "03":
        parameters |= {"batch_sizes": [1]}
    if path.stem[:2] == "05":
        parameters |= {
            "rates": [5],
            "sweep_seconds": 2,
            "burst_seconds": 2,
            "changes": [],
            "target_seconds": 600,
        }
    policy(f"user {permission}")
    try:
        papermill.execute_notebook(
            path, tmp_path / "o.ipynb", parameters=parameters, kernel_name="python3", progress_bar=False
        )
    except papermill.PapermillExecutionError as error:
        said = f"{error.evalue}\n" + _shown(tmp_path / "o.ipynb")
        role = access.roles_for([permission]) or ["roles/"]
        assert role[0] in said or "roles/storage.objectUser" in said, said[-1500:]
    finally:
        policy()
    for left in dataflow.list_series(cloud.project, LOCATION):
        assert left.name.startswith("denied-") or left.job.stop("CANCELLED", 60), left.name


def _shown(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(str(output.get("text") or output.get("traceback") or "") for output in outputs)
