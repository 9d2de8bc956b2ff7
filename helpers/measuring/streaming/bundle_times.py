"""How long a running stream takes for a bundle of messages, seen from outside: from when answers arrive.

What a job counts of its batches leaves out what is around them: reading, Beam's own work, publishing. The
answers of a bundle come out together, so each group of answers is a bundle. It began when its first message
arrived, or a little after the bundle before was done: how long after is seen from which messages it has,
since what comes in that turnaround is still taken along. The times are kept as they are, by size, and read
between; no formula is put on them. One more number is fitted: how much longer a bundle takes for each message
that arrives meanwhile. Where the machine that computes also sends, stores and delivers the messages, as on
the local cloud, that is some milliseconds, and a bundle of the same size takes longer the more is sent.

This holds for one worker that takes one bundle after the other, and delivers the answers of each within
`TOGETHER_SECONDS`. Several workers' bundles overlap; bundles that take no longer than that cannot be told
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
class BundleTimes:
    """Seconds that a bundle takes, by its size.

    Attributes:
        sizes: messages in a bundle, the smallest first: medians of 1, 2, 3 to 4, 5 to 8, 9 to 16 and so on,
            as far as such bundles were seen.
        times: the median of the seconds of each.
        most: the largest bundle that was seen.
        response_tokens: of a response, on average.
        computing: the share of the time in which the model computed, 0 to 1; the rest is around it.
        per_arrival: the seconds that a bundle takes longer for each message that arrives meanwhile; not in
            `times`.
        turnaround: the seconds from when the answers of a bundle are out until the next bundle is taken.
        spread: how much longer or shorter single bundles took, as factors that are equally likely.

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
        """For a bundle of a size: as measured, between two that were, or in proportion to the largest.

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
        """A function from a bundle's size to the seconds that one such bundle may take: as `seconds`, with
        the spread that was measured. The median alone would make the slowest of 20 messages too fast."""
        generator = random.Random(random_state)
        return lambda size: self.seconds(size, response_tokens) * generator.choice(self.spread)


def measured_bundle_times(runs: Sequence[Point | Records]) -> BundleTimes:
    """The times of the bundles of several runs. Dead letters are left out: the model computed nothing for
    them.

    Args:
        runs: as `sweep_rates` and `send_load` give them, from a rate at which messages come alone to one at
            which bundles are full.

    Raises:
        ValueError: nothing was answered.
    """
    every = [one if isinstance(one, Records) else one.records for one in runs]
    bundles_in = [_bundles(records) for records in every]
    turnaround = _turnaround(every, bundles_in)
    seen_in = [
        _seen(records, bundles, turnaround) for records, bundles in zip(every, bundles_in, strict=True)
    ]
    seen = [bundle for bundles in seen_in for bundle in bundles]
    if not seen:
        raise ValueError("no message was answered, so there are no bundles: see whether the job runs.")
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
    busy = sum(bundle.seconds for _, bundles in counted for bundle in bundles)
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
class _Bundle:
    size: int
    seconds: float
    arrivals: int  # of other messages, while it was answered


def _turnaround(every: Sequence[Records], bundles_in: Sequence[list[list[Record]]]) -> float:
    """The time after a bundle that tells best, of the messages that come while others wait already, which are
    in the next bundle and which are not."""
    taken, left = [], []
    for records, bundles in zip(every, bundles_in, strict=True):
        for before, bundle in itertools.pairwise(bundles):
            done = max(one.answered for one in before)
            if min(one.sent for one in bundle) > done:
                continue  # nothing waited
            last = max(one.answered for one in bundle)
            if any(one.sent <= done and one.answered > last for one in records.answered):
                continue  # there was no room for all that waited, let alone for what came
            inside = {id(one) for one in bundle}
            came = [one for one in records.answered if done < one.sent <= done + MOST_TURNAROUND]
            taken += [one.sent - done for one in came if id(one) in inside]
            left += [one.sent - done for one in came if id(one) not in inside]
    return min(
        (0.0, *sorted(taken)),
        key=lambda seconds: sum(one > seconds for one in taken) + sum(one <= seconds for one in left),
    )


def _seen(records: Records, bundles: list[list[Record]], turnaround: float) -> list[_Bundle]:
    sent = sorted(one.sent for one in records.messages)
    found, free = [], 0.0
    for bundle in bundles:
        done = max(one.answered for one in bundle)
        began = max(free, min(one.sent for one in bundle))
        if done > began:
            own = sum(one.sent > began for one in bundle)
            arrivals = bisect_right(sent, done) - bisect_right(sent, began) - own
            found.append(_Bundle(len(bundle), done - began, arrivals))
        free = done + turnaround
    return found


def _fit(seen: Sequence[_Bundle], per_arrival: float) -> BundleTimes:
    """The medians of each class of sizes, if each arrival costs so much."""
    classes: dict[int, list[tuple[int, float]]] = {}
    for one in seen:
        alone = max(one.seconds - per_arrival * one.arrivals, 0.1 * one.seconds)
        classes.setdefault((one.size - 1).bit_length(), []).append((one.size, alone))
    # The smallest size of a class is above those of the class before, and so the medians rise.
    pairs = [tuple(zip(*classes[one], strict=True)) for one in sorted(classes)]
    return BundleTimes(
        sizes=tuple(float(statistics.median(sizes)) for sizes, _ in pairs),
        times=tuple(statistics.median(times) for _, times in pairs),
        most=max(one.size for one in seen),
        per_arrival=per_arrival,
    )


def _expected(times: BundleTimes, one: _Bundle) -> float:
    return times.seconds(one.size) + times.per_arrival * one.arrivals


def _error(times: BundleTimes, seen: Sequence[_Bundle]) -> float:
    return statistics.fmean(abs(one.seconds / _expected(times, one) - 1) for one in seen)


def _bundles(records: Records) -> list[list[Record]]:
    found: list[list[Record]] = []
    for one in sorted(records.answered, key=lambda one: one.answered):
        if found and one.answered - found[-1][-1].answered < TOGETHER_SECONDS:
            found[-1].append(one)
        else:
            found.append([one])
    return found
