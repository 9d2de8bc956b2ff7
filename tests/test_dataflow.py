"""A submitted job answers messages, is drained with nothing lost, and sees only what was staged."""

import json
import subprocess
import sys
import uuid

import pytest
from conftest import wait_until
from tiny_models import save_checkpoint

from helpers import dataflow, pubsub
from helpers.dataflow import Job, JobError, job_guard
from helpers.dataflow.__main__ import main
from helpers.load_state_dict import convert

LOCATION = "us-central1"


@pytest.fixture(scope="module")
def model(tmp_path_factory, cloud, storage_client):
    """Name and state dict of a tiny model, in a bucket."""
    checkpoint = tmp_path_factory.mktemp("llama")
    save_checkpoint("llama", checkpoint)
    bucket = storage_client.create_bucket(f"models-{uuid.uuid4().hex[:12]}")
    path = f"gs://{bucket.name}/run-inference/tiny.pt"
    convert(str(checkpoint), path, progress=False)
    yield str(checkpoint), path
    bucket.delete(force=True)


@pytest.fixture
def topics(cloud):
    """Paths of topics and subscriptions for one job, by name."""
    run = uuid.uuid4().hex[:8]
    paths = {}
    for name in ("messages", "responses", "dead-letters"):
        paths[name] = pubsub.create_topic(cloud.project, f"{name}-{run}")
        paths[f"{name}-subscription"] = pubsub.create_subscription(paths[name], f"{name}-{run}")
    yield paths
    pubsub.delete(*paths.values())


def submit(cloud, model, topics, **options) -> Job:
    arguments = {
        "project": cloud.project,
        "location": LOCATION,
        "temp_location": model[1].rpartition("/")[0] + "/temp",
        "job_name": f"test-{uuid.uuid4().hex[:8]}",
        "model_name": model[0],
        "state_dict_path": model[1],
        "responses_topic": topics["responses"],
        "messages_subscription": topics["messages-subscription"],
        "dead_letter_topic": topics["dead-letters"],
        "max_response_tokens": 4,
    }
    return dataflow.submit(**(arguments | options))


def test_a_job_answers_each_message_and_is_drained_with_nothing_lost(cloud, model, topics):
    # Before the job runs: on a subscription they wait for it.
    early = pubsub.publish(topics["messages"], ["early"], origin="test")
    job = submit(cloud, model, topics)
    assert job.wait_for("RUNNING", timeout=300) == "RUNNING"
    assert job.job_id in [one.job.job_id for one in dataflow.list_series(cloud.project, LOCATION)]
    # Attributes with the names of the clients' own arguments are attributes like others.
    named = {"topic": "a", "data": "b", "timeout": "c", "retry": "d", "ordering_key": "e", "messages": "f"}
    texts = [f"prompt {n}" for n in range(20)]
    ids = early + pubsub.publish(topics["messages"], texts, origin="test", **named)
    bad = pubsub.publish(topics["messages"], [b"\xff", b"  "], origin="test")

    responses = pubsub.collect(topics["responses-subscription"], len(ids), timeout=300)
    assert sorted(m.attributes["prompt_message_id"] for m in responses) == sorted(ids)
    assert {m.attributes["origin"] for m in responses} == {"test"}
    assert sum(named.items() <= dict(m.attributes).items() for m in responses) == 20
    assert {m.attributes["model_name"] for m in responses} == {model[0]}
    dead = pubsub.collect(topics["dead-letters-subscription"], 2, timeout=300)
    assert {m.attributes["prompt_message_id"]: m.data for m in dead} == dict(
        zip(bad, [b"\xff", b"  "], strict=True)
    )
    assert all(m.attributes["error"] for m in dead)

    # Watched, as in a notebook.
    seen = []
    for status in job.watch(seconds=300, every=1, subscription=topics["messages-subscription"]):
        seen.append(status)
        if len(seen) > 1 and (status.answered, status.dead_letters, status.backlog) == (len(ids), 2, 0):
            break
    first, *_, last = seen
    assert (first.state, first.answers_per_second) == ("RUNNING", 0.0)
    assert any("RUNNING" in message for message in first.messages)
    assert not set(first.messages) & set(last.messages), "each message is reported once"
    assert last.answered == len(ids)
    assert last.dead_letters == 2
    assert (last.workers, last.backlog) == (1, 0)

    assert job.drain(timeout=300) == "DRAINED"
    assert job.drain() == "DRAINED", "draining a drained job changes nothing"
    counters = job.counters()
    assert (counters["models_loaded"], counters["dead_letters"]) == (1, 2)
    derived = [name for name in counters if name.endswith(("_MIN", "_MAX", "_MEAN", "_COUNT"))]
    assert not derived, "Dataflow's own scalars of distributions are no counters"
    sizes, times = (job.distributions()[name] for name in ("batch_size", "batch_milliseconds"))
    assert sizes.sum == len(ids)
    assert sizes.count == times.count <= len(ids)
    assert 1 <= sizes.min <= sizes.mean <= sizes.max
    assert times.mean > 0
    assert [status.state for status in job.watch(seconds=60)] == ["DRAINED"], "there is no more to see"
    # What comes after the drain waits for the next job.
    late = pubsub.publish(topics["messages"], ["late"])
    assert [m.message_id for m in pubsub.collect(topics["messages-subscription"], 1, timeout=300)] == late


