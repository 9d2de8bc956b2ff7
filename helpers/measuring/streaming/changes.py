"""What options do to a job's batch times: a running one is updated with each in turn, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers import pubsub
from helpers.measuring.streaming.arrivals import volleys
from helpers.measuring.streaming.batch_times import BatchTimes, measured_batch_times
from helpers.measuring.streaming.load import Records, send_load
from helpers.measuring.streaming.sweep import sweep_rates

if TYPE_CHECKING:
    from helpers.dataflow import Job

WARM_UP = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # messages at once
WARM_UP_APART = 0.7  # seconds
WARM_UP_WAIT = 600.0  # seconds


class NotAnsweredError(RuntimeError):
    """Messages that were to be answered before the next measurement, and were not."""


def warm_up(
    topic: str, prompts: Sequence[str], *, responses: str, dead_letters: str | None = None
) -> Records:
    """Sends volleys of messages, few and many, and waits for the answers: a worker prepares itself for each
    size of batch when it meets it first, and what is measured meanwhile is too slow.

    Args:
        topic, prompts, responses, dead_letters: as for `send_load`.

    Raises:
        NotAnsweredError: some still wait after ten minutes; what is measured next would be late for that.
        SendingError: as `send_load`.
    """
    times = volleys(WARM_UP, WARM_UP_APART)
    found = send_load(
        topic, times, prompts, responses=responses, dead_letters=dead_letters, wait_seconds=WARM_UP_WAIT
    )
    if found.waiting:
        raise NotAnsweredError(
            f"{found.waiting} of {len(times)} messages are still not answered: see job.errors(), and try "
            "again when they are, or with shorter responses."
        )
    return found


def measure_changes(
    job: Job,
    arguments: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]],
    *,
    rates: Sequence[float],
    seconds: float,
    flood: int,
    responses_topic: str,
    **load: Any,
) -> tuple[Job, dict[str, BatchTimes]]:
    """Updates a running job with each change in turn, and measures its batch times: at some rates, and with
    many messages at once. Without these, nothing would be known of full batches, and a change that makes the
    job slower would seem to answer less than it does, or one that makes it faster no more than before.

    Args:
        job: the running job.
        arguments: those of `helpers.dataflow.update`, without a change.
        changes: answering options, as `[{"max_batch_size": 4}]`.
        rates: messages a second, low ones.
        seconds: how long to send at each.
        flood: how many messages to send at once after that: enough for several full batches.
        responses_topic: the path of the topic that responses are published to.
        load: `topic`, `prompts`, `responses` and `dead_letters`, as for `sweep_rates`.

    Returns:
        The job that runs at the end, with the last change, and the times by the changes' labels.

    Raises:
        NotAnsweredError: the updated job answers no message, or not all in time.
        JobError, OptionError, ValueError: as `helpers.dataflow.update`.
        SendingError, SweepError: as `sweep_rates`.
    """
    from helpers.dataflow import UPDATE_SECONDS, update

    found = {}
    for change in changes:
        label = label_of(change)
        job = update(job, **{**arguments, **change})
        # The model is loaded for it.
        if pubsub.ask(load["topic"], responses_topic, load["prompts"][:1], timeout=UPDATE_SECONDS) == [None]:
            raise NotAnsweredError(f"with {label}, the job answers nothing: see job.errors().")
        warm_up(**load)
        points = sweep_rates(job, rates, seconds=seconds, **load)
        full = send_load(times=volleys([flood], 1), **load)
        if full.waiting:
            raise NotAnsweredError(
                f"with {label}, {full.waiting} of {flood} messages at once were not answered: see "
                "job.errors(), and try a smaller flood."
            )
        found[label] = measured_batch_times([*points, full])
    return job, found


def label_of(change: Mapping[str, Any]) -> str:
    """Options as a reader sees them: `engine = ctranslate2, dtype = int8`."""
    return ", ".join(f"{name} = {value}" for name, value in change.items())
