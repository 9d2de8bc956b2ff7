"""A Vertex AI custom job, submitted and watched to its end."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from helpers.files import access
from helpers.files.labels import label_value

if TYPE_CHECKING:
    from google.cloud.aiplatform import CustomJob

QUEUE_MINUTES = 30
"""How long a job may wait for its machine, on top of its own timeout."""

LOG_LINES = 40

ENDED = {"JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"}


class CustomJobError(RuntimeError):
    """A custom job that could not be started, or did not succeed; the message says what to do."""


class CustomJobGoesOnError(CustomJobError):
    """A custom job that still runs, but is no longer waited for."""


def run_custom_job(
    display_name: str,
    worker_pool: Mapping[str, Any],
    *,
    project: str,
    location: str,
    bucket: str,
    labels: Mapping[str, str],
    timeout_minutes: int,
    service_account: str | None = None,
    network: str | None = None,
    poll_seconds: float = 2,
) -> None:
    """Submits a custom job of one worker pool and waits until it has succeeded, printing its states.

    Ctrl-C asks whether to cancel the job. Without a terminal to ask on, as in a notebook, it cancels: a job
    that nobody watches must not go on costing money.

    Args:
        display_name: shown in the console, up to 128 characters.
        worker_pool: a `WorkerPoolSpec` as a dictionary.
        project: the project's id.
        location: a region.
        bucket: a bucket's name, for the job's own files.
        labels: any text; turned into labels that Google Cloud accepts.
        timeout_minutes: the time after which Vertex AI ends the job.
        service_account: the account the job runs as; by default Vertex AI's own.
        network: `projects/NUMBER/global/networks/NAME`, to peer with.
        poll_seconds: the time between looks at the job.

    Raises:
        CustomJobGoesOnError: Ctrl-C was pressed, and the job was left running.
        CustomJobError: the job could not be started, failed, was cancelled, or ran out of time.
    """
    # Google's client takes seconds to import, and converting on this machine does without it.
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import aiplatform

    # The client tells of a new job as well, in six lines, most of them on how to come back to it in Python.
    for part in ("base", "jobs"):
        logging.getLogger(f"google.cloud.aiplatform.{part}").setLevel(logging.WARNING)
    try:
        job = aiplatform.CustomJob(
            display_name=display_name[:128],
            worker_pool_specs=[dict(worker_pool)],
            labels={key: label_value(value) for key, value in labels.items()},
            project=project,
            location=location,
            staging_bucket=f"gs://{bucket}",
        )
        job.submit(service_account=service_account, network=network, timeout=timeout_minutes * 60)
    except (GoogleAPIError, GoogleAuthError, ValueError) as error:
        raise CustomJobError(_why_not_started(error, project, location)) from error
    job_id = job.resource_name.rpartition("/")[2]
    print(f"Vertex AI job {job.display_name!r}: {job.resource_name}")
    if _has_pages(job):
        print(f"Its page: {_console_link(job_id, project, location)}\nIts log:  {_log_link(job_id, project)}")
    deadline = time.monotonic() + (timeout_minutes + QUEUE_MINUTES) * 60
    try:
        state = _watch(job, deadline, poll_seconds)
    except KeyboardInterrupt:
        if _leave_running():
            raise CustomJobGoesOnError(
                f"No longer waiting: the job goes on. Look at it, or cancel it: {job.resource_name}"
            ) from None
        job.cancel()
        raise CustomJobError(f"The job was cancelled: {job.resource_name}") from None
    except (GoogleAPIError, GoogleAuthError) as error:
        raise CustomJobGoesOnError(
            f"Vertex AI cannot be reached any more ({error}), but the job goes on: run this again later, "
            f"or look at it: {job.resource_name}"
        ) from error
    if state != "JOB_STATE_SUCCEEDED":
        job.cancel() if state not in ENDED else None
        raise CustomJobError(_why_failed(job, job_id, project, state))


def _watch(job: "CustomJob", deadline: float, poll_seconds: float) -> str:
    """Prints the job's state when it changes, and every minute; returns the last one."""
    began = printed = time.monotonic()
    last = None
    while True:
        state = job.state.name
        now = time.monotonic()
        if state != last or now - printed >= 60:
            print(f"  {state.removeprefix('JOB_STATE_').lower()} after {now - began:.0f} s", flush=True)
            last, printed = state, now
        if state in ENDED or now > deadline:
            return state
        time.sleep(poll_seconds)


def _leave_running() -> bool:
    if not sys.stdin or not sys.stdin.isatty():
        return False
    try:
        return input("\nCancel the job? Otherwise it goes on. [Y/n] ").strip().lower() in ("n", "no")
    except (KeyboardInterrupt, EOFError):
        return False


def _why_not_started(error: Exception, project: str, location: str) -> str:
    from google.api_core.exceptions import Forbidden, NotFound
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, GoogleAuthError):
        todo = access.log_in()
    elif isinstance(error, Forbidden):
        todo = access.advice(str(error), project, "aiplatform.customJobs.create")
    elif isinstance(error, NotFound):
        enable = access.enable_command(project, ["aiplatform.googleapis.com"])
        todo = f"check the project and the region, and enable the API ({enable})"
    else:
        todo = "correct what the message names"
    return f"Vertex AI in {project}, {location}, did not accept the job ({error}): {todo}"


def _why_failed(job: "CustomJob", job_id: str, project: str, state: str) -> str:
    said = job.error.message if job.error else ""
    parts = [f"The job ended as {state.removeprefix('JOB_STATE_')}. {said}".rstrip()]
    if state not in ENDED:
        parts = ["The job did not end in time, and was cancelled."]
    if log := _end_of_log(job_id, project):
        parts.append("The end of its log:\n" + "\n".join(f"  {line}" for line in log))
    if _has_pages(job):
        parts.append(f"The whole log: {_log_link(job_id, project)}")
    return "\n".join(parts)


def _end_of_log(job_id: str, project: str) -> list[str]:
    """The last lines of a job's log, from Cloud Logging; none if they cannot be read."""
    from google.auth.exceptions import GoogleAuthError
    from requests import RequestException

    query = {
        "resourceNames": [f"projects/{project}"],
        "filter": f'resource.type="ml_job" AND resource.labels.job_id="{job_id}"',
        "orderBy": "timestamp desc",
        "pageSize": LOG_LINES,
    }
    try:
        session = access.session_of(project)
        answer = session.post("https://logging.googleapis.com/v2/entries:list", json=query, timeout=30)
        entries = answer.json().get("entries", []) if answer.ok else []
    except (GoogleAuthError, RequestException, ValueError):
        return []
    return [
        entry.get("textPayload") or entry.get("jsonPayload", {}).get("message", "")
        for entry in reversed(entries)
    ]


def _has_pages(job: "CustomJob") -> bool:
    """Whether the console knows the job: Vertex AI names jobs by the number of their project."""
    return job.resource_name.split("/")[1].isdigit()


def _console_link(job_id: str, project: str, location: str) -> str:
    page = f"https://console.cloud.google.com/agent-platform/locations/{location}/training/{job_id}"
    return f"{page}?project={quote(project)}"


def _log_link(job_id: str, project: str) -> str:
    query = quote(f'resource.type="ml_job" resource.labels.job_id="{job_id}"', safe="")
    return f"https://console.cloud.google.com/logs/query;query={query}?project={quote(project)}"
