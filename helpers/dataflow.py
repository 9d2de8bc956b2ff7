"""The streaming job on Dataflow: submitted, watched, drained or cancelled."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from google.api_core.exceptions import NotFound
from google.cloud import dataflow_v1beta3 as dataflow

from helpers import pipeline
from helpers.package import build_wheel

POLL_SECONDS = 1.0
TERMINAL = {"DONE", "FAILED", "CANCELLED", "DRAINED", "UPDATED"}


class JobError(RuntimeError):
    """A job that failed, or did not come where it should in time; the message says what to look at."""


@dataclass(frozen=True)
class Job:
    """A job on Dataflow."""

    project: str
    location: str
    job_id: str

    @property
    def url(self) -> str:
        """The job's page in the Google Cloud console."""
        page = f"https://console.cloud.google.com/dataflow/jobs/{self.location}/{self.job_id}"
        return f"{page}?project={self.project}"

    def state(self) -> str:
        """For instance PENDING, RUNNING, DRAINING, DRAINED, FAILED or CANCELLED."""
        job = dataflow.JobsV1Beta3Client().get_job(request=self._request())
        return job.current_state.name.removeprefix("JOB_STATE_")

    def wait_for(self, *states: str, timeout: float = 600) -> str:
        """Waits until the job is in one of the states.

        Args:
            states: names as ``state`` gives them.
            timeout: seconds.

        Returns:
            The state that the job is in.

        Raises:
            JobError: the job ended in another state, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while (state := self.state()) not in states:
            if state in TERMINAL:
                errors = "\n".join(self.errors()[-3:])
                raise JobError(f"The job ended as {state}. {errors or 'It left no error.'}\nSee {self.url}")
            if time.monotonic() > deadline:
                raise JobError(
                    f"After {timeout:.0f} s the job is still {state}, not {' or '.join(states)}. It goes on: "
                    f"look at {self.url}, wait longer, or cancel it."
                )
            time.sleep(POLL_SECONDS)
        return state

    def errors(self) -> list[str]:
        """The job's error messages, oldest first."""
        request = dataflow.ListJobMessagesRequest(
            project_id=self.project,
            location=self.location,
            job_id=self.job_id,
            minimum_importance=dataflow.JobMessageImportance.JOB_MESSAGE_ERROR,
        )
        messages = dataflow.MessagesV1Beta3Client().list_job_messages(request)
        return [message.message_text for message in messages]

    def counters(self) -> dict[str, int]:
        """The pipeline's own counters, for instance ``response_tokens``, summed over its steps."""
        request = dataflow.GetJobMetricsRequest(
            project_id=self.project, location=self.location, job_id=self.job_id
        )
        totals: dict[str, int] = {}
        for metric in dataflow.MetricsV1Beta3Client().get_job_metrics(request).metrics:
            name = metric.name
            if name.origin == "user" and "tentative" not in name.context and metric.kind == "Sum":
                totals[name.name] = totals.get(name.name, 0) + int(metric.scalar)
        return totals

    def drain(self, timeout: float = 900) -> str:
        """Stops reading, finishes what was read, and waits until that is done; returns the last state.

        What is still in the subscription stays there, for the next job.

        Raises:
            JobError: the job failed, or is not drained in time.
        """
        return self._stop("JOB_STATE_DRAINED", timeout)

    def cancel(self, timeout: float = 300) -> str:
        """Stops at once, and returns the last state. Pub/Sub delivers again what was read and not answered."""
        return self._stop("JOB_STATE_CANCELLED", timeout)

    def _stop(self, requested: str, timeout: float) -> str:
        if self.state() in TERMINAL:
            return self.state()
        job = dataflow.Job(id=self.job_id, requested_state=dataflow.JobState[requested])
        request = dataflow.UpdateJobRequest(
            project_id=self.project, location=self.location, job_id=self.job_id, job=job
        )
        dataflow.JobsV1Beta3Client().update_job(request)
        return self.wait_for(requested.removeprefix("JOB_STATE_"), "DONE", timeout=timeout)

    def _request(self) -> dataflow.GetJobRequest:
        return dataflow.GetJobRequest(project_id=self.project, location=self.location, job_id=self.job_id)


def submit(
    *,
    project: str,
    location: str,
    temp_location: str,
    job_name: str,
    model_name: str,
    state_dict_path: str,
    responses_topic: str,
    messages_subscription: str,
    dead_letter_topic: str | None = None,
    max_response_tokens: int = 256,
    machine_type: str | None = None,
    beam_options: Sequence[str] = (),
) -> Job:
    """Submits Pub/Sub → model → Pub/Sub as a streaming job.

    Args:
        project: the id of the Google Cloud project.
        location: the region, for instance ``us-central1``.
        temp_location: a ``gs://`` folder for what the job stages.
        job_name: lower-case letters, digits and dashes; see ``valid_job_name``.
        model_name: the model that the state dict was made from.
        state_dict_path: ``gs://.../NAME.pt``.
        responses_topic: path of the topic for the responses.
        messages_subscription: path of the subscription to read. Rather than a topic: messages that are
            published before the job runs wait in it.
        dead_letter_topic: path of the topic for messages that cannot be answered.
        max_response_tokens: a response ends here, unless the model ends it before.
        machine_type: of the workers; None leaves it to Dataflow.
        beam_options: further options, as on a command line.

    Returns:
        The job; it has been created, and is not running yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--messages-subscription={messages_subscription}",
            f"--responses-topic={responses_topic}",
            f"--state-dict-path={state_dict_path}",
            f"--model-name={model_name}",
            f"--max-response-tokens={max_response_tokens}",
            "--runner=DataflowRunner",
            f"--project={project}",
            f"--region={location}",
            f"--temp_location={temp_location}",
            f"--job_name={valid_job_name(job_name)}",
            # The workers import these helpers: they are sent along.
            f"--extra_package={build_wheel(folder)}",
            # One process a machine: it has one copy of the model, and torch uses all of its cores.
            "--experiments=no_use_multiple_sdk_containers",
            *beam_options,
        ]
        if dead_letter_topic:
            arguments.append(f"--dead-letter-topic={dead_letter_topic}")
        if machine_type:
            arguments.append(f"--machine_type={machine_type}")
        result = pipeline.run(arguments)
    return Job(project, location, result.job_id())


def valid_job_name(text: str) -> str:
    """A name that Dataflow takes: lower-case letters, digits and dashes, from a letter on, at most 63."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"job-{name}".strip("-")
    return name[:63].rstrip("-")


def find_active(project: str, location: str, prefix: str) -> list[Job]:
    """The jobs under way whose name begins with ``prefix``: left, perhaps, by an earlier run."""
    request = dataflow.ListJobsRequest(
        project_id=project, location=location, filter=dataflow.ListJobsRequest.Filter.ACTIVE
    )
    try:
        jobs = list(dataflow.JobsV1Beta3Client().list_jobs(request))
    except NotFound:
        return []
    return [Job(project, location, job.id) for job in jobs if job.name.startswith(prefix)]
