"""Vertex AI custom jobs of the local cloud, driven with the unmodified SDK."""

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from google.api_core import exceptions
from google.cloud import aiplatform, storage
from google.cloud.aiplatform_v1.types import JobState

from helpers.local_cloud.processes import sandbox

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process may leave its session")

LOCATION = "us-central1"
PREBUILT_IMAGE = "us-docker.pkg.dev/vertex-ai/training/pytorch-cpu.2-4.py310:latest"
OTHER_IMAGE = "python:3.11"
MACHINE = {"machine_type": "n1-standard-4"}
ENDED = {JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED}

SCRIPT = """
import importlib.util, os, sys
from google.cloud import storage
bucket = storage.Client().bucket(os.environ["BUCKET"])
report = [" ".join(sys.argv[1:]), os.environ["AIP_MODEL_DIR"], str(importlib.util.find_spec("helpers"))]
bucket.blob("reports/" + os.environ["CLOUD_ML_JOB_ID"]).upload_from_string("|".join(report))
"""


@pytest.fixture(scope="module")
def bucket(cloud):
    return storage.Client(project=cloud.project).create_bucket("vertex-ai-test")


@pytest.fixture(scope="module")
def vertex_ai(cloud, bucket):
    aiplatform.init(project=cloud.project, location=LOCATION, staging_bucket=f"gs://{bucket.name}/staging")


def run_to_the_end(job, timeout_seconds=None, wait_seconds=300):
    """Submits a job and waits for its end, without the SDK's polling every 5 s."""
    job.submit(timeout=timeout_seconds)
    return wait_for(job, ENDED, wait_seconds)


def wait_for(job, states, seconds=300):
    end = time.monotonic() + seconds
    while job.state not in states:
        assert time.monotonic() < end, f"{job.resource_name} is still in {job.state}"
        time.sleep(0.1)
    return job


def container_job(name, command, args=(), env=None, **options):
    spec = {"image_uri": OTHER_IMAGE, "command": command, "args": list(args)}
    spec["env"] = [{"name": k, "value": v} for k, v in (env or {}).items()]
    pool = {"machine_spec": MACHINE, "replica_count": 1, "container_spec": spec}
    return aiplatform.CustomJob(display_name=name, worker_pool_specs=[pool], **options)


def python_job(name, code, **options):
    return container_job(name, ["python3", "-c", code], **options)


def test_run_waits_for_the_job(vertex_ai):
    job = python_job("waits", "print('done')")
    job.run(sync=True)
    assert job.state == JobState.JOB_STATE_SUCCEEDED
    assert job.end_time >= job.start_time >= job.create_time


def test_gcs_paths_are_the_buckets_also_in_a_shell_and_with_spaces(vertex_ai, bucket):
    bucket.blob("a folder/in put.txt").upload_from_string("spaces\n")
    source = shlex.quote(f"/gcs/{bucket.name}/a folder/in put.txt")
    command = f"mkdir -p /gcs/{bucket.name}/out && cat {source} > /gcs/{bucket.name}/out/copy.txt"
    job = run_to_the_end(container_job("shell", ["sh", "-c", command]))
    assert job.state == JobState.JOB_STATE_SUCCEEDED, job.error
    assert bucket.blob("out/copy.txt").download_as_text() == "spaces\n"
    code = "import os, sys; open(sys.argv[1], 'w').write(open(os.environ['SOURCE']).read() * 2)"
    job = container_job(
        "arguments",
        ["python3", "-c", code],
        [f"/gcs/{bucket.name}/out/two copies.txt"],
        {"SOURCE": f"/gcs/{bucket.name}/out/copy.txt"},
    )
    assert run_to_the_end(job).state == JobState.JOB_STATE_SUCCEEDED, job.error
    assert bucket.blob("out/two copies.txt").download_as_text() == "spaces\nspaces\n"


def test_a_failing_job_says_what_its_log_says(vertex_ai):
    job = run_to_the_end(python_job("fails", "raise ValueError('the weights are damaged')"))
    assert job.state == JobState.JOB_STATE_FAILED
    assert "non-zero status of 1" in job.error.message
    assert "ValueError: the weights are damaged" in job.error.message
    log = next(line for line in job.error.message.splitlines() if "The log " in line)
    assert Path(log.split("The log ")[1].removesuffix(" ends:")).is_file()


def test_a_command_that_is_not_there_fails_with_the_reason(vertex_ai):
    job = run_to_the_end(container_job("absent", ["only-in-the-image"]))
    assert job.state == JobState.JOB_STATE_FAILED
    assert "only-in-the-image" in job.error.message
    assert "No image is pulled" in job.error.message


