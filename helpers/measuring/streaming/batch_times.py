"""How long a running stream takes for a batch of messages, seen from outside: from when answers arrive.

What a job counts of its batches leaves out what is around them: reading, Beam's own work, publishing. The
answers of a batch come out together, so each group of answers is a batch. It began when its first message
arrived, or a little after the batch before was done: how long after is seen from which messages it has,
since what comes in that turnaround is still taken along. The times are kept as they are, by size, and read
between; no formula is put on them. A batch is what the model computes at once; how the runner hands messages
over, in bundles, is not seen. One more number is fitted: how much longer a batch takes for each message
that arrives meanwhile. Where the machine that computes also sends, stores and delivers the messages, as on
the local cloud, that is some milliseconds, and a batch of the same size takes longer the more is sent.

This holds for one worker that takes one batch after the other, and delivers the answers of each within
`TOGETHER_SECONDS`. Several workers' batches overlap; batches that take no longer than that cannot be told
apart, and seem larger than they are.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.measuring.streaming.load import Record, Records

if TYPE_CHECKING:
    from helpers.measuring.streaming.sweep import Point

TOGETHER_SECONDS = 0.03
"""Answers that arrive within so short a time belong together."""

SPREAD = 20  # factors
MOST_TURNAROUND = 0.5  # seconds
PER_ARRIVAL = [0.0005 * step for step in range(41)]  # seconds: those that are tried

RESPONSE_TOKENS, REASONING_TOKENS = "response_tokens", "reasoning_tokens"
"""The attribute of a response that has the number of its tokens."""


@dataclass(frozen=True)
class BatchTimes:
    """Seconds that a batch takes, by its size.

    Attributes:
        sizes: messages in a batch, the smallest first: medians of 1, 2, 3 to 4, 5 to 8, 9 to 16 and so on,
            as far as such batches were seen.
        times: the median of the seconds of each.
        most: the largest batch that was seen.
        response_tokens: of a response, on average.
        computing: the share of the time in which the model computed, 0 to 1; the rest is around it.
        per_arrival: the seconds that a batch takes longer for each message that arrives meanwhile; not in
            `times`.
        turnaround: the seconds from when the answers of a batch are out until the next batch is taken.
        spread: how much longer or shorter single batches took, as factors that are equally likely.

    Raises:
        ValueError: sizes and times that do not belong together, or cannot be.
    """

    sizes: tuple[float, ...]
    times: tuple[float, ...]
    most: int
    response_tokens: float = 0.0
    computing: float = 1.0
    per_arrival: float = 0.0
    turnaround: float = 0.0
    spread: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        # As they come from JSON.
        for name in ("sizes", "times", "spread"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.sizes or len(self.sizes) != len(self.times) or list(self.sizes) != sorted(self.sizes):
            raise ValueError(f"{self.sizes} and {self.times}: give a time for each size, in order.")
        above_zero = (*self.times, *self.spread)
        not_below = (self.per_arrival, self.turnaround, self.response_tokens)
        if (
            not self.spread
            or not all(0 < value < math.inf for value in above_zero)
            or not all(0 <= value < math.inf for value in not_below)
            or not all(1 <= value < math.inf for value in (*self.sizes, self.most))
            or not 0 <= self.computing <= 1
        ):
            raise ValueError(f"{self} cannot be.")

    def seconds(self, size: int, response_tokens: float | None = None) -> float:
        """For a batch of a size: as measured, between two that were, or in proportion to the largest.

        Args:
            size: messages.
            response_tokens: of each response, if not as many as in what was measured. The computed part of
                the time is taken to be in proportion to it, so reading the prompts counts as little as it did
                when it was measured.
        """
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            time = self.times[-1] * size / self.sizes[-1]
        elif place == 0:
            time = self.times[0]
        else:
            (left, right), (low, high) = self.sizes[place - 1 : place + 1], self.times[place - 1 : place + 1]
            time = low + (high - low) * (size - left) / (right - left)
        return time * (1 - self.computing + self._computed(response_tokens))

    def computing_share(self, response_tokens: float) -> float:
        """`computing`, for responses of so many tokens: of longer ones, more of the time is computed."""
        computed = self._computed(response_tokens)
        return computed / (1 - self.computing + computed)

    def _computed(self, response_tokens: float | None) -> float:
        """The computed part of a time for responses of so many tokens, as a share of the measured time."""
        if response_tokens is None or not self.response_tokens:
            return self.computing
        return self.computing * response_tokens / self.response_tokens

    def draw(self, random_state: int = 0, response_tokens: float | None = None) -> Callable[[int], float]:
        """A function from a batch's size to the seconds that one such batch may take: as `seconds`, with
        the spread that was measured. The median alone would make the slowest of 20 messages too fast."""
        generator = random.Random(random_state)
        return lambda size: self.seconds(size, response_tokens) * generator.choice(self.spread)


def measured_batch_times(runs: Sequence[Point | Records]) -> BatchTimes:
    """The times of the batches of several runs. Dead letters are left out: the model computed nothing for
    them.

    Args:
        runs: as `sweep_rates` and `send_load` give them, from a rate at which messages come alone to one at
            which batches are full.

    Raises:
        ValueError: nothing was answered.
    """
    every = [one if isinstance(one, Records) else one.records for one in runs]
    batches_in = [_batches(records) for records in every]
    turnaround = _turnaround(every, batches_in)
    seen_in = [
        _seen(records, batches, turnaround) for records, batches in zip(every, batches_in, strict=True)
    ]
    seen = [batch for batches in seen_in for batch in batches]
    if not seen:
        raise ValueError("no message was answered, so there are no batches: see whether the job runs.")
    found = min((_fit(seen, cost) for cost in PER_ARRIVAL), key=lambda one: _error(one, seen))
    tokens = [
        int(text) + int(one.attributes.get(REASONING_TOKENS, 0))
        for records in every
        for one in records.answered
        if (text := one.attributes.get(RESPONSE_TOKENS, "")).isdigit()
    ]
    # What the job counted is known of points alone.
    counted = [(one, seen) for one, seen in zip(runs, seen_in, strict=True) if not isinstance(one, Records)]
    computed = sum(point.batches * point.batch_seconds for point, _ in counted)
    busy = sum(batch.seconds for _, batches in counted for batch in batches)
    factors = [one.seconds / _expected(found, one) for one in seen]
    return replace(
        found,
        turnaround=turnaround,
        response_tokens=statistics.fmean(tokens) if tokens else 0.0,
        computing=min(computed / busy, 1.0) if computed and busy else 1.0,
        spread=tuple(statistics.quantiles(factors, n=SPREAD + 1, method="inclusive"))
        if len(factors) > 1
        else (1.0,),
    )


@dataclass(frozen=True)
class _Batch:
    size: int
    seconds: float
    arrivals: int  # of other messages, while it was answered


def _turnaround(every: Sequence[Records], batches_in: Sequence[list[list[Record]]]) -> float:
    """The time after a batch that tells best, of the messages that come while others wait already, which are
    in the next batch and which are not."""
    taken, left = [], []
    for records, batches in zip(every, batches_in, strict=True):
        for before, batch in itertools.pairwise(batches):
            done = max(one.answered for one in before)
            if min(one.sent for one in batch) > done:
                continue  # nothing waited
            last = max(one.answered for one in batch)
            if any(one.sent <= done and one.answered > last for one in records.answered):
                continue  # there was no room for all that waited, let alone for what came
            inside = {id(one) for one in batch}
            came = [one for one in records.answered if done < one.sent <= done + MOST_TURNAROUND]
            taken += [one.sent - done for one in came if id(one) in inside]
            left += [one.sent - done for one in came if id(one) not in inside]
    return min(
        (0.0, *sorted(taken)),
        key=lambda seconds: sum(one > seconds for one in taken) + sum(one <= seconds for one in left),
    )


def _seen(records: Records, batches: list[list[Record]], turnaround: float) -> list[_Batch]:
    sent = sorted(one.sent for one in records.messages)
    found, free = [], 0.0
    for batch in batches:
        done = max(one.answered for one in batch)
        began = max(free, min(one.sent for one in batch))
        if done > began:
            own = sum(one.sent > began for one in batch)
            arrivals = bisect_right(sent, done) - bisect_right(sent, began) - own
            found.append(_Batch(len(batch), done - began, arrivals))
        free = done + turnaround
    return found


def _fit(seen: Sequence[_Batch], per_arrival: float) -> BatchTimes:
    """The medians of each class of sizes, if each arrival costs so much."""
    classes: dict[int, list[tuple[int, float]]] = {}
    for one in seen:
        alone = max(one.seconds - per_arrival * one.arrivals, 0.1 * one.seconds)
        classes.setdefault((one.size - 1).bit_length(), []).append((one.size, alone))
    # The smallest size of a class is above those of the class before, and so the medians rise.
    pairs = [tuple(zip(*classes[one], strict=True)) for one in sorted(classes)]
    return BatchTimes(
        sizes=tuple(float(statistics.median(sizes)) for sizes, _ in pairs),
        times=tuple(statistics.median(times) for _, times in pairs),
        most=max(one.size for one in seen),
        per_arrival=per_arrival,
    )


def _expected(times: BatchTimes, one: _Batch) -> float:
    return times.seconds(one.size) + times.per_arrival * one.arrivals


def _error(times: BatchTimes, seen: Sequence[_Batch]) -> float:
    return statistics.fmean(abs(one.seconds / _expected(times, one) - 1) for one in seen)


def _batches(records: Records) -> list[list[Record]]:
    found: list[list[Record]] = []
    for one in sorted(records.answered, key=lambda one: one.answered):
        if found and one.answered - found[-1][-1].answered < TOGETHER_SECONDS:
            found[-1].append(one)
        else:
            found.append([one])
    return found
