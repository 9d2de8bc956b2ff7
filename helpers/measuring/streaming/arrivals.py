"""When messages arrive: at random, independently of each other, at a rate that may change in phases."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MOST_MESSAGES = 10_000_000


@dataclass(frozen=True)
class Phase:
    """A time with a constant mean rate.

    Attributes:
        rate: messages a second, on average; 0 for none.
        seconds: how long it lasts.

    Raises:
        ValueError: a rate or a time that cannot be.
    """

    rate: float
    seconds: float

    def __post_init__(self) -> None:
        for name in ("rate", "seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
                raise ValueError(f"{name} is {value!r}: it must be a number.")
        if self.rate < 0 or self.seconds <= 0:
            raise ValueError(
                f"{self.rate:g} messages a second for {self.seconds:g} s: give 0 or more, for a time."
            )


def poisson_arrivals(phases: Sequence[Phase], random_state: int = 0) -> list[float]:
    """The times of a Poisson process, in seconds from its start and in order.

    The gaps between arrivals are exponential, as those of independent senders are. A constant gap would hide
    the queue: it forms where several messages come together by chance.

    Args:
        phases: one after the other.
        random_state: the same one gives the same times.

    Raises:
        ValueError: they are more than `MOST_MESSAGES`.
    """
    if (count := sum(phase.rate * phase.seconds for phase in phases)) > MOST_MESSAGES:
        raise ValueError(f"{count:,.0f} messages are more than {MOST_MESSAGES:,}.")
    generator = random.Random(random_state)
    times, begin = [], 0.0
    for phase in phases:
        end, now = begin + phase.seconds, begin
        while phase.rate > 0 and (now := now + generator.expovariate(phase.rate)) < end:
            times.append(now)
        begin = end
    return times


def steady_arrivals(rate: float, seconds: float, random_state: int = 0) -> list[float]:
    """The times of a Poisson process at one rate, of which there is at least one.

    Raises:
        ValueError: a rate or a time that cannot be, or so little of both that no message comes.
    """
    times = poisson_arrivals([Phase(rate, seconds)], random_state)
    if not times:
        raise ValueError(f"at {rate:g} messages a second, none comes in {seconds:g} s: send for longer.")
    return times


def volleys(sizes: Sequence[int], seconds_apart: float) -> list[float]:
    """The times of messages that are sent together, so many at once: to warm a job up, for instance.

    Raises:
        ValueError: a number that cannot be.
    """
    if min(sizes, default=1) < 1 or not 0 < seconds_apart < 1e9:
        raise ValueError(f"{sizes} messages, {seconds_apart!r} s apart: give numbers above 0.")
    return [place * seconds_apart for place, size in enumerate(sizes) for _ in range(size)]
