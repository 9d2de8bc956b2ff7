"""A process that drains a Dataflow job when its time is over, whatever has become of the notebook.

Streaming jobs run, and cost, until somebody stops them, and Dataflow itself has no limit for them. So:

* ``start`` leaves a process behind that belongs to no notebook, terminal or kernel. It looks at the job now
  and then, ends when the job has ended, and drains it when its time is over. It follows a job that is
  updated to the one that takes its place, and goes by the time that this one was given, if it was given one.
* The time is also on the job, as a label. Should this machine be switched off, any other can see it:
  ``python -m helpers.dataflow reap --overdue`` drains what is past its time, from a cron job for instance,
  and so does the next run of the notebook.

On the local cloud the jobs end with the kernel, and the guard ends with them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.jobs.dataflow_job import Job

DRAIN_LABEL = "drain_after"
"""The label with the time, in seconds since 1970, at which a job is to be drained."""
POLL_SECONDS = 30.0
LOCAL_POLL_SECONDS = 1.0
# A drain that does not come to its end, because a message fails again and again, is a job that costs. What
# it had not answered comes again from the subscription.
CANCEL_AFTER_DRAINING_SECONDS = 1800.0
# After its time the guard gives up on a service that it cannot reach.
UNREACHABLE_SECONDS = 24 * 3600.0
LOCAL_UNREACHABLE_SECONDS = 3.0


def start(project: str, location: str, job_id: str, minutes: float) -> subprocess.Popen:
    """Leaves a process behind that drains the job after ``minutes``.

    Raises:
        ValueError: the time is not above 0.
    """
    if not minutes > 0:
        raise ValueError(f"max_run_minutes is {minutes}: it must be above 0.")
    command = [sys.executable, "-m", "helpers.jobs.job_guard", "--project", project, "--location", location]
    command += ["--job-id", job_id, "--drain-at", str(time.time() + minutes * 60)]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C and hang-up
    )


def guard(project: str, location: str, job_id: str, drain_at: float) -> str:
    """Waits until the job has ended, and drains it at ``drain_at``; returns its last state.

    Args:
        project: the id of the Google Cloud project.
        location: the region.
        job_id: of the job to guard.
        drain_at: seconds since 1970.

    Returns:
        The state in which the job ended, or ``UNREACHABLE``.
    """
    # Here, because `start` is called from modules that this one would import.
    from google.api_core.exceptions import FailedPrecondition, GoogleAPICallError, NotFound
    from google.auth.exceptions import GoogleAuthError

    from helpers.jobs.dataflow_job import TERMINAL, Job

    is_local = "LOCAL_CLOUD_PROJECT" in os.environ
    pause = LOCAL_POLL_SECONDS if is_local else POLL_SECONDS
    job = Job(project, location, job_id)
    last_seen = time.time()
    while True:
        now = time.time()
        try:
            state = job.state(timeout=10)
            last_seen = now
            if state == "UPDATED" and (successor := job.successor()):
                job, drain_at = successor, deadline_of(successor, drain_at)
                continue
            if state in TERMINAL:
                return state
            if now >= drain_at + CANCEL_AFTER_DRAINING_SECONDS:
                job.request("CANCELLED")
            elif now >= drain_at and state not in ("DRAINING", "CANCELLING"):
                # A job that has not started cannot drain, and has nothing to finish.
                job.request("DRAINED" if state == "RUNNING" else "CANCELLED")
        except NotFound:
            return "NOT_FOUND"
        except FailedPrecondition:  # it has just ended, or is changing its state
            pass
        except (GoogleAPICallError, GoogleAuthError):
            patience = LOCAL_UNREACHABLE_SECONDS if is_local else UNREACHABLE_SECONDS
            if now - (last_seen if is_local else max(last_seen, drain_at)) > patience:
                return "UNREACHABLE"
        time.sleep(min(pause, max(drain_at - now, 1.0)) if now < drain_at else pause)


def deadline_of(job: Job, otherwise: float) -> float:
    """When a job is to be drained, in seconds since 1970: by its label, if it has one."""
    label = job.describe(timeout=10).labels.get(DRAIN_LABEL, "")
    return float(label) if label.isdigit() else otherwise


def main() -> None:
    """The command line that ``start`` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.jobs.job_guard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--project", required=True)
    parser.add_argument("--location", required=True)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--drain-at", required=True, type=float, help="seconds since 1970")
    print(guard(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
