"""Everything that a job lacks is found before it is submitted, in one list, with what fixes it."""

import dataclasses
import subprocess
import sys
import uuid

import pytest
from google.cloud import pubsub_v1
from google.protobuf.duration_pb2 import Duration
from tiny_models import save_checkpoint

from helpers import pubsub
from helpers.dataflow.job_checks import PreflightError, misses, preflight, require
from helpers.dataflow.job_estimate import estimate
from helpers.files.storage import parse, read_bytes
from helpers.files.transfer import crc32c_of_bytes
from helpers.load_state_dict import convert
from helpers.load_state_dict.manifest import companion_folder, read_manifest
from helpers.models.names import CONFIGS

LOCATION = "us-central1"


@pytest.fixture(scope="module")
def ready(tmp_path_factory, cloud, storage_client):
    """The arguments of a job that lacks nothing."""
    run = uuid.uuid4().hex[:8]
    checkpoint = tmp_path_factory.mktemp("llama")
    save_checkpoint("llama", checkpoint)
    bucket = storage_client.create_bucket(f"preflight-{run}", location=LOCATION)
    path = f"gs://{bucket.name}/run-inference/tiny.pt"
    convert(str(checkpoint), path, progress=False)
    topics = {name: pubsub.create_topic(cloud.project, f"{name}-{run}") for name in ("messages", "responses")}
    yield {
        "project": cloud.project,
        "location": LOCATION,
        "temp_location": f"gs://{bucket.name}/temp",
        "state_dict_path": path,
        "model_name": str(checkpoint),
        "messages_subscription": pubsub.create_subscription(topics["messages"], f"messages-{run}"),
        "responses_topic": topics["responses"],
        "job_name": f"preflight-{run}",
    }
    pubsub.delete(*topics.values(), f"projects/{cloud.project}/subscriptions/messages-{run}")
    bucket.delete(force=True)


def only_miss(arguments: dict, **changes):
    (miss,) = misses(preflight(**(arguments | changes)))
    return miss


def test_a_job_that_has_everything_misses_nothing(ready):
    findings = preflight(**ready)
    assert misses(findings) == []
    require(findings)
    subjects = " ".join(finding.subject for finding in findings if finding.result == "ok")
    for name in ("bucket preflight", "topic", "subscription", "state dict", "machine n4-", "job name"):
        assert name in subjects
    # What the local cloud does not imitate is reported as skipped, neither fine nor missing.
    skipped = {finding.subject for finding in findings if finding.result == "skipped"}
    assert skipped == {"APIs", "Compute Engine", f"permissions in {ready['project']}"}
    assert findings[0].row().keys() == {"what", "result", "detail", "mend"}


def test_all_misses_come_in_one_list_each_with_what_mends_it(ready):
    arguments = ready | {
        "temp_location": "gs://no-such-bucket-here/temp",
        "state_dict_path": ready["state_dict_path"].replace("tiny", "absent"),
        "responses_topic": f"projects/{ready['project']}/topics/nowhere",
        "dead_letter_topic": "dead-letters",
        "messages_subscription": f"projects/{ready['project']}/subscriptions/nothing",
    }
    with pytest.raises(PreflightError) as error:
        require(preflight(**arguments))
    text = str(error.value)
    assert "gcloud storage buckets create gs://no-such-bucket-here" in text
    assert "python -m helpers.load_state_dict local" in text
    assert "gcloud pubsub topics create nowhere" in text
    assert "write it as projects/PROJECT/topics/TOPIC" in text
    assert "gcloud pubsub subscriptions create nothing" in text
    assert "5. " in text
    assert "6. " not in text


def test_a_bucket_in_another_region_is_a_miss(ready, storage_client):
    elsewhere = storage_client.create_bucket(f"far-{uuid.uuid4().hex[:8]}", location="EUROPE-WEST4")
    around = storage_client.create_bucket(f"wide-{uuid.uuid4().hex[:8]}", location="US")
    try:
        miss = only_miss(ready, temp_location=f"gs://{elsewhere.name}/temp")
        assert "it is in EUROPE-WEST4, and the job in us-central1" in miss.detail
        assert "--location=us-central1" in miss.mend
        assert misses(preflight(**(ready | {"temp_location": f"gs://{around.name}/temp"}))) == []
    finally:
        elsewhere.delete()
        around.delete()


def test_a_temporary_folder_on_this_machine_is_a_miss(ready):
    assert only_miss(ready, temp_location="/tmp/x").mend == "give gs://BUCKET/temp"


def test_another_models_state_dict_is_a_miss(ready):
    miss = only_miss(ready, model_name="google/flan-t5-small")
    assert miss.detail == f"it was made from {ready['model_name']}"


