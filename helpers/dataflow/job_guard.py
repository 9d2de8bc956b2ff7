"""A process that drains a Dataflow job when its time is up, whatever has become of the notebook.

Streaming jobs run, and cost money, until somebody stops them: a limit of Dataflow's own
(`helpers.dataflow.job_options.TIME_LIMIT`) is not known to hold for them. So:

* `start` leaves a process behind that belongs to no notebook, terminal or kernel. It checks the job now
  and then, ends when the job has ended, and drains it when its time is up. If the job is updated, it follows
  the one that takes its place, and goes by the time that the new one was given, if any.
* The time is also on the job, as a label. Should this machine be switched off, any other can see it:
  `python -m helpers.dataflow reap --overdue` drains jobs past their time, from a cron job for instance,
  and so does the next run of the notebook.

The guard reaches Dataflow by the way that this process does. Where that is a proxy on this machine, and the
proxy ends, the guard ends a minute later.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from helpers.dataflow.job import Job


def _time_since_boot() -> float:
    """Seconds on a clock that only goes forward, also while this machine sleeps, where the system has one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


DRAIN_LABEL = "drain_after"
"""The label with the time, in seconds since 1970, at which a job is to be drained."""
# Between two looks at the job: often while it is young, which is when it is updated, or ends for a mistake.
FEWEST_POLL_SECONDS, MOST_POLL_SECONDS = 1.0, 30.0
POLLS_OF_A_LIFETIME = 20
# A drain that never ends, because a message fails again and again, keeps costing money. The subscription
# delivers again what was not answered.
CANCEL_AFTER_DRAINING_SECONDS = 1800.0
# How long the guard goes on trying to reach the service once the job's time is over.
UNREACHABLE_SECONDS = 24 * 3600.0
# The same for a proxy on this machine that has ended, and with it the way to the service.
PROXY_GONE_SECONDS = 60.0


def start(project: str, location: str, job_id: str, minutes: float) -> subprocess.Popen:
    """Leaves a process behind that drains the job after `minutes`.

    Raises:
        ValueError: the time is not above 0.
    """
    if not minutes > 0:
        raise ValueError(f"max_run_minutes is {minutes}: it must be above 0.")
    command = [
        sys.executable,
        "-m",
        "helpers.dataflow.job_guard",
        "--project",
        project,
        "--location",
        location,
    ]
    command += ["--job-id", job_id, "--drain-at", str(time.time() + minutes * 60)]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C and hang-up
    )


def guard(
    project: str,
    location: str,
    job_id: str,
    drain_at: float,
    now: Callable[[], float] = _time_since_boot,
    sleep: Callable[[float], object] = time.sleep,
) -> str:
    """Waits until the job has ended, and drains it at `drain_at`; returns its last state.

    A clock that is set back or forward meanwhile changes nothing: the time that is left counts.

    Args:
        project: the id of the Google Cloud project.
        location: the region.
        job_id: the id of the job to guard.
        drain_at: when to drain it, in seconds since 1970.
        now: a clock that only goes forward, in seconds.
        sleep: waits for some seconds.

    Returns:
        The state in which the job ended, or `UNREACHABLE`.
    """
    # Imported here, because `start` is called from modules that this one would import.
    from google.api_core.exceptions import FailedPrecondition, GoogleAPICallError, NotFound
    from google.auth.exceptions import GoogleAuthError

    from helpers.dataflow.job import TERMINAL, Job

    job = Job(project, location, job_id)
    began = last_seen = now()
    end = began + drain_at - time.time()
    refused_since = None
    while True:
        moment = now()
        try:
            state = job.state(timeout=10)
            last_seen, refused_since = moment, None
            if state == "UPDATED" and (successor := job.successor()):
                job, otherwise = successor, time.time() + end - moment
                end = moment + deadline_of(successor, otherwise) - time.time()
                continue
            if state in TERMINAL:
                return state
            if moment >= end + CANCEL_AFTER_DRAINING_SECONDS:
                job.request("CANCELLED")
            elif moment >= end and state not in ("DRAINING", "CANCELLING"):
                # A job that has not started cannot drain, and has nothing to finish.
                job.request("DRAINED" if state == "RUNNING" else "CANCELLED")
        except NotFound:
            return "NOT_FOUND"
        except FailedPrecondition:  # it has just ended, or is changing its state
            pass
        except (GoogleAPICallError, GoogleAuthError):
            refused_since = (refused_since or moment) if _proxy_has_ended() else None
            if refused_since and moment - refused_since > PROXY_GONE_SECONDS:
                return "UNREACHABLE"
            if moment - max(last_seen, end) > UNREACHABLE_SECONDS:
                return "UNREACHABLE"
        pause = min(MOST_POLL_SECONDS, max(FEWEST_POLL_SECONDS, (moment - began) / POLLS_OF_A_LIFETIME))
        sleep(min(pause, max(end - moment, FEWEST_POLL_SECONDS)) if moment < end else pause)


def _proxy_has_ended() -> bool:
    """Whether this process reaches the network through a proxy on this machine that does not run any more."""
    url = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or "")
    if url.hostname not in ("127.0.0.1", "::1", "localhost") or not url.port:
        return False
    try:
        socket.create_connection((url.hostname, url.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def deadline_of(job: Job, otherwise: float) -> float:
    """When a job is to be drained, in seconds since 1970: from its label, if it has one."""
    label = job.describe(timeout=10).labels.get(DRAIN_LABEL, "")
    return float(label) if label.isdigit() else otherwise


def main() -> None:
    """The command line that `start` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.dataflow.job_guard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--project", required=True)
    parser.add_argument("--location", required=True)
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--drain-at", required=True, type=float, help="seconds since 1970")
    print(guard(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
