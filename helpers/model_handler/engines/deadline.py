"""The time that responses which are computed together may take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Deadline:
    """A time from when it is made; engines ask after each step.

    Args:
        seconds: how long; None for no limit.
        now: a clock, in seconds.

    Attributes:
        has_passed: whether it had passed when it was last asked.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] | None = None) -> None:
        self._now = now or time.monotonic
        self._end = math.inf if seconds is None else self._now() + seconds
        self.has_passed = False

    def passes(self) -> bool:
        """Whether it has passed by now."""
        self.has_passed = self.has_passed or self._now() >= self._end
        return self.has_passed