def place(storage_client, ready, name: str, *, data: bytes | None = None, config: bytes | None = None) -> str:
    """Another state dict in the bucket, with the first one's files and its own manifest; returns its path."""
    path = ready["state_dict_path"]
    other = path.replace("tiny", name)
    manifest = read_manifest(path)
    files = {one: read_bytes(f"{companion_folder(path)}/{one}") for one in manifest.files}
    files |= {"config.json": config or files["config.json"]}
    checksums = {one: crc32c_of_bytes(content) for one, content in files.items()}
    files["manifest.json"] = dataclasses.replace(manifest, checksums=checksums).to_json().encode()
    bucket = storage_client.bucket(parse(other)[0])
    bucket.blob(parse(other)[1]).upload_from_string(data or read_bytes(path))
    for one, content in files.items():
        bucket.blob(parse(f"{companion_folder(other)}/{one}")[1]).upload_from_string(content)
    return other


def test_an_image_with_another_python_is_a_miss(ready):
    here = f"py3{sys.version_info.minor}"
    assert misses(preflight(**ready, image=f"r/p/worker-cpu:{here}-0123456789ab")) == []
    assert misses(preflight(**ready, image="gcr.io/p/mine:latest")) == []
    miss = only_miss(ready, image="r/p/worker-cpu:py39-0123456789ab")
    assert "Python 3.9, and this is Python 3." in miss.detail


def test_a_companion_file_of_another_version_is_a_miss(ready, storage_client):
    path = place(storage_client, ready, "mixed")
    bucket, name = parse(f"{companion_folder(path)}/tokenizer.json")
    storage_client.bucket(bucket).blob(name).upload_from_string("{}")
    miss = only_miss(ready, state_dict_path=path)
    assert "tokenizer.json is not there, or is not the one" in miss.detail


def test_a_state_dict_that_was_changed_after_its_manifest_is_a_miss(ready, storage_client):
    path = place(storage_client, ready, "changed", data=b"something else")
    miss = only_miss(ready, state_dict_path=path)
    assert "not the file that its manifest describes" in miss.detail
    assert miss.mend.endswith("--overwrite")


def test_a_subscription_that_dataflow_cannot_use_is_a_miss(ready):
    name = uuid.uuid4().hex[:8]
    path = f"projects/{ready['project']}/subscriptions/gone-{name}"
    topic = pubsub.create_topic(ready["project"], f"gone-{name}")
    pubsub.create_subscription(topic, f"gone-{name}")
    pubsub.delete(topic)
    try:
        assert "its topic is gone" in only_miss(ready, messages_subscription=path).detail
    finally:
        pubsub.delete(path)
    found = pubsub_v1.types.Subscription(retry_policy={"minimum_backoff": Duration(seconds=1)})
    assert "retry_policy" in found, "as the check asks"


def test_a_machine_without_room_for_the_model_is_a_miss(ready, storage_client):
    assert only_miss(ready, machine_type="n4-standard-2", device="cuda").detail == "it has no GPU"
    unknown = preflight(**(ready | {"machine_type": "m9-giant-1"}))
    assert misses(unknown) == []
    assert any("catalogue" in finding.detail for finding in unknown)

    config = (CONFIGS / "google--flan-t5-xl.json").read_bytes()
    xl = ready | {"state_dict_path": place(storage_client, ready, "xl", config=config)}
    miss = only_miss(xl, machine_type="n4-standard-2")
    assert "GB, but the machine has 5.3 GB for it" in miss.detail
    assert "--machine_type=n4-highmem-4" in miss.mend
    assert only_miss(xl, machine_type="n2-highmem-2").mend.startswith("give --machine_type=n2-highmem-4")
    assert misses(preflight(**xl, machine_type="n4-highmem-4")) == []
    large = {"max_batch_size": 512, "max_batch_tokens": 512 * 1024, "max_response_tokens": 512}
    assert "GB for it" in only_miss(xl, machine_type="n4-highmem-4", **large).detail


def test_the_command_line_takes_the_jobs_own_and_says_what_is_missing(ready, tmp_path):
    command = [sys.executable, "-m", "helpers.dataflow", "preflight", "--runner=DataflowRunner"]
    command += [f"--messages-subscription={ready['messages_subscription']}"]
    command += [f"--responses-topic={ready['responses_topic']}-2", f"--model-name={ready['model_name']}"]
    command += [f"--state-dict-path={ready['state_dict_path']}", f"--project={ready['project']}"]
    command += [f"--region={LOCATION}", f"--temp_location={ready['temp_location']}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    assert "1. topic" in done.stderr
    assert "gcloud pubsub topics create" in done.stderr
    assert "ok      bucket" in done.stdout


def test_the_estimate_is_workers_times_price_times_hours():
    assert estimate("n4-standard-2", 0.5, hours=3, most_workers=4).cost == (1.5, 6.0)
    assert "1 to 4 workers of n4-standard-2 for 3 h: 1.50 to 6.00" in str(
        estimate("n4-standard-2", 0.5, hours=3)
    )
    assert "2 workers of g2-standard-4 for 0.5 h: 1.00" in str(
        estimate("g2-standard-4", 1.0, hours=0.5, least_workers=2, most_workers=2)
    )
    with pytest.raises(ValueError, match="at least 1"):
        estimate("n4-standard-2", 0.5, hours=1, least_workers=3, most_workers=2)
    with pytest.raises(ValueError, match="price_per_hour=-1"):
        estimate("n4-standard-2", -1, hours=1)
