"""How long a running stream takes for a bundle of messages, seen from outside: from when answers arrive.

What a job counts of its batches leaves out what is around them: reading, Beam's own work, publishing. The
answers of a bundle come out together, so each group of answers is a bundle, and it began when the one before
was done, or when its first message arrived. Measured with the packaged model on the local cloud, the time is
no straight line: a lone prompt took 0.27 s, two 0.47 and fourteen 0.57. So the times are kept as they are, by
size, and read between. This holds for one worker; with several, bundles overlap.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.measuring.streaming.load import Record

TOGETHER_SECONDS = 0.03
"""Answers that arrive within so short a time belong together."""


@dataclass(frozen=True)
class BundleTimes:
    """Seconds that a bundle takes, by its size.

    Attributes:
        sizes: that were seen, the smallest first.
        times: the median of each, in seconds.
    """

    sizes: tuple[int, ...]
    times: tuple[float, ...]

    def seconds(self, size: int) -> float:
        """For a bundle of a size: as measured, between two that were, or in proportion to the nearest."""
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            return self.times[-1] * size / self.sizes[-1]
        if self.sizes[place] == size or place == 0:
            return self.times[place]
        (left, right), (low, high) = self.sizes[place - 1 : place + 1], self.times[place - 1 : place + 1]
        return low + (high - low) * (size - left) / (right - left)


def measured_bundle_times(
    runs: Sequence[Sequence[Record]], together: float = TOGETHER_SECONDS
) -> BundleTimes:
    """The times of the bundles of several runs.

    Args:
        runs: the messages of each, as `send_load` records them, at rates from one at a time to full bundles.
        together: how near answers of a bundle are to each other, in seconds.

    Raises:
        ValueError: nothing was answered.
    """
    by_size: dict[int, list[float]] = {}
    for messages in runs:
        before = 0.0
        for bundle in _bundles(messages, together):
            done = max(one.answered for one in bundle)
            began = max(before, min(one.sent for one in bundle))
            by_size.setdefault(len(bundle), []).append(max(done - began, 0.0))
            before = done
    if not by_size:
        raise ValueError("no message was answered, so there are no bundles: see whether the job runs.")
    sizes = tuple(sorted(by_size))
    return BundleTimes(sizes, tuple(statistics.median(by_size[size]) for size in sizes))


def _bundles(messages: Sequence[Record], together: float) -> list[list[Record]]:
    found: list[list[Record]] = []
    answered = [one for one in messages if one.answered is not None]
    for one in sorted(answered, key=lambda one: one.answered):
        if found and one.answered - found[-1][-1].answered < together:
            found[-1].append(one)
        else:
            found.append([one])
    return found
