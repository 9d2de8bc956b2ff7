"""A submitted job answers messages, is drained with nothing lost, and sees only what was staged."""

import uuid

import pytest
from tiny_models import save_checkpoint

from helpers import dataflow, pipeline, pubsub
from helpers.dataflow import Job, JobError, valid_job_name
from helpers.load_state_dict import convert


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
    return dataflow.submit(
        project=cloud.project,
        location="us-central1",
        temp_location=model[1].rpartition("/")[0] + "/temp",
        job_name=f"test-{uuid.uuid4().hex[:8]}",
        model_name=model[0],
        state_dict_path=model[1],
        responses_topic=topics["responses"],
        messages_subscription=topics["messages-subscription"],
        dead_letter_topic=topics["dead-letters"],
        max_response_tokens=4,
        **options,
    )


def test_a_job_answers_each_message_and_is_drained_with_nothing_lost(cloud, model, topics):
    # Before the job runs: on a subscription they wait for it.
    early = pubsub.publish(topics["messages"], ["early"], origin="test")
    job = submit(cloud, model, topics)
    assert job.wait_for("RUNNING", timeout=120) == "RUNNING"
    assert [active.job_id for active in dataflow.find_active(cloud.project, "us-central1", "test-")]
    ids = early + pubsub.publish(topics["messages"], [f"prompt {n}" for n in range(20)], origin="test")
    bad = pubsub.publish(topics["messages"], [b"\xff", b"  "], origin="test")

    responses = pubsub.collect(topics["responses-subscription"], len(ids), timeout=120)
    assert sorted(m.attributes["prompt_message_id"] for m in responses) == sorted(ids)
    assert {m.attributes["origin"] for m in responses} == {"test"}
    assert {m.attributes["model_name"] for m in responses} == {model[0]}
    dead = pubsub.collect(topics["dead-letters-subscription"], 2, timeout=60)
    assert {m.attributes["prompt_message_id"]: m.data for m in dead} == dict(
        zip(bad, [b"\xff", b"  "], strict=True)
    )
    assert all(m.attributes["error"] for m in dead)

    assert job.drain(timeout=60) == "DRAINED"
    assert job.drain() == "DRAINED", "draining a drained job changes nothing"
    counters = job.counters()
    assert (counters["models_loaded"], counters["dead_letters"]) == (1, 2)
    # What comes after the drain waits for the next job.
    late = pubsub.publish(topics["messages"], ["late"])
    assert [m.message_id for m in pubsub.collect(topics["messages-subscription"], 1, timeout=20)] == late


def test_a_job_without_the_helpers_staged_fails_for_that_reason(cloud, model, topics):
    """What the worker imports came from Cloud Storage, not from this environment."""
    result = pipeline.run(
        [
            f"--messages-subscription={topics['messages-subscription']}",
            f"--responses-topic={topics['responses']}",
            f"--state-dict-path={model[1]}",
            f"--model-name={model[0]}",
            "--runner=DataflowRunner",
            f"--project={cloud.project}",
            "--region=us-central1",
            f"--temp_location={model[1].rpartition('/')[0]}/temp",
            f"--job_name=bare-{uuid.uuid4().hex[:8]}",
        ]
    )
    job = Job(cloud.project, "us-central1", result.job_id())
    pubsub.publish(topics["messages"], ["Hi"])
    try:
        with pytest.raises(JobError, match="No module named 'helpers'"):
            job.wait_for("DONE", timeout=90)
    finally:
        job.cancel(timeout=60)


def test_a_job_that_does_not_come_in_time_is_told_with_its_page(cloud, model, topics):
    job = submit(cloud, model, topics)
    with pytest.raises(JobError, match=f"still .*{job.job_id}"):
        job.wait_for("DRAINED", timeout=0)
    assert job.cancel(timeout=60) == "CANCELLED"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ask-google/flan-t5-small-1", "ask-google-flan-t5-small-1"),
        ("Load It!", "load-it"),
        ("7 dwarfs", "job-7-dwarfs"),
        ("x" * 70, "x" * 63),
        ("/", "job"),
    ],
)
def test_job_names_become_valid(text, name):
    assert valid_job_name(text) == name