def test_the_job_as_dataflow_has_it_was_made_for_a_language_model(cloud, model, topics):
    """Read back from the service; what each option is for is in test_job_options.py."""
    job = submit(cloud, model, topics, image="gcr.io/test-project/worker:1", max_workers=2)
    try:
        described = job.describe()
        (pool,) = described.environment.worker_pools
        assert pool.machine_type == "n4-standard-2"
        assert (pool.num_workers, pool.autoscaling_settings.max_num_workers) == (1, 2)
        assert (pool.disk_size_gb, pool.num_threads_per_worker) == (30, 36)
        assert pool.worker_harness_container_image == "gcr.io/test-project/worker:1"
        assert "no_use_multiple_sdk_containers" in described.environment.experiments
        assert list(described.environment.service_options) == ["streaming_mode_at_least_once"]
        assert described.labels["series"] == "streaming-llm"
        job.scale(1, 3)
        assert job.describe().runtime_updatable_params.max_num_workers == 3
        with pytest.raises(JobError, match="at least 1"):
            job.scale(0, 3)
    finally:
        job.cancel(timeout=300)
    with pytest.raises(JobError, match="stay as they are"):
        job.scale(1, 2)


def test_a_name_in_use_is_told_and_a_job_that_does_not_come_in_time(cloud, model, topics):
    job = submit(cloud, model, topics, job_name="Test in use!")
    try:
        with pytest.raises(JobError, match=rf"test-in-use is in use by {job.job_id}: drain that job"):
            submit(cloud, model, topics, job_name="test-in-use")
        with pytest.raises(JobError, match=f"still .*{job.job_id}"):
            job.wait_for("DRAINED", timeout=0)
    finally:
        assert job.cancel(timeout=300) == "CANCELLED"
    assert job.drain() == "CANCELLED"


def test_an_update_without_a_job_is_told_at_once(cloud, model, topics):
    with pytest.raises(JobError, match="no running job named test-none"):
        submit(cloud, model, topics, job_name="test-none", beam_options=["--update"])


def test_an_option_that_nobody_knows_is_told():
    with pytest.raises(TypeError, match="no option reload_second=5: do you mean reload_seconds"):
        dataflow.submit(
            project="my-project",
            location=LOCATION,
            temp_location="gs://bucket/temp",
            job_name="x",
            model_name="m",
            state_dict_path="gs://bucket/m.pt",
            responses_topic="projects/p/topics/t",
            messages_subscription="projects/p/subscriptions/s",
            reload_second=5,
        )


