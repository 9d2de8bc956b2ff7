"""A queue of messages and the workers that answer them, simulated.

A worker that is free takes the messages that wait, oldest first, up to what it takes at once: a *batch*. All
of a batch's responses come out when it is done. While it works, messages gather, so that the next batch is
larger: that is why the rate can rise well above what one message at a time would allow, and why latency rises
slowly at first, and then suddenly.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulated:
    """What became of simulated messages.

    Attributes:
        arrived: when each arrived, in seconds.
        answered: when each was answered.
        batches: how many messages each batch had.
        busy: the share of the workers' time in which they worked, 0 to 1.
    """

    arrived: list[float]
    answered: list[float]
    batches: list[int]
    busy: float

    @property
    def latencies(self) -> list[float]:
        """The seconds from arrival to answer, in the order of arrival."""
        return [end - begin for begin, end in zip(self.arrived, self.answered, strict=True)]

    def latency(self, share: float) -> float:
        """The latency that a share of the messages does not exceed, for instance 0.95.

        Raises:
            ValueError: there are no messages.
        """
        return percentile(self.latencies, share)

    @property
    def rate(self) -> float:
        """Messages answered a second, from the first arrival to the last answer."""
        span = max(self.answered) - self.arrived[0] if self.answered else 0.0
        return len(self.answered) / span if span > 0 else 0.0

    def waiting_at(self, when: float) -> int:
        """How many had arrived and were not yet answered."""
        return bisect_right(self.arrived, when) - bisect_right(sorted(self.answered), when)

    def drained_at(self, after: float) -> float:
        """When, not before a time, nothing waits any more that arrived before it: the end of a backlog."""
        pairs = zip(self.arrived, self.answered, strict=True)
        return max([after, *(end for begin, end in pairs if begin <= after)])


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all does not exceed: the nearest rank.

    Raises:
        ValueError: there are no values, or no such share.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"there is no value that {share!r} of {len(values)} do not exceed.")
    return sorted(values)[math.ceil(round(share * len(values), 9)) - 1]


def simulate(
    arrived: Sequence[float],
    seconds_of: Callable[[Sequence[int]], float],
    *,
    workers: int = 1,
    most: int = 32,
    per_arrival: float = 0.0,
    turnaround: float = 0.0,
) -> Simulated:
    """Simulates a queue.

    Args:
        arrived: when messages arrive, in seconds and in order.
        seconds_of: how long a worker takes for the messages of a batch, given by their places in `arrived`.
        workers: how many take batches independently.
        most: the most messages in a batch.
        per_arrival: how many seconds a batch takes longer for each message that arrives meanwhile, where the
            workers' machine also delivers the messages.
        turnaround: how many seconds a worker needs, once the answers of a batch are out, before it takes the
            next one; messages that arrive meanwhile are in that one.

    Raises:
        ValueError: numbers that make no sense.
    """
    if not (0 <= per_arrival < math.inf and 0 <= turnaround < math.inf):
        raise ValueError(f"{per_arrival} s for each arrival, {turnaround} s to turn round: give 0 or more.")
    if workers < 1 or most < 1:
        raise ValueError(f"{workers} workers with {most} messages at once: give at least one of each.")
    if any(later < earlier for earlier, later in itertools.pairwise(arrived)):
        raise ValueError("the arrivals are not in order.")
    if not all(map(math.isfinite, arrived)):
        raise ValueError("an arrival is no number.")
    free = [(-math.inf, number) for number in range(workers)]  # when each worker is free again
    heapq.heapify(free)
    answered = [0.0] * len(arrived)
    batches, worked, first = [], 0.0, 0
    while first < len(arrived):
        since, worker = heapq.heappop(free)
        begin = max(since, arrived[first])
        last = min(bisect_right(arrived, begin), first + most)
        seconds = seconds_of(range(first, last))
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a batch of {last - first} takes {seconds} s, which cannot be.")
        if per_arrival:
            seconds = _with_arrivals(arrived, begin, seconds, per_arrival)
        for place in range(first, last):
            answered[place] = begin + seconds
        heapq.heappush(free, (begin + seconds + turnaround, worker))
        batches.append(last - first)
        worked += seconds
        first = last
    span = max(answered, default=0.0) - (arrived[0] if arrived else 0.0)
    return Simulated(list(arrived), answered, batches, worked / (workers * span) if span > 0 else 0.0)


def _with_arrivals(arrived: Sequence[float], begin: float, seconds: float, per_arrival: float) -> float:
    """What a batch takes with the messages that arrive meanwhile, which are more the longer it takes."""
    place = bisect_right(arrived, begin)
    while place < len(arrived) and arrived[place] < begin + seconds:
        seconds += per_arrival
        place += 1
    return seconds
