"""Vertex AI custom jobs on this machine.

What it does: create, get, list and cancel a CustomJob. Its one replica runs for real as a process on this
machine, in a sandbox of its own (see sandbox.py). The command and arguments of its `container_spec` are run:
`python`, `pip` and the like are the sandbox's, other programs this machine's.
`/gcs/BUCKET/...` in a command, an argument or a variable becomes the folder of the bucket's objects.
`scheduling.timeout` is enforced. The variables of a training container are set (AIP_MODEL_DIR and the like,
CLOUD_ML_JOB_ID, CLOUD_ML_PROJECT_ID, CLUSTER_SPEC).

A job's output goes to FOLDER/custom-job-ID.log, whose end is also in a failed job's error message. A job
ends with the local cloud.

What it does not imitate: images are not pulled, so an image's own entry point and programs are missing, and
this environment's packages stand in for the image's. Machine types and disks must be such as the service
accepts, and change nothing. Several replicas or worker pools and persistent resources are refused. A program
that itself opens /gcs does not find it. There is no Cloud Logging. Other kinds of Vertex AI jobs and
resources do not exist. Jobs are forgotten when the local cloud stops; their logs stay.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
from google.cloud.aiplatform_v1.types import job_service, job_state
from google.protobuf import empty_pb2

from ..front.grpc_service import add_service, failed_precondition, not_found
from ..front.labels import check_labels
from ..front.permissions import Permissions
from ..front.regions import REGIONS
from ..processes import sandbox
from ..processes.process_group import COMMAND_NOT_FOUND, ProcessGroup
from ..processes.scratch import Scratch
from .fields import TABLES
from .job import check, job_variables, timeout_seconds

LOG_END_CHARACTERS = 4000
_JOB_FAILED = 3  # the code that Vertex AI gives to a replica's failure: INVALID_ARGUMENT

State = job_state.JobState
_ENDED = {State.JOB_STATE_SUCCEEDED, State.JOB_STATE_FAILED, State.JOB_STATE_CANCELLED}
# Only where a path begins: after a space, a quote, an equals sign, a colon or nothing.
_GCS_PATH = re.compile(r"(?<![\w./-])/gcs/")
_SHELL_SAFE = re.compile(r"[\w./+-]+")


class CommandFailedError(Exception):
    """Why a job failed, for its user."""


@dataclass
class _Job:
    message: Any  # the CustomJob protobuf
    cancelled: threading.Event = field(default_factory=threading.Event)
    process: ProcessGroup | None = None
    thread: threading.Thread | None = None


class VertexAI:
    """The JobService, as far as custom jobs go.

    Args:
      folder: holds the logs and, while a job runs, its files.
      storage_root: the folder where object OBJECT of bucket BUCKET is the file BUCKET/OBJECT.
      environment: the environment variables of the processes that are started.
    """

    def __init__(self, folder: Path, storage_root: Path, environment: dict[str, str]):
        self._folder = folder
        self._storage_root = storage_root
        self._environment = environment
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._ids = itertools.count(time.time_ns() // 1000)

    def register(self, server: grpc.Server, permissions: Permissions) -> None:
        """Adds the service to a server."""
        add_service(
            server,
            "google.cloud.aiplatform.v1.JobService",
            {
                method: getattr(job_service, method.__name__ + "Request").pb()
                for method in (
                    self.CreateCustomJob,
                    self.GetCustomJob,
                    self.ListCustomJobs,
                    self.CancelCustomJob,
                )
            },
            TABLES,
            permissions,
        )

    def stop(self) -> None:
        """Ends the jobs that are still running."""
        with self._lock:
            running = [j for j in self._jobs.values() if j.message.state not in _ENDED]
        for job in running:
            self._cancel(job, grace_seconds=0)
        for job in running:
            if job.thread:
                job.thread.join(timeout=10)

    def CreateCustomJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        region = request.parent.rpartition("/")[2]
        if region not in REGIONS:
            raise not_found(f"{region} is not a region of Vertex AI.")
        check(request.custom_job)
        check_labels(request.custom_job.labels)
        message = _copy(request.custom_job)
        message.name = f"{request.parent}/customJobs/{next(self._ids)}"
        message.create_time.GetCurrentTime()
        job = _Job(message)
        with self._lock:
            self._set_state(job, State.JOB_STATE_PENDING)
            self._jobs[message.name] = job
            answer = _copy(message)
            job.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            job.thread.start()
        return answer

    def GetCustomJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            return _copy(self._job(request.name).message)

    def ListCustomJobs(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            jobs = [
                _copy(job.message)
                for name, job in reversed(self._jobs.items())
                if name.startswith(request.parent + "/")
            ]
        return job_service.ListCustomJobsResponse.pb()(custom_jobs=jobs)

    def CancelCustomJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            job = self._job(request.name)
            if job.message.state in _ENDED:
                raise failed_precondition(
                    f"CustomJob {request.name} cannot be cancelled: it is in state "
                    f"{State(job.message.state).name}."
                )
            self._set_state(job, State.JOB_STATE_CANCELLING)
        threading.Thread(target=self._cancel, args=(job,), daemon=True).start()
        return empty_pb2.Empty()

    def _job(self, name: str) -> _Job:
        if name not in self._jobs:
            raise not_found(f"The CustomJob {name} does not exist.")
        return self._jobs[name]

    def _set_state(self, job: _Job, state: State, error: str = "") -> None:
        """Expects the lock to be held."""
        job.message.state = state
        job.message.update_time.GetCurrentTime()
        if state == State.JOB_STATE_RUNNING:
            job.message.start_time.GetCurrentTime()
        if state in _ENDED:
            job.message.end_time.GetCurrentTime()
        if error:
            job.message.error.code = _JOB_FAILED
            job.message.error.message = error

    def _cancel(self, job: _Job, grace_seconds: float = 5.0) -> None:
        with self._lock:
            job.cancelled.set()
            process = job.process
        if process:
            process.stop(grace_seconds)

    def _run(self, job: _Job) -> None:
        """Takes a job from its creation to its end; runs in a thread of its own."""
        id_ = job.message.name.rpartition("/")[2]
        state, error = State.JOB_STATE_SUCCEEDED, ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            log_path = self._folder / f"custom-job-{id_}.log"
            with ExitStack() as cleanup, log_path.open("ab", buffering=0) as log:
                try:
                    self._run_replica(job, cleanup, log)
                except CommandFailedError as reason:
                    state, error = State.JOB_STATE_FAILED, f"{reason}\nThe log {log_path} ends:\n"
                    error += log_path.read_text(errors="replace")[-LOG_END_CHARACTERS:]
        except Exception as reason:  # such as a full disk: the job must end whatever happens
            state, error = State.JOB_STATE_FAILED, f"The job could not be run: {reason!r}"
        with self._lock:
            if job.cancelled.is_set():
                state, error = State.JOB_STATE_CANCELLED, ""
            self._set_state(job, state, error)

    def _run_replica(self, job: _Job, cleanup: ExitStack, log: IO[bytes]) -> None:
        scratch = Scratch(self._folder / "run")
        cleanup.callback(scratch.remove)
        box = sandbox.create(scratch.path / "sandbox")
        work = scratch.path / "work"
        work.mkdir()
        mount = self._mount(scratch.path, cleanup)
        pool = job.message.job_spec.worker_pool_specs[0]
        spec = pool.container_spec

        variables = box.environment(self._environment) | job_variables(job.message)
        variables |= {v.name: _GCS_PATH.sub(mount, v.value) for v in spec.env}
        deadline = time.monotonic() + timeout_seconds(job.message)

        def run(command: list[str]) -> int:
            log.write(f"+ {' '.join(command)}\n".encode())
            with self._lock:
                if job.cancelled.is_set():
                    return 0
                job.process = ProcessGroup(command, work, variables, log)
            status = job.process.wait(max(0.0, deadline - time.monotonic()))
            if status is None:
                job.process.stop()
                limit = timeout_seconds(job.message)
                raise CommandFailedError(f"The job ran longer than its timeout of {limit:g} s and was ended.")
            return status

        command = [*spec.command, *spec.args]
        if not command:
            raise CommandFailedError(
                f"The container_spec has no command, and the local cloud does not pull {spec.image_uri}, "
                "whose entry point would otherwise be used: give a command."
            )
        if (box.programs / Path(command[0]).name).exists():
            command[0] = str(box.programs / Path(command[0]).name)
        with self._lock:
            if not job.cancelled.is_set():
                self._set_state(job, State.JOB_STATE_RUNNING)
        status = run([_GCS_PATH.sub(mount, part) for part in command])
        if status == COMMAND_NOT_FOUND:
            log.write(b"No image is pulled here: a job's command must be a program on this machine.\n")
        if status:
            raise CommandFailedError(f"The replica workerpool0-0 exited with a non-zero status of {status}.")

    def _mount(self, folder: Path, cleanup: ExitStack) -> str:
        """A path for /gcs/ that a shell takes as one word, whatever the folder of the objects is called."""
        if not _SHELL_SAFE.fullmatch(str(folder)):
            folder = Path(tempfile.mkdtemp(prefix="gcs-"))
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        mount = folder / "gcs"
        mount.symlink_to(self._storage_root.absolute(), target_is_directory=True)
        return f"{mount}/"


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
