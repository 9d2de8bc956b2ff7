"""Conversion by a Vertex AI custom job, which the local cloud runs for real, in an environment of its own."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint_folders
import pytest
import torch
from conftest import wait_until
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import JobServiceClient
from safetensors.torch import load_file

from helpers.files import storage
from helpers.files.labels import label_value
from helpers.load_state_dict import vertex_conversion
from helpers.load_state_dict.__main__ import main
from helpers.load_state_dict.custom_job import CustomJobError
from helpers.load_state_dict.engine_file import read_engine_file
from helpers.load_state_dict.manifest import companion_folder, read_manifest
from helpers.load_state_dict.vertex_conversion import IMAGE, vertex, where_to_convert

LOCATION = "us-central1"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / 'a model\'s "name"'
    checkpoint_folders.save_t5(folder)
    return folder


def jobs(project: str) -> list:
    client = JobServiceClient(client_options={"api_endpoint": f"{LOCATION}-aiplatform.googleapis.com"})
    return list(client.list_custom_jobs(parent=f"projects/{project}/locations/{LOCATION}"))


def names(bucket) -> set[str]:
    return {blob.name for blob in bucket.client.list_blobs(bucket)}


def test_a_job_writes_what_is_asked_for_whatever_its_names(cloud, bucket, model, tmp_path, capsys):
    path = f'gs://{bucket.name}/run inference/it\'s "a" $HOME; model.pt'
    target = {"project": cloud.project, "bucket": bucket.name, "location": LOCATION}
    manifest = vertex(str(model), path, **target)
    assert "succeeded after" in capsys.readouterr().out

    assert manifest == read_manifest(path)
    blob = bucket.get_blob(path.removeprefix(f"gs://{bucket.name}/"))
    assert (blob.size, blob.crc32c) == (manifest.bytes, manifest.crc32c)
    storage.download(path, tmp_path / "m.pt")
    assert storage.crc32c_of(tmp_path / "m.pt") == manifest.crc32c
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    expected = load_file(model / "model.safetensors")
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in expected.items())
    companion = companion_folder(path).removeprefix(f"gs://{bucket.name}/")
    assert {f"{companion}/{name}" for name in [*manifest.files, "manifest.json"]} <= names(bucket)
    assert not [name for name in names(bucket) if name.startswith("checkpoints/") or ".parts/" in name]

    job = jobs(cloud.project)[0]
    assert job.display_name == f"Load {model}"
    assert job.labels["step"] == "convert" and job.labels["dtype"] == "float16"
    worker_pool = job.job_spec.worker_pool_specs[0]
    assert worker_pool.container_spec.image_uri == IMAGE
    assert worker_pool.machine_spec.machine_type == "e2-highmem-2"
    assert worker_pool.disk_spec.boot_disk_size_gb == 100
    assert job.job_spec.scheduling.timeout.total_seconds() == 240 * 60

    before = len(jobs(cloud.project))
    assert vertex(str(model), path, **target) == manifest
    assert "Nothing to do" in capsys.readouterr().out
    assert len(jobs(cloud.project)) == before
    assert vertex(str(model), path, **target, engine_file="int8") == manifest
    assert read_engine_file(path, "int8").source == manifest.version
    assert vertex(str(model), path, **target, engine_file="int8") == manifest
    assert len(jobs(cloud.project)) == before + 1


def test_the_published_command_line_works_and_a_failure_shows_the_end_of_the_log(
    cloud, bucket, model, capsys
):
    """The job starts, finds the checkpoint damaged, and says so here."""
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    status = main(
        [
            "vertex",
            f"--model-name={model}",
            f"--state-dict-path=gs://{bucket.name}/run-inference/m.pt",
            "--job-name=Load it's",
            f"--project={cloud.project}",
            f"--bucket={bucket.name}",
            f"--location={LOCATION}",
            "--machine-type=e2-highmem-4",
            "--disk-size-gb=150",
            "--timeout-minutes=5",
            f"--service-account=converter@{cloud.project}.iam.gserviceaccount.com",
        ]
    )
    assert status == 1
    error = capsys.readouterr().err
    assert "error: The job ended as FAILED" in error
    assert "model.safetensors is damaged or incomplete" in error
    assert not any(name.startswith("run-inference/") for name in names(bucket))
    job = jobs(cloud.project)[0]
    assert job.display_name == "Load it's"
    assert job.job_spec.worker_pool_specs[0].machine_spec.machine_type == "e2-highmem-4"
    assert job.job_spec.worker_pool_specs[0].disk_spec.boot_disk_size_gb == 150
    assert job.job_spec.service_account.startswith("converter@")
    assert job.job_spec.scheduling.timeout.total_seconds() == 300


class Terminal:
    """A command that runs in a terminal of its own, where somebody can press Ctrl-C and answer a question."""

    def __init__(self, command: list[str], is_terminal: bool) -> None:
        self.keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=terminal if is_terminal else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(terminal)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.said = ""

    def wait_for(self, text: str) -> None:
        def appeared() -> bool:
            self.said += (self.process.stdout.read() or b"").decode()
            return text in self.said

        wait_until(appeared, f"{text!r} did not appear")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait(300)
        self.process.stdout.close()
        os.close(self.keyboard)


@pytest.mark.parametrize(
    ("is_terminal", "answer", "goes_on"),
    [
        pytest.param(False, b"", False, id="nobody to ask"),
        pytest.param(True, b"y\n", False, id="yes", marks=pytest.mark.slow),
        pytest.param(True, b"n\n", True, id="no"),
    ],
)
def test_ctrl_c_asks_whether_to_cancel(is_terminal, answer, goes_on, cloud, bucket, model):
    path = f"gs://{bucket.name}/m.pt"
    command = [sys.executable, "-m", "helpers.load_state_dict", "vertex", f"--model-name={model}"]
    command += [f"--state-dict-path={path}", f"--project={cloud.project}", f"--bucket={bucket.name}"]
    command += [f"--location={LOCATION}"]
    with Terminal(command, is_terminal) as terminal:
        terminal.wait_for(" after ")  # its first state
        terminal.process.send_signal(signal.SIGINT)
        if is_terminal:
            terminal.wait_for("Cancel the job?")
            os.write(terminal.keyboard, answer)
        terminal.wait_for("the job goes on" if goes_on else "The job was cancelled")
        assert terminal.process.wait(300) == 1
    ended = {"JOB_STATE_SUCCEEDED", "JOB_STATE_CANCELLED", "JOB_STATE_FAILED"}
    wait_until(lambda: jobs(cloud.project)[0].state.name in ended, "the job did not end")
    assert jobs(cloud.project)[0].state.name == ("JOB_STATE_SUCCEEDED" if goes_on else "JOB_STATE_CANCELLED")
    assert storage.exists(path) == goes_on


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state_dict_path": "m.pt"}, ValueError, "can only write to gs://"),
        (
            {"state_dict_path": "gs://no-such-bucket/m.pt"},
            FileNotFoundError,
            "'no-such-bucket' .* does not exist",
        ),
        ({"bucket": "no-such-bucket"}, FileNotFoundError, "'no-such-bucket' .* does not exist"),
        ({"disk_size_gb": 50}, ValueError, "give 100 or more"),
        ({"machine_type": "e2-standard-2"}, ValueError, "of e2-standard it takes e2-standard-4"),
        ({"machine_type": "n4-standard-4"}, ValueError, "it takes the families e2, n2"),
        ({"timeout_minutes": 0}, ValueError, "give 1 or more"),
        ({"dtype": "int8"}, ValueError, "not one of float16"),
        ({"model_name": "./nowhere"}, ValueError, "There is no folder nowhere"),
        ({"location": "atlantis"}, CustomJobError, "atlantis, did not accept the job"),
    ],
)
def test_mistakes_are_told_before_a_job_is_started(change, error, message, cloud, bucket, model):
    before = len(jobs(cloud.project))
    given = {
        "model_name": str(model),
        "state_dict_path": f"gs://{bucket.name}/m.pt",
        "project": cloud.project,
        "bucket": bucket.name,
        "location": LOCATION,
    }
    with pytest.raises(error, match=message):
        vertex(**given | change)
    assert len(jobs(cloud.project)) == before
    assert not [name for name in names(bucket) if name.startswith("checkpoints/")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("google/flan-t5-xl", "google-flan-t5-xl"), ("Ünï codé!", "n-cod"), ("x" * 100, "x" * 63), ("'--'", "")],
)
def test_any_text_becomes_a_label(text, expected):
    assert label_value(text) == expected
    aiplatform.utils.validate_labels({"name": label_value(text)})


def test_where_to_convert_is_said_with_the_reason(model, monkeypatch):
    place, reason = where_to_convert(str(model))
    assert place == "here"
    place, reason = where_to_convert("google/flan-ul2")
    assert reason.startswith("google/flan-ul2 takes 1")
    monkeypatch.setattr(vertex_conversion, "machine_memory_bytes", lambda: 2**20)
    assert where_to_convert(str(model))[0] == "Vertex AI"
