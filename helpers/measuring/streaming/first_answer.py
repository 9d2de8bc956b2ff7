"""From submitting a job to its first answer, in parts, as far as each can be seen from outside."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.dataflow import Job

COUNT_SECONDS = 30.0
"""How long a job may take to count what it has done: counters come after the answers."""


def start_up(job: Job, *, submitted: float, running: float, answered: float) -> dict[str, float]:
    """The seconds of each part, by the part's name, from what the job has counted.

    Dataflow does not say when a worker's image has been pulled, nor when its packages are installed: where
    the job is said to run before, they are in the rest.

    Args:
        job: with one worker, which has answered one message that waited for it.
        submitted: when it was submitted, in seconds of any clock.
        running: when it ran.
        answered: when its first response was received.

    Raises:
        ValueError: the moments are not in order.
    """
    if not submitted <= running <= answered:
        raise ValueError(f"{submitted}, {running}, {answered}: give the moments in their order.")
    deadline = time.monotonic() + COUNT_SECONDS
    while not (counters := job.counters()).get("models_loaded") and time.monotonic() < deadline:
        time.sleep(0.5)
    batches = job.distributions().get("batch_milliseconds")
    fetch = counters.get("fetch_milliseconds", 0) / 1000
    parts = {
        "until the job runs": running - submitted,
        "fetching the state dict": fetch,
        "loading the model": counters.get("load_milliseconds", 0) / 1000 - fetch,
        "the first batch": batches.sum / 1000 if batches else 0.0,
    }
    # A worker may have loaded the model before its job is said to run.
    rest = max(0.0, answered - submitted - sum(parts.values()))
    return parts | {"the rest: packages, Beam, Pub/Sub": rest}
