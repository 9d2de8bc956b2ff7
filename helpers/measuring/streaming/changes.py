"""What options do to a job's bundle times: a running one is updated with each in turn, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers import pubsub
from helpers.measuring.streaming.arrivals import volleys
from helpers.measuring.streaming.bundle_times import BundleTimes, measured_bundle_times
from helpers.measuring.streaming.load import Records, send_load
from helpers.measuring.streaming.sweep import sweep_rates

if TYPE_CHECKING:
    from helpers.dataflow import Job

WARM_UP = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # messages at once
WARM_UP_APART = 0.7  # seconds


def warm_up(
    topic: str, prompts: Sequence[str], *, responses: str, dead_letters: str | None = None
) -> Records:
    """Sends volleys of messages, few and many, and waits for the answers: a worker prepares itself for each
    size of batch when it meets it first, and what is measured meanwhile is too slow.

    Args:
        topic, prompts, responses, dead_letters: as for `send_load`.

    Raises:
        SendingError: as `send_load`.
    """
    times = volleys(WARM_UP, WARM_UP_APART)
    return send_load(topic, times, prompts, responses=responses, dead_letters=dead_letters)


def measure_changes(
    job: Job,
    arguments: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]],
    *,
    rates: Sequence[float],
    seconds: float,
    responses_topic: str,
    **load: Any,
) -> tuple[Job, dict[str, BundleTimes]]:
    """Updates a running job with each change in turn, and measures its bundle times.

    Args:
        job: the running job.
        arguments: those of `helpers.dataflow.update`, without a change.
        changes: answering options, as `[{"max_batch_size": 4}]`.
        rates: messages a second, one that the job keeps up with and one that it does not.
        seconds: how long to send at each.
        responses_topic: the path of the topic that responses are published to.
        load: `topic`, `prompts`, `responses` and `dead_letters`, as for `sweep_rates`.

    Returns:
        The job that runs at the end, with the last change, and the times by the changes' labels.

    Raises:
        JobError, OptionError, ValueError: as `helpers.dataflow.update`.
        SendingError, SweepError: as `sweep_rates`.
    """
    from helpers.dataflow import update

    found = {}
    for change in changes:
        job = update(job, **{**arguments, **change})
        pubsub.ask(load["topic"], responses_topic, load["prompts"][:1])  # the model is loaded for it
        warm_up(**load)
        found[label_of(change)] = measured_bundle_times(sweep_rates(job, rates, seconds=seconds, **load))
    return job, found


def label_of(change: Mapping[str, Any]) -> str:
    """Options as a reader sees them: `engine = ctranslate2, dtype = int8`."""
    return ", ".join(f"{name} = {value}" for name, value in change.items())
