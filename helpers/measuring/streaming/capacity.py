"""What a stream can do, predicted from the times of its batches: latency at a rate, and its highest rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.measuring.streaming.arrivals import steady_arrivals
from helpers.measuring.streaming.batch_times import BatchTimes
from helpers.measuring.streaming.queueing import Simulated, simulate

if TYPE_CHECKING:
    from helpers.measuring.streaming.sweep import Point

MESSAGES = 2000
"""How many messages are simulated to find the highest rate: enough for 100 beyond the 95th percentile."""

CURVE_POINTS, CURVE_MESSAGES = 24, 1000
DRAWS = 9


@dataclass(frozen=True)
class Predicted:
    """What is predicted of a stream at one rate.

    Attributes:
        offered: messages sent a second.
        answered: responses a second, from the first message to the last response.
        p50, p95, p99: seconds from when a message is sent to its response.
    """

    offered: float
    answered: float
    p50: float
    p95: float
    p99: float


def simulate_stream(
    times: BatchTimes, arrived: Sequence[float], workers: int = 1, random_state: int = 0
) -> Simulated:
    """What becomes of messages that arrive at given times, in seconds and in order, with so many workers."""
    draw = times.draw(random_state)
    return simulate(
        arrived,
        lambda places: draw(len(places)),
        workers=workers,
        most=times.most,
        per_arrival=times.per_arrival / workers,
        turnaround=times.turnaround,
    )


def predict_rates(
    times: BatchTimes, rates: Sequence[float], *, seconds: float, random_state: int = 0
) -> list[Predicted]:
    """What `sweep_rates` with the same rates, seconds and random state will find.

    The messages arrive at the very times at which it sends them: what chance does to arrivals is then in
    both, and what differs is the prediction's own error.

    Raises:
        ValueError: a rate that cannot be, or that sends nothing in so short a time.
    """
    found = []
    for rate in rates:
        arrived = steady_arrivals(rate, seconds, random_state)
        found.append(_predicted(len(arrived) / seconds, times, arrived))
    return found


def predict_points(times: BatchTimes, points: Sequence[Point]) -> list[Predicted]:
    """The same for what has been measured: each point's messages, at the times at which they were to be sent.

    Raises:
        ValueError: a point without records, as one that was read from a file.
    """
    found = []
    for point in points:
        if not point.records.messages:
            raise ValueError(
                "a point without its records cannot be predicted: its arrival times are not known."
            )
        arrived = [one.intended for one in point.records.messages]
        found.append(_predicted(point.offered, times, arrived))
    return found


def compare(predicted: Sequence[Predicted], measured: Sequence[Point]) -> list[dict[str, object]]:
    """What was predicted beside what was measured at the same rates, as rows of a table. A sweep that ended
    early has fewer points than there are predictions."""
    return [
        {
            "messages a second": point.offered,
            "answered, predicted": one.answered,
            "answered, measured": point.answered,
            "p95 (s), predicted": one.p95,
            "p95 (s), measured": point.p95,
            "p95, off by": off_by(one.p95, point.p95),
        }
        for one, point in zip(predicted, measured, strict=False)
    ]


def off_by(predicted: float, measured: float) -> str:
    """How far a prediction is off, as `+12%` where it is too high; a dash if either is not finite, or 0."""
    if not (math.isfinite(predicted) and math.isfinite(measured) and measured):
        return "–"
    return f"{predicted / measured - 1:+.0%}"


def _predicted(offered: float, times: BatchTimes, arrived: Sequence[float]) -> Predicted:
    """Medians of several runs: single batches vary at random, and the arrivals do not."""
    runs = [simulate_stream(times, arrived, random_state=random_state) for random_state in range(DRAWS)]
    latencies = (statistics.median(run.latency(share) for run in runs) for share in (0.5, 0.95, 0.99))
    return Predicted(offered, statistics.median(run.rate for run in runs), *latencies)


def predicted_curve(times: BatchTimes) -> list[Predicted]:
    """What to expect in the long run, from one message in four seconds to nearly the most: for a plot."""
    most = 0.95 * most_rate(times)
    least = min(0.25, most / 10)
    rates = [least * (most / least) ** (place / (CURVE_POINTS - 1)) for place in range(CURVE_POINTS)]
    return [predict_rates(times, [rate], seconds=CURVE_MESSAGES / rate)[0] for rate in rates]


def most_rate(times: BatchTimes, workers: int = 1) -> float:
    """The most messages a second that the workers answer: a queue that grows fills each batch. At that rate
    as many arrive while a batch is answered."""
    cycle = times.seconds(times.most) + times.per_arrival * times.most + times.turnaround
    return workers * times.most / cycle


def highest_rate(times: BatchTimes, seconds: float) -> float:
    """The highest rate, in messages a second, at which one worker answers 95 of 100 messages within a time.

    Found by halving, to a hundredth; 0 if it is less than a thousandth of the most, as where a message alone
    takes longer.

    Raises:
        ValueError: a time that cannot be.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"a latency of {seconds!r} s cannot be kept: give a number above 0.")
    low, high = 0.0, most_rate(times)
    least = 0.001 * high
    while high - low > 0.01 * high and high > least:
        rate = (low + high) / 2
        arrived = steady_arrivals(rate, MESSAGES / rate, random_state=1)
        if simulate_stream(times, arrived).latency(0.95) <= seconds:
            low = rate
        else:
            high = rate
    return low