def test_an_image_without_the_helpers_fails_for_that_reason(cloud, model, topics):
    """What the worker imports came from Cloud Storage, not from this environment."""
    job = submit(cloud, model, topics, helpers_in_image=True)
    pubsub.publish(topics["messages"], ["Hi"])
    try:
        with pytest.raises(JobError, match=r"No module named 'helpers'[\s\S]*rebuild their image"):
            job.wait_for("DONE", timeout=300)
    finally:
        job.cancel(timeout=300)


def test_a_topic_that_does_not_exist_fails_the_job_and_is_named(cloud, model, topics):
    job = submit(cloud, model, topics, responses_topic=f"projects/{cloud.project}/topics/nowhere")
    try:
        with pytest.raises(JobError, match="nowhere"):
            job.wait_for("DONE", timeout=300)
    finally:
        job.cancel(timeout=300)


def test_a_value_out_of_range_is_an_error_and_does_not_end_the_kernel(cloud, model, topics):
    with pytest.raises(ValueError, match="max_response_tokens is 0: it must be 1 or more"):
        submit(cloud, model, topics, max_response_tokens=0)
    with pytest.raises(ValueError, match="there is no option --max-batch-sice"):
        submit(cloud, model, topics, beam_options=["--max-batch-sice=4"])


def test_an_update_answers_with_the_new_weights_and_loses_nothing(cloud, model, topics, tmp_path):
    other = tmp_path / "other"
    save_checkpoint("t5_distinct", other)
    path = model[1].replace("tiny.pt", "other.pt")
    convert(str(other), path, progress=False)
    changed = {
        "model_name": str(other),
        "state_dict_path": path,
        "temp_location": model[1].rpartition("/")[0] + "/temp",
        "responses_topic": topics["responses"],
        "messages_subscription": topics["messages-subscription"],
        "dead_letter_topic": topics["dead-letters"],
        "max_response_tokens": 4,
    }
    job = submit(cloud, model, topics, beam_options=["--labels=drain_after=4000000000"])
    job.wait_for("RUNNING", timeout=300)
    guard = job_guard.start(cloud.project, LOCATION, job.job_id, minutes=10)
    ids = pubsub.publish(topics["messages"], [f"prompt {n}" for n in range(10)])

    nowhere = {"responses_topic": f"projects/{cloud.project}/topics/nowhere"}
    with pytest.raises(JobError, match="nowhere"):
        dataflow.update(job, **(changed | nowhere), timeout=300)
    assert job.state() == "RUNNING", "an update that fails leaves the old job as it was"
    with pytest.raises(JobError, match="missing steps Write dead letters"):
        dataflow.update(job, **(changed | {"dead_letter_topic": None}), timeout=300)

    new = dataflow.update(job, transform_name_mapping={"Answer": "Answer"}, **changed, timeout=300)
    try:
        assert job.wait_for("UPDATED", timeout=300) == "UPDATED"
        assert job.successor() == new != job
        assert job_guard.deadline_of(new, otherwise=5.0) == 4e9, "the new job keeps the deadline"
        after = pubsub.publish(topics["messages"], ["after"])
        responses = pubsub.collect(topics["responses-subscription"], 11, timeout=300)
        by_id = {m.attributes["prompt_message_id"]: m.attributes["model_name"] for m in responses}
        assert sorted(by_id) == sorted(ids + after)
        assert by_id[after[0]] == str(other)
        assert guard.poll() is None, "the guard follows the job that replaced the old one"
        assert new.drain(timeout=300) == "DRAINED"
        with pytest.raises(JobError, match="is DRAINED: submit a new one"):
            dataflow.update(new, **changed)
        guard.wait(300)  # and ends with it
    finally:
        new.cancel(timeout=300)
        guard.kill()