def test_a_cancelled_job_ends_with_all_its_processes(vertex_ai, tmp_path):
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pids) + ".part"!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(pids) + ".part"!r}, {str(pids)!r})
time.sleep(600)
"""
    job = python_job("cancelled", code)
    job.submit()
    wait_until(pids.exists)
    running = [int(pid) for pid in pids.read_text().split()]
    assert job.state == JobState.JOB_STATE_RUNNING
    job.cancel()
    wait_for(job, ENDED)
    assert job.state == JobState.JOB_STATE_CANCELLED
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in running))
    with pytest.raises(exceptions.FailedPrecondition):
        job.api_client.cancel_custom_job(name=job.resource_name)


def test_a_job_is_ended_at_its_timeout(vertex_ai):
    job = python_job("slow", "import time; time.sleep(600)")
    run_to_the_end(job, timeout_seconds=2)
    assert job.state == JobState.JOB_STATE_FAILED
    assert "timeout of 2 s" in job.error.message


def test_a_job_that_cannot_be_run_here_is_refused(vertex_ai, cloud):
    several = container_job("several", ["true"])
    several._gca_resource.job_spec.worker_pool_specs[0].replica_count = 2
    with pytest.raises(exceptions.MethodNotImplemented, match="replica"):
        several.submit()
    nameless = container_job("nameless", ["true"])
    nameless._gca_resource.job_spec.worker_pool_specs[0].machine_spec.machine_type = ""
    with pytest.raises(exceptions.InvalidArgument, match="machine_type"):
        nameless.submit()
    absent = f"projects/{cloud.project}/locations/{LOCATION}/customJobs/123"
    with pytest.raises(exceptions.NotFound, match="123"):
        aiplatform.CustomJob.get(absent)


def test_what_a_job_installs_stays_in_its_sandbox(tmp_path):
    before = host_packages()
    box = sandbox.create(tmp_path / "a sandbox")
    package = source_package(tmp_path / "package", "installed_in_a_sandbox")
    commands = [
        "pip install --upgrade pip",
        f"pip3 install -q --user {shlex.quote(str(package))}",
        f"python -m pip install --user --force-reinstall {shlex.quote(str(package))}",
        "python3 -c 'import installed_in_a_sandbox, google.cloud.storage'",
        "pip uninstall -y google-cloud-storage; python3 -c 'import google.cloud.storage'",
    ]
    for command in commands:
        in_sandbox(box, command)
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        in_sandbox(box, "pip install a-package-that-is-nowhere")
    assert host_packages() == before
    box.remove()
    assert host_packages() == before


def test_a_sandbox_sees_the_environment_but_not_the_project(tmp_path):
    box = sandbox.create(tmp_path / "sandbox")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    absent = in_sandbox(box, "python -c 'import helpers' 2>&1 || true", environment)
    assert "ModuleNotFoundError" in absent
    assert in_sandbox(box, "python -c 'import apache_beam; print(apache_beam.__version__)'").strip()
    assert "streaming-llm-helpers" not in in_sandbox(box, "pip list")


@pytest.mark.parametrize("end", ["kill", "stop"])
@pytest.mark.parametrize("own_session", [False, pytest.param(True, marks=on_linux)])
def test_a_job_ends_with_its_starter_and_all_its_processes_with_it(tmp_path, own_session, end):
    code = f"""
import os, subprocess, sys, time
from pathlib import Path
from helpers.local_cloud.processes.process_group import ProcessGroup
sleeper = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
if {own_session}:
    start = f"import subprocess; subprocess.Popen({{sleeper}}, start_new_session=True).wait()"
    command = [sys.executable, "-c", start]
else:
    command = sleeper
log = open({str(tmp_path / "log")!r}, "wb")
group = ProcessGroup(command, Path({str(tmp_path)!r}), dict(os.environ), log)
sys.stdin.readline()
group.stop(grace_seconds=0.1)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    pid = int(log.read_text())
    assert psutil.pid_exists(pid)
    starter.kill() if end == "kill" else starter.communicate(b"\n")
    starter.wait()
    wait_until(lambda: not psutil.pid_exists(pid))


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def in_sandbox(box, command, environment=None):
    variables = box.environment(environment or os.environ)
    done = subprocess.run(
        ["sh", "-c", command], env=variables, cwd=box.folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def source_package(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    setup = f"from setuptools import setup; setup(name='{name}', version='1', packages=['{name}'])"
    (folder / "setup.py").write_text(setup)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, check=True, capture_output=True)
    return next((folder / "dist").iterdir())


def host_packages():
    """A digest of `pip list` and of the names, sizes and times in this environment's packages."""
    listed = subprocess.run([sys.executable, "-m", "pip", "list"], check=True, capture_output=True)
    digest = hashlib.sha256(listed.stdout)
    for folder, folders, files in os.walk(sysconfig.get_path("purelib")):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(files):
            status = os.lstat(os.path.join(folder, name))
            digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
