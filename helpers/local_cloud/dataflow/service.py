"""Dataflow on this machine, for pipelines of Beam's Python SDK.

What it does: jobs are created, read, listed, drained, cancelled and updated (their runtime parameters, or by
replacing a stateless job with another) through Dataflow's own API, as are their messages and user
metrics; Beam's DataflowRunner submits to it unchanged. A job runs for real, in one worker process that sees
this environment's packages and what was staged, but not this project (see sandbox.py): the setup file's
package and extra packages are installed, and a pickled main session is loaded. A worker that fails is
replaced, at most four times without progress. A job ends with the local cloud.

Batch jobs run on Beam's FnApiRunner. So do streaming jobs without state, once for every 1 to 100 messages:
these are acknowledged when they have gone through, and redelivered without limit when the pipeline fails;
the failure is a job message. Draining finishes what was pulled, and leaves everything else in the
subscription. A topic that is read gets a subscription when the job starts, which is
deleted when the job ends.

The worker's log is FOLDER/dataflow-JOB_ID.log; the job's first message names it.

What it does not imitate: streaming with state, timers, grouping or windows; container images, disks,
accelerators, autoscaling, several workers; requirements files (a job message says which do not hold);
templates, snapshots, SQL, other languages' transforms;
removal of duplicates with id_label; reading from Pub/Sub in batch jobs, and other unbounded sources. A
missing package ends a streaming job here, where Dataflow would keep trying. Jobs are forgotten when the
local cloud stops; their logs stay.
"""

from __future__ import annotations

import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from google.cloud.dataflow_v1beta3.types import environment as environment_types
from google.cloud.dataflow_v1beta3.types import jobs, messages, metrics

from ..cloud_storage.names import file_of
from ..front.grpc_service import add_service, already_exists, failed_precondition, invalid_argument, not_found
from ..front.labels import check_labels
from ..front.permissions import Permissions
from ..front.regions import REGIONS
from .fields import TABLES
from .job import ENDED, Job, State
from .workers import check_worker_pool

DEFAULT_LOCATION = "us-central1"
_JOB_NAME = re.compile(r"[a-z]([-a-z0-9]{0,1022}[a-z0-9])?")
_STREAMING = environment_types.JobType.JOB_TYPE_STREAMING
_DRAIN = {State.JOB_STATE_DRAINED, State.JOB_STATE_DRAINING}
_PARAMETERS = "runtime_updatable_params"
_Importance = messages.JobMessageImportance
_RANK = {  # the enum's numbers are not in order of importance
    _Importance.JOB_MESSAGE_IMPORTANCE_UNKNOWN: 0,
    _Importance.JOB_MESSAGE_DEBUG: 1,
    _Importance.JOB_MESSAGE_DETAILED: 2,
    _Importance.JOB_MESSAGE_BASIC: 3,
    _Importance.JOB_MESSAGE_WARNING: 4,
    _Importance.JOB_MESSAGE_ERROR: 5,
}