def test_a_job_whose_kernel_died_is_found_and_its_guard_drains_it(cloud, model, topics):
    """As on Google Cloud, where a job outlives the machine that submitted it."""
    name = f"test-orphan-{uuid.uuid4().hex[:6]}"
    kernel = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys; from helpers.pipeline.__main__ import main; main(sys.argv[1:]);"
            "print('submitted', flush=True); signal.pause()",
            *(f"--messages-subscription={topics['messages-subscription']}",),
            *(f"--responses-topic={topics['responses']}",),
            *(f"--state-dict-path={model[1]}", f"--model-name={model[0]}", "--runner=DataflowRunner"),
            *(f"--project={cloud.project}", f"--region={LOCATION}", f"--job_name={name}"),
            *(f"--temp_location={model[1].rpartition('/')[0]}/temp", "--max-run-minutes=0.2"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "Submitted job" in kernel.stdout.readline()
        assert kernel.stdout.readline() == "submitted\n"
    finally:
        kernel.kill()
        kernel.wait()
        kernel.stdout.close()
    # Nobody drains it but the guard, perhaps while it is looked for here.
    wait_until(
        lambda: not [one for one in dataflow.list_series(cloud.project, LOCATION) if one.name == name],
        "the guard does not drain it",
    )


def test_jobs_of_this_series_are_listed_and_reaped(cloud, model, topics, capsys):
    job = submit(cloud, model, topics, beam_options=["--labels=drain_after=1"])
    assert job_guard.deadline_of(job, otherwise=5.0) == 1.0
    where = ["--project", cloud.project, "--region", LOCATION]
    assert main(["list", *where]) == 0
    assert "overdue=yes" in capsys.readouterr().out
    assert main(["list", *where, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed.keys() == {"name", "state", "minutes", "overdue", "job"}
    assert (listed["job"], listed["overdue"]) == (job.job_id, True)
    assert main(["watch", *where, "--minutes=0", job.job_id]) == 0
    assert "backlog=–  answered=0" in capsys.readouterr().out, "no subscription was named"
    assert main(["reap", *where, "--overdue"]) == 0
    assert job.job_id in capsys.readouterr().out
    assert main(["scale", *where, "--workers", "1", "3", job.job_id]) == 1
    assert "stay as they are" in capsys.readouterr().err
    assert job.state() in ("DRAINED", "CANCELLED")
    assert main(["list", *where]) == 0
    assert job.job_id not in capsys.readouterr().out
    assert main(["drain", *where, "no-such-job"]) == 1
    assert "no-such-job does not exist" in capsys.readouterr().err


PUBLISHED = """
import subprocess, sys
from helpers import dataflow, pubsub
from helpers.dataflow import job_guard
from helpers.load_state_dict import convert
from google.cloud import storage

checkpoint, project, bucket, location = sys.argv[1], "test-project", "published", "us-central1"
storage.Client(project=project).create_bucket(bucket)
model_name = checkpoint
state_dict_path = f"gs://{bucket}/run-inference/tiny.pt"
convert(checkpoint, state_dict_path, progress=False)
messages, responses = (pubsub.create_topic(project, name) for name in ("messages", "responses"))
answers = pubsub.create_subscription(responses, "answers")
subprocess.run(
    [
        sys.executable, "-m", "helpers.pipeline",
        f"--messages-topic={messages}",
        f"--responses-topic={responses}",
        f"--state-dict-path={state_dict_path}",
        f"--model-name={model_name}",
        "--runner=DataflowRunner",
        f"--project={project}",
        f"--temp_location=gs://{bucket}/temp",
        f"--region={location}",
        "--machine_type=n2-highmem-2",
    ],
    check=True,
)
(job,) = dataflow.list_series(project, location)
job.job.wait_for("RUNNING", timeout=300)
ids = pubsub.publish(messages, ["What is streaming?", "What is a model?"])
found = pubsub.collect(answers, 2, timeout=300)
assert sorted(m.attributes["prompt_message_id"] for m in found) == sorted(ids)
job.job.drain(timeout=300)
print("answered and", job.job.state())
"""


def test_the_published_command_works_with_its_flags_as_they_stand(tmp_path):
    save_checkpoint("t5_distinct", tmp_path / "flan-t5-tiny")
    command = [sys.executable, "-m", "helpers.local_cloud", "--dir", str(tmp_path / "cloud")]
    command += ["--project", "test-project", "--offline"]
    command += [sys.executable, "-c", PUBLISHED, str(tmp_path / "flan-t5-tiny")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answered and DRAINED" in done.stdout
