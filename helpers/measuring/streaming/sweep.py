"""A running job at several rates: how much it answers, how late, and in what batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from helpers.measuring.streaming.arrivals import steady_arrivals
from helpers.measuring.streaming.load import Records, send_load

if TYPE_CHECKING:
    from helpers.dataflow import Job

KEEPS_UP = 0.93
"""The least share of the offered rate that a stream sustains which keeps up with it: in a short run, chance
makes it vary by some hundredths."""


class SweepError(RuntimeError):
    """A sweep that cannot go on; the message says why."""


@dataclass(frozen=True)
class Point:
    """A job at one rate.

    Attributes:
        offered: messages sent a second.
        answered: responses a second.
        p50, p95, p99: seconds from when a message was to be sent to its response; infinite where so many
            still waited.
        published, responses, dead_letters, waiting: messages; the first is the sum of the others.
        batch_size: the mean number of prompts in a batch; 0 if the job does not count it.
        batch_seconds: the mean time of a batch; 0 likewise.
        padding: the share of the tokens that the model reads that are padding.
        batches: how many there were.
        sustained: responses a second without the time that a message takes anyway; see `Records.sustained`.
        records: each message.
    """

    offered: float
    answered: float
    p50: float
    p95: float
    p99: float
    published: int
    responses: int
    dead_letters: int
    waiting: int
    batch_size: float
    batch_seconds: float
    padding: float
    batches: int
    sustained: float
    records: Records = field(repr=False, compare=False)

    @property
    def keeps_up(self) -> bool:
        """Whether as many messages were answered as came, and none waited in the end."""
        enough = KEEPS_UP * self.offered * self.responses / self.published
        return self.responses > 0 and not self.waiting and self.sustained >= enough

    def row(self) -> dict[str, object]:
        """For a table."""
        return {
            "messages a second": self.offered,
            "answered a second": self.answered,
            "p50 (s)": self.p50,
            "p95 (s)": self.p95,
            "p99 (s)": self.p99,
            "prompts in a batch": self.batch_size,
            "padding": f"{self.padding:.0%}",
            "keeps up": "yes" if self.keeps_up else "no",
        }


def sweep_rates(
    job: Job,
    rates: Sequence[float],
    *,
    seconds: float,
    topic: str,
    prompts: Sequence[str],
    responses: str,
    dead_letters: str | None = None,
    wait_seconds: float = 60,
    random_state: int = 0,
    on_point: Callable[[Point], object] = lambda point: None,
) -> list[Point]:
    """Sends load to a running job, at one rate after the other.

    Each begins when the messages of the one before are answered. The first that the job does not keep up with
    is the last: from there on, latency says only how long the queue has grown.

    Args:
        job: which reads the topic.
        rates: messages a second, the lowest first.
        seconds: how long to send at each.
        topic, prompts, responses, dead_letters, wait_seconds: as for `send_load`.
        random_state: of the arrival times.
        on_point: called with each result.

    Raises:
        SweepError: the job has ended.
        SendingError: as `send_load`.
        ValueError: the rates are not in order, or cannot be.
    """
    if list(rates) != sorted(set(rates)):
        raise ValueError("give the rates in order, the lowest first, and each once.")
    plans = [steady_arrivals(rate, seconds, random_state) for rate in rates]
    points = []
    for times in plans:
        before = _counted(job)
        found = send_load(
            topic,
            times,
            prompts,
            responses=responses,
            dead_letters=dead_letters,
            wait_seconds=wait_seconds,
            should_stop=lambda: _has_ended(job),
        )
        if _has_ended(job):
            raise SweepError(
                f"The job ended ({job.state()}) after {len(points)} of {len(rates)} rates: see job.errors(), "
                "and if it was drained, give it a larger max_run_minutes."
            )
        after = _counted(job)
        point = _point(len(times) / seconds, found, {name: after[name] - before[name] for name in after})
        points.append(point)
        on_point(point)
        if not point.keeps_up:
            break
    return points


def knee(points: Sequence[Point]) -> Point | None:
    """The highest rate that the job kept up with; None if there is none."""
    return max((point for point in points if point.keeps_up), key=lambda point: point.offered, default=None)


def _point(offered: float, found: Records, counted: dict[str, float]) -> Point:
    def each(total: str, count: str) -> float:
        return counted[total] / counted[count] if counted[count] else 0.0

    read = counted["prompt_tokens"] + counted["padding_tokens"]
    has_alive = found.dead < len(found.messages)
    p50, p95, p99 = (found.latency(share) if has_alive else math.nan for share in (0.5, 0.95, 0.99))
    return Point(
        offered=offered,
        answered=found.rate,
        p50=p50,
        p95=p95,
        p99=p99,
        published=len(found.messages),
        responses=len(found.answered),
        dead_letters=found.dead,
        waiting=found.waiting,
        batch_size=each("prompts", "batches"),
        batch_seconds=each("milliseconds", "batches") / 1000,
        padding=counted["padding_tokens"] / read if read else 0.0,
        batches=int(counted["batches"]),
        sustained=found.sustained,
        records=found,
    )


def _counted(job: Job) -> dict[str, float]:
    """What the job has counted so far."""
    counters, distributions = job.counters(), job.distributions()
    sizes, times = distributions.get("batch_size"), distributions.get("batch_milliseconds")
    return {
        "batches": sizes.count if sizes else 0,
        "prompts": sizes.sum if sizes else 0,
        "milliseconds": times.sum if times else 0,
        "prompt_tokens": counters.get("prompt_tokens", 0),
        "padding_tokens": counters.get("padding_tokens", 0),
    }


def _has_ended(job: Job) -> bool:
    from helpers.dataflow import TERMINAL

    return job.state() in TERMINAL