class Dataflow:
    """The services for jobs, their messages and their metrics.

    Args:
      folder: holds the workers' logs and, while a job runs, its files.
      storage_root: the folder where object OBJECT of bucket BUCKET is the file BUCKET/OBJECT.
      environment: the worker processes' environment variables.
    """

    def __init__(self, folder: Path, storage_root: Path, environment: dict[str, str]):
        self._folder = folder
        self._storage_root = storage_root
        self._environment = environment
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def register(self, server: grpc.Server, permissions: Permissions) -> None:
        """Adds the services to a server."""
        add_service(
            server,
            "google.dataflow.v1beta3.JobsV1Beta3",
            {
                self.CreateJob: jobs.CreateJobRequest.pb(),
                self.GetJob: jobs.GetJobRequest.pb(),
                self.UpdateJob: jobs.UpdateJobRequest.pb(),
                self.ListJobs: jobs.ListJobsRequest.pb(),
            },
            TABLES,
            permissions,
        )
        add_service(
            server,
            "google.dataflow.v1beta3.MessagesV1Beta3",
            {self.ListJobMessages: messages.ListJobMessagesRequest.pb()},
            TABLES,
            permissions,
        )
        add_service(
            server,
            "google.dataflow.v1beta3.MetricsV1Beta3",
            {self.GetJobMetrics: metrics.GetJobMetricsRequest.pb()},
            TABLES,
            permissions,
        )

    def stop(self) -> None:
        """Ends the jobs that are still running."""
        with self._lock:
            running = [job for job in self._jobs.values() if job.state not in ENDED]
        for job in running:
            job.kill()
        for job in running:
            job.wait(seconds=10)

    def CreateJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        message = type(request.job)()
        message.CopyFrom(request.job)
        message.project_id = request.project_id or message.project_id
        message.location = request.location or message.location or DEFAULT_LOCATION
        check_labels(message.labels)
        self._check(message)
        message.replace_job_id = request.replace_job_id or message.replace_job_id
        with self._lock:
            replaced = self._replaced(message) if message.replace_job_id else None
            active = (replaced and replaced.successor) or self._active(message)
            if active and active is not replaced:
                if not message.client_request_id:
                    raise already_exists(f"The job {message.name} is already active: {active.copy().id}.")
                return active.copy()  # Beam's client sees that this job has another client_request_id
            message.id = time.strftime("%Y-%m-%d_%H_%M_%S-") + str(random.randrange(10**18, 10**19))
            message.create_time.GetCurrentTime()
            message.start_time.GetCurrentTime()
            job = self._jobs[message.id] = Job(message, self._folder, self._environment, replaced)
            answer = job.copy()
        job.start()
        return answer

    def _replaced(self, message: Any) -> Job:
        """The job that a new one is to replace."""
        job = self._jobs.get(message.replace_job_id)
        if job is None:
            raise not_found(f"The job to replace, {message.replace_job_id}, does not exist.")
        old = job.copy()
        if old.name != message.name:
            raise invalid_argument(f"The job {old.id} is named {old.name}: an update must keep the name.")
        if old.type_ != _STREAMING or message.type_ != _STREAMING:
            raise failed_precondition("Only streaming jobs can be updated.")
        if not job.successor and job.state != State.JOB_STATE_RUNNING:
            raise failed_precondition(
                f"Job {old.id} is in state {job.state.name}: only running jobs can be updated."
            )
        return job

    def _active(self, message: Any) -> Job | None:
        """The active job with a new one's name; of two, the younger, which is about to replace the other."""
        wanted = (message.name, message.project_id, message.location)
        for job in reversed(self._jobs.values()):
            other = job.copy()
            if job.state not in ENDED and (other.name, other.project_id, other.location) == wanted:
                return job
        return None

    def GetJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._job(request).copy()

    def ListJobs(self, request: Any, context: grpc.ServicerContext) -> Any:
        location = request.location or DEFAULT_LOCATION
        filters = jobs.ListJobsRequest.Filter
        with self._lock:
            known = [job.copy() for job in reversed(self._jobs.values())]
        found = []
        for job in known:
            ended = job.current_state in ENDED
            if (
                job.location == location
                and job.project_id == request.project_id
                and not (request.filter == filters.TERMINATED and not ended)
                and not (request.filter == filters.ACTIVE and ended)
            ):
                job.ClearField("environment")  # a list holds summaries, without labels too
                job.ClearField("labels")
                found.append(job)
        return jobs.ListJobsResponse.pb()(jobs=found)

    def UpdateJob(self, request: Any, context: grpc.ServicerContext) -> Any:
        job = self._job(request)
        message, wanted = job.copy(), State(request.job.requested_state)
        if job.state in ENDED:
            raise failed_precondition(
                f"Operation not allowed for JOB {message.id}. Job has terminated in state {job.state.name}."
            )
        if request.update_mask.paths:
            if wanted:
                raise invalid_argument("A request must have a requested_state or an update_mask, not both.")
            _check_parameters(message, request)
            job.merge(request.job, request.update_mask)
        elif wanted in _DRAIN:
            if message.type_ != _STREAMING:
                raise failed_precondition(
                    f"Job {message.id} is a batch job: only streaming jobs can be drained."
                )
            if job.state != State.JOB_STATE_DRAINING and not job.is_ready_to_drain():
                raise failed_precondition(
                    f"Operation drain not allowed for JOB {message.id}. Job is not yet ready for draining. "
                    "Please retry in a few minutes."
                )
            job.drain()
        elif wanted == State.JOB_STATE_CANCELLED:
            job.cancel()
        else:
            raise invalid_argument(f"A job cannot be asked to enter state {wanted.name}.")
        return job.copy()

    def ListJobMessages(self, request: Any, context: grpc.ServicerContext) -> Any:
        start = request.start_time.ToNanoseconds()
        end = request.end_time.ToNanoseconds() if request.HasField("end_time") else 2**63
        found = [
            m
            for m in self._job(request).messages()
            if start <= m.time.ToNanoseconds() < end
            and _RANK[m.message_importance] >= _RANK[request.minimum_importance]
        ]
        counts = [e for e in self._job(request).worker_counts() if start <= e.time.ToNanoseconds() < end]
        return messages.ListJobMessagesResponse.pb()(job_messages=found, autoscaling_events=counts)

    def GetJobMetrics(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = metrics.JobMetrics.pb()(metrics=self._job(request).metrics())
        answer.metric_time.GetCurrentTime()
        return answer

    def _job(self, request: Any) -> Job:
        with self._lock:
            job = self._jobs.get(request.job_id)
        message = job.copy() if job else None
        if message is None or (message.project_id, message.location) != (
            request.project_id,
            request.location or DEFAULT_LOCATION,
        ):
            raise not_found(
                f"The job {request.job_id} does not exist in project {request.project_id}, region "
                f"{request.location or DEFAULT_LOCATION}."
            )
        return job

    def _check(self, job: Any) -> None:
        if not job.project_id:
            raise invalid_argument("The job has no project.")
        if job.location not in REGIONS:
            raise invalid_argument(f"{job.location} is not a region of Dataflow.")
        for pool in job.environment.worker_pools:
            check_worker_pool(pool, job.type_ == _STREAMING)
        if not _JOB_NAME.fullmatch(job.name):
            raise invalid_argument(
                f"The job name {job.name!r} is invalid: use lower-case letters, digits and hyphens, "
                "begin with a letter, and do not end with a hyphen."
            )
        fields = job.environment.sdk_pipeline_options.fields
        url = fields["options"].struct_value.fields["pipelineUrl"].string_value if "options" in fields else ""
        if not url.startswith("gs://"):
            raise invalid_argument(
                "The job has no staged pipeline: the local cloud runs only what Beam's Python SDK submits."
            )
        if file_of(self._storage_root, url) is None:
            raise invalid_argument(f"The staged pipeline {url} does not exist.")


def _check_parameters(job: Any, request: Any) -> None:
    for path in request.update_mask.paths:
        if path.partition(".")[0] != _PARAMETERS:
            raise invalid_argument(f"The update_mask may name {_PARAMETERS} and its fields, not {path}.")
    if job.type_ != _STREAMING:
        raise failed_precondition(f"Job {job.id} is a batch job: only streaming jobs can be updated.")
    merged = type(job)()
    merged.CopyFrom(job)
    request.update_mask.MergeMessage(request.job, merged)
    parameters = merged.runtime_updatable_params
    least, most = parameters.min_num_workers, parameters.max_num_workers
    if least < 0 or most < 0 or (least and most and least > most):
        raise invalid_argument(f"min_num_workers {least} and max_num_workers {most} contradict each other.")
    hint = parameters.worker_utilization_hint
    if hint and not 0.1 <= hint <= 0.9:
        raise invalid_argument(f"worker_utilization_hint must be 0.1 to 0.9, not {hint}.")
