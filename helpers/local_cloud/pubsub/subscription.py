"""The messages of one Pub/Sub subscription: waiting, or leased to a subscriber."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_BYTES_PER_ANSWER = 10_000_000


@dataclass
class Flow:
    """What one subscriber may hold at a time, and what it holds. A limit of zero means no limit."""

    max_messages: int = 0
    max_bytes: int = 0
    messages: int = 0
    bytes: int = 0

    def has_room(self, size: int) -> bool:
        if self.messages == 0:  # a message larger than the limit must get through alone
            return True
        return (not self.max_messages or self.messages < self.max_messages) and (
            not self.max_bytes or self.bytes + size <= self.max_bytes
        )


@dataclass(slots=True)
class _Lease:
    message: Any
    size: int
    due: float  # on the monotonic clock
    flow: Flow


class Subscription:
    """The queue of one subscription. Every method may be called from any thread.

    A message is delivered at least once: the first time in the order of publishing, and again, ahead of the
    others, when its lease ends without an acknowledgement.

    Args:
      settings: the Subscription protobuf.
      now: a clock that only goes forward, in seconds.
    """

    def __init__(self, settings: Any, now: Callable[[], float] = time.monotonic):
        self._now = now
        self.settings = settings  # the Subscription protobuf; replaced as a whole, never changed
        self.closed = False
        self._changed = threading.Condition()
        self._ready: deque[Any] = deque()
        self._leases: dict[str, _Lease] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of past leases are skipped
        self._numbers = itertools.count(1)

    def put(self, messages: Iterable[Any]) -> None:
        with self._changed:
            self._ready.extend(messages)
            self._changed.notify_all()

    def take(
        self,
        max_messages: int,
        wait_seconds: float | None,
        lease_seconds: Callable[[], float],
        flow: Flow | None = None,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> list[tuple[str, Any]]:
        """Leases messages to a subscriber, waiting for the first of them.

        Args:
          max_messages: the most to return.
          wait_seconds: how long to wait for a message; None waits until there is one.
          lease_seconds: gives the length of the leases.
          flow: what the subscriber may hold; its counts follow the leases.
          abandoned: whether the subscriber has gone. After a change, call `wake`.

        Returns:
          Pairs of acknowledgement id and message; none if the time has run out, the subscription was deleted
          or the subscriber has gone.
        """
        flow = flow or Flow()
        end = None if wait_seconds is None else self._now() + wait_seconds
        with self._changed:
            while not (self.closed or abandoned()):
                next_due = self._release_expired()
                if self._ready and flow.has_room(self._ready[0].ByteSize()):
                    return self._lease(max_messages, lease_seconds(), flow)
                limits = [t for t in (end, next_due) if t is not None]
                left = min(limits) - self._now() if limits else None
                if end is not None and end <= self._now():
                    break
                self._changed.wait(left if left is None else max(left, 0.001))
            return []

    def unacknowledged(self) -> int:
        """How many messages wait, those that a subscriber holds included."""
        with self._changed:
            return len(self._ready) + len(self._leases)

    def acknowledge(self, ack_ids: Iterable[str]) -> None:
        """Marks messages as done; an id whose lease is over is ignored, as in Pub/Sub."""
        with self._changed:
            for ack_id in ack_ids:
                self._end_lease(ack_id)
            self._changed.notify_all()

    def modify_deadline(self, ack_ids: Iterable[str], seconds: Iterable[int]) -> None:
        """Makes leases end that many seconds from now; zero gives the message back at once."""
        with self._changed:
            now = self._now()
            for ack_id, length in zip(ack_ids, seconds, strict=True):
                if lease := self._leases.get(ack_id):
                    lease.due = now + length
                    heapq.heappush(self._deadlines, (lease.due, ack_id))
            self._release_expired()
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes those who wait check again whether their subscriber has gone."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _lease(self, max_messages: int, seconds: float, flow: Flow) -> list[tuple[str, Any]]:
        taken: list[tuple[str, Any]] = []
        due, total = self._now() + seconds, 0
        while self._ready and len(taken) < max_messages:
            size = self._ready[0].ByteSize()
            if not flow.has_room(size) or (taken and total + size > MAX_BYTES_PER_ANSWER):
                break
            message, ack_id = self._ready.popleft(), f"{id(self):x}-{next(self._numbers)}"
            self._leases[ack_id] = _Lease(message, size, due, flow)
            heapq.heappush(self._deadlines, (due, ack_id))
            flow.messages += 1
            flow.bytes += size
            total += size
            taken.append((ack_id, message))
        return taken

    def _end_lease(self, ack_id: str) -> _Lease | None:
        lease = self._leases.pop(ack_id, None)
        if lease:
            lease.flow.messages -= 1
            lease.flow.bytes -= lease.size
        return lease

    def _release_expired(self) -> float | None:
        """Makes messages whose lease is over ready again; returns when the next lease ends."""
        now, expired = self._now(), []
        while self._deadlines:
            due, ack_id = self._deadlines[0]
            lease = self._leases.get(ack_id)
            if lease and lease.due == due:
                if due > now:
                    break
                self._end_lease(ack_id)
                expired.append(lease.message)
            heapq.heappop(self._deadlines)
        self._ready.extendleft(reversed(expired))
        return self._deadlines[0][0] if self._deadlines else None
