"""The time that responses which are computed together may take."""

from __future__ import annotations

import math
import time


class Deadline:
    """A time from when it is made; engines ask after each step.

    Args:
        seconds: how long; None for no limit.

    Attributes:
        has_passed: whether it had passed when it was last asked.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self.has_passed = False

    def passes(self) -> bool:
        """Whether it has passed by now."""
        self.has_passed = self.has_passed or time.monotonic() >= self._end
        return self.has_passed
