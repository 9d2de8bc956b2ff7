"""Finds the jobs that these notebooks started, by their label, and stops them."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from datetime import datetime

from apache_beam.options.pipeline_options import GoogleCloudOptions
from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.cloud import dataflow_v1beta3 as dataflow

from helpers.dataflow.job import RETRY, Job, JobError
from helpers.dataflow.job_guard import DRAIN_LABEL
from helpers.files.labels import SERIES


@dataclass(frozen=True)
class ListedJob:
    """A job under way.

    Attributes:
        job: the job, to watch, drain or cancel.
        name: its name, which no other active job of the region has.
        state: its state, for instance RUNNING.
        labels: the labels that it was submitted with.
        created: when it was submitted.
    """

    job: Job
    name: str
    state: str
    labels: dict[str, str]
    created: datetime

    @property
    def of_this_series(self) -> bool:
        return SERIES.items() <= self.labels.items()

    @property
    def overdue(self) -> bool:
        """Whether the time that it was given when it was submitted has passed."""
        drain_after = self.labels.get(DRAIN_LABEL, "")
        return drain_after.isdigit() and time.time() > int(drain_after)

    def row(self) -> dict[str, object]:
        """As a row of a table."""
        minutes = (time.time() - self.created.timestamp()) / 60
        return {
            "name": self.name,
            "state": self.state,
            "minutes": round(minutes, 1),
            "overdue": "yes" if self.overdue else "",
            "job": self.job.job_id,
        }


def list_active(project: str, location: str) -> list[ListedJob]:
    """All jobs under way, whoever started them, newest first.

    Args:
        project: the id of the Google Cloud project.
        location: the region.
    """
    client = dataflow.JobsV1Beta3Client()
    request = dataflow.ListJobsRequest(
        project_id=project, location=location, filter=dataflow.ListJobsRequest.Filter.ACTIVE
    )
    found = []
    try:
        for summary in client.list_jobs(request, timeout=60, retry=RETRY):
            job = Job(project, location, summary.id)
            # Dataflow lists summaries, which may come without labels.
            labels = dict(summary.labels) or dict(job.describe().labels)
            state = summary.current_state.name.removeprefix("JOB_STATE_")
            found.append(ListedJob(job, summary.name, state, labels, summary.create_time))
    except NotFound:  # nothing was ever submitted there
        return []
    return sorted(found, key=lambda listed: listed.created, reverse=True)


def list_series(project: str, location: str) -> list[ListedJob]:
    """The jobs under way that these notebooks started, perhaps left behind by a kernel that died."""
    return [listed for listed in list_active(project, location) if listed.of_this_series]


def find_name(project: str, location: str, name: str) -> Job | None:
    """The job under way with exactly this name, if there is one."""
    return next((one.job for one in list_active(project, location) if one.name == name), None)


def check_name(options: GoogleCloudOptions) -> None:
    """Checks that a job can be submitted under its name, before anything is staged.

    Beam itself notices a name in use only at the end of the submission, and looks for ever for a job to
    update if there is none.

    Raises:
        JobError: the name is in use, or there is no running job of this name to update.
    """
    if not options.project or not options.region or options.template_location:
        return  # Beam says what is missing; a template is not a job
    active = {one.name: one for one in list_active(options.project, options.region)}
    other = active.get(options.job_name)
    if options.update and (other is None or other.state != "RUNNING"):
        raise JobError(
            f"There is no running job named {options.job_name} in {options.region} to update: leave "
            f"--update out, or give the name of one of these: {', '.join(active) or '(none is active)'}."
        )
    if other and not options.update:
        raise JobError(
            f"The job name {options.job_name} is in use by {other.job.job_id}: drain that job, update it, or "
            f"give this one another name. Its page: {other.job.url}"
        )


def reap(
    project: str, location: str, *, overdue_only: bool = False, timeout: float = 900
) -> list[tuple[ListedJob, str]]:
    """Drains the jobs under way that these notebooks started, and waits until they have ended.

    Args:
        project: the id of the Google Cloud project.
        location: the region.
        overdue_only: whether to drain only those whose time is up.
        timeout: seconds to wait; until then, a job that is not ready to drain is asked again.

    Returns:
        Each job, and the state that it is in: one that is not of `TERMINAL` goes on, and costs money.
    """
    jobs = [one for one in list_series(project, location) if one.overdue or not overdue_only]

    ended: dict[str, str] = {}

    def stop(listed: ListedJob) -> None:
        try:
            ended[listed.job.job_id] = listed.job.stop("DRAINED", timeout)
        except JobError:
            with contextlib.suppress(GoogleAPICallError):
                ended[listed.job.job_id] = listed.job.state()
        except GoogleAPICallError as error:
            ended[listed.job.job_id] = f"UNKNOWN ({error.message})"

    # Not a pool: an interrupt must not wait for them.
    threads = [threading.Thread(target=stop, args=(listed,), daemon=True) for listed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 60)
    return [(listed, ended.get(listed.job.job_id, "UNKNOWN")) for listed in jobs]
