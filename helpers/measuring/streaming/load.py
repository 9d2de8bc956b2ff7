"""Load on a stream: messages at given times, whatever becomes of them, and a record of each.

The load is *open*: a message is published when its time has come, not when the one before is answered. A
sender that waits for answers sends less just when the stream is slow, and then measures how fast a stream is
that it spares: the error is known as coordinated omission. For the same reason, a message's latency counts
from when it was to be sent, not from when it was.
"""

from __future__ import annotations

import itertools
import math
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.types import PubsubMessage

from helpers import pubsub
from helpers.measuring.streaming.queueing import percentile

ATTRIBUTE = "load"
"""The attribute that says which run a message is of, and its number in it; answers have it too."""

MOST_LATE_SECONDS = 5.0
PULL_SECONDS = 2.0
PASSING = (
    exceptions.Aborted,
    exceptions.DeadlineExceeded,
    exceptions.InternalServerError,
    exceptions.ResourceExhausted,
    exceptions.ServiceUnavailable,
)
ASK_SECONDS = 0.5
PUBLISH_SECONDS = 30.0
SENDERS = 4
MOST_TOGETHER = 100
SWITCH_SECONDS = 0.0005
SLEEP_SHORT = 0.002  # a sleep may last longer than asked for by about so much


class SendingError(RuntimeError):
    """Load that cannot be sent as it was asked for; the message says what to do."""


@dataclass
class Record:
    """What became of a message. Times are in seconds since the run's start.

    Attributes:
        intended: when it was to be sent.
        sent: when it was.
        answered: when its response, or its dead letter, was received; None if it has none yet.
        is_dead: whether that is a dead letter.
        attributes: those of the response or dead letter.
    """

    intended: float
    sent: float
    answered: float | None = None
    is_dead: bool = False
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Records:
    """All messages of a run.

    Attributes:
        messages: in the order in which they were sent.
        repeated: how many answers came again.
    """

    messages: list[Record]
    repeated: int

    @cached_property
    def answered(self) -> list[Record]:
        """Those with a response."""
        return [one for one in self.messages if one.answered is not None and not one.is_dead]

    @property
    def dead(self) -> int:
        """How many became dead letters."""
        return sum(one.is_dead for one in self.messages)

    @property
    def waiting(self) -> int:
        """How many have neither: published = answered + dead + waiting."""
        return sum(one.answered is None for one in self.messages)

    @property
    def rate(self) -> float:
        """Responses a second, from the first message to the last response."""
        last = max((one.answered for one in self.answered), default=0.0)
        span = last - self.messages[0].intended if self.messages else 0.0
        return len(self.answered) / span if span > 0 else 0.0

    def latency(self, share: float) -> float:
        """The seconds from when a message was to be sent to its response, that a share of all messages but
        dead letters does not exceed. A message that still waits counts as infinitely late: without it, a
        stream that falls behind would seem fast.

        Raises:
            ValueError: there are no such messages.
        """
        alive = [one for one in self.messages if not one.is_dead]
        return percentile(
            [math.inf if one.answered is None else one.answered - one.intended for one in alive], share
        )

    @property
    def sustained(self) -> float:
        """Responses a second, without the time that a message takes anyway: the median of the first tenth,
        which find the stream nearly idle. It is as high as the offered rate where a stream keeps up, however
        short the run; `rate` is lower, because the last response comes after the last message."""
        first = sorted(one.answered - one.intended for one in self.answered[: len(self.answered) // 10 + 1])
        last = max((one.answered for one in self.answered), default=0.0)
        span = last - self.messages[0].intended - first[len(first) // 2] if first else 0.0
        return len(self.answered) / span if span > 0 else 0.0

    def waiting_at(self, when: float) -> int:
        """How many were to be sent by a time, and were not yet answered, nor dead letters."""
        came = sum(one.intended <= when for one in self.messages)
        return came - sum(one.answered is not None and one.answered <= when for one in self.messages)

    def drained_at(self, after: float) -> float:
        """When, not before a time, nothing waits any more that was to be sent before it; infinite if it never
        was so."""
        ends = [one.answered for one in self.messages if one.intended <= after]
        return max([after, *(math.inf if end is None else end for end in ends)])

    def lateness(self, share: float) -> float:
        """The seconds from when a message was to be sent to when it was, that a share does not exceed."""
        return percentile([one.sent - one.intended for one in self.messages], share)


def send_load(
    topic: str,
    times: Sequence[float],
    prompts: Sequence[str],
    *,
    responses: str,
    dead_letters: str | None = None,
    wait_seconds: float = 120,
    should_stop: Callable[[], bool] = lambda: False,
) -> Records:
    """Publishes a message at each time, and records what comes of it.

    Args:
        topic: the path of the topic that the job reads.
        times: in seconds from the start and in order, for instance of `poisson_arrivals`.
        prompts: taken in turn.
        responses: the path of a subscription to the responses, of which those of other messages are
            acknowledged too: make one for this run alone.
        dead_letters: the same for dead letters.
        wait_seconds: how long to wait for answers after the last message was sent.
        should_stop: asked now and then, in a thread of its own; true ends the run, for instance because the
            job has ended.

    Raises:
        SendingError: the messages cannot be sent at these times from here, or not at all; or a subscription
            cannot be read.
        ValueError: there are no prompts, or an empty one, or times that cannot be.
    """
    if isinstance(prompts, str) or not prompts or not all(prompts):
        raise ValueError("there are no prompts, or an empty one: Pub/Sub takes no message without data.")
    if not all(math.isfinite(moment) and moment >= 0 for moment in times) or not wait_seconds >= 0:
        raise ValueError("the times, and the time to wait, must be numbers of 0 or more.")
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError("the times are not in order.")
    run = uuid.uuid4().hex[:12]
    with _Receiver(run, len(times), responses, dead_letters, should_stop) as receiver:
        messages = _publish(topic, times, prompts, run, receiver)
        deadline = time.monotonic() + wait_seconds
        while receiver.missing(len(messages)) and time.monotonic() < deadline:
            if receiver.is_to_stop.wait(0.02):
                break
    if receiver.error:
        raise SendingError(str(receiver.error)) from receiver.error
    for number, (moment, is_dead, attributes) in receiver.found.items():
        one = messages[number]
        one.answered, one.is_dead, one.attributes = moment - receiver.start, is_dead, attributes
    return Records(messages, receiver.repeated)


def _publish(
    topic: str, times: Sequence[float], prompts: Sequence[str], run: str, receiver: _Receiver
) -> list[Record]:
    data = [prompt.encode() for prompt in prompts]
    messages = []
    # Other threads of this process let this one run after so many seconds.
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    with _Sender(topic) as sender:
        receiver.start = sender.start = start = time.monotonic()
        try:
            for number, delay in _when_due(times, start, receiver.is_to_stop.is_set):
                if sender.error:
                    break
                intended, late = times[number], max(delay, sender.late)
                if late > MOST_LATE_SECONDS:
                    raise SendingError(
                        f"Message {number} of {len(times)} is {late:.1f} s late: this machine cannot send at "
                        "that rate. Ask for a lower one, or send from several machines."
                    )
                record = Record(intended, math.nan)
                message = PubsubMessage(
                    data=data[number % len(data)], attributes={ATTRIBUTE: f"{run} {number}"}
                )
                messages.append(record)
                sender.waiting.put((record, message))
        finally:
            sys.setswitchinterval(before)
    if sender.error:
        raise SendingError(f"Messages cannot be published to {topic}: {sender.error}") from sender.error
    return messages


def _when_due(
    times: Sequence[float],
    start: float,
    should_stop: Callable[[], bool],
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[tuple[int, float]]:
    """Yields each place in `times` once its time has come, and the delay in seconds.

    A caller that takes long delays what follows, and the schedule stays: the next ones come at once.
    """
    for number, intended in enumerate(times):
        while (left := start + intended - now()) > 0 and not should_stop():
            sleep(min(left - SLEEP_SHORT, 0.2) if left > SLEEP_SHORT else 0)
        if should_stop():
            return
        yield number, -left


class _Sender:
    """Publishes messages as soon as they are handed over, in threads: one that waits for the service delays
    no other. Those that come together go together."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._publisher = pubsub_v1.PublisherClient()
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.start = 0.0
        self.late = 0.0
        self.error: Exception | None = None

    def __enter__(self) -> _Sender:
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(SENDERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _thread in self._threads:
            self.waiting.put(None)
        for thread in self._threads:
            thread.join(PUBLISH_SECONDS + 10)

    def _send(self) -> None:
        while (first := self.waiting.get()) is not None:
            lot = [first]
            while len(lot) < MOST_TOGETHER:
                try:
                    following = self.waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self.waiting.put(None)  # for this thread, after this lot
                    break
                lot.append(following)
            now = time.monotonic() - self.start
            for record, _ in lot:
                record.sent = now
            self.late = now - lot[0][0].intended
            if self.error:
                continue  # to the end of what was handed over
            try:
                for messages in pubsub.in_requests(message for _, message in lot):
                    # The service's own call: the client's would gather messages first.
                    PublisherClient.publish(
                        self._publisher, topic=self._topic, messages=messages, timeout=PUBLISH_SECONDS
                    )
            except Exception as error:  # whatever it is, the run cannot go on
                self.error = error


class _Receiver:
    """Receives what comes of a run's messages, in threads of its own."""

    def __init__(
        self,
        run: str,
        count: int,
        responses: str,
        dead_letters: str | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self._should_stop, self.is_to_stop = should_stop, threading.Event()
        self._run, self._count = run, count
        self._subscriptions = [(responses, False), *([(dead_letters, True)] if dead_letters else [])]
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.start = 0.0
        self.error: Exception | None = None
        self.found: dict[int, tuple[float, bool, dict[str, str]]] = {}
        self.repeated = 0

    def missing(self, sent: int) -> int:
        return sent - len(self.found)

    def __enter__(self) -> _Receiver:
        self._threads = [
            threading.Thread(target=self._receive, args=one, daemon=True) for one in self._subscriptions
        ]
        # Asking may take its time, as of a job's state: it must not make messages late.
        self._threads.append(threading.Thread(target=self._ask_whether_to_stop, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def _ask_whether_to_stop(self) -> None:
        while not self._end.wait(ASK_SECONDS):
            try:
                if not self._should_stop():
                    continue
            except Exception as error:  # what cannot be asked any more cannot be gone on with
                self.error = error
            self.is_to_stop.set()
            return

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PULL_SECONDS + 10)

    def _receive(self, subscription: str, is_dead: bool) -> None:
        with pubsub_v1.SubscriberClient() as subscriber:
            while not self._end.is_set():
                try:
                    pulled = subscriber.pull(
                        subscription=subscription, max_messages=1000, timeout=PULL_SECONDS
                    ).received_messages
                    now = time.monotonic()
                    for one in pulled:
                        self._note(dict(one.message.attributes), now, is_dead)
                    if pulled:
                        ids = [one.ack_id for one in pulled]
                        subscriber.acknowledge(subscription=subscription, ack_ids=ids)
                except PASSING:  # nothing came, or it is tried again; what was not acknowledged comes again
                    self._end.wait(0.01)
                except Exception as error:
                    self.error = error
                    self.is_to_stop.set()
                    return

    def _note(self, attributes: dict[str, str], now: float, is_dead: bool) -> None:
        run, _, number = attributes.get(ATTRIBUTE, "").partition(" ")
        if run != self._run or not number.isdigit() or int(number) >= self._count:
            return
        with self._lock:
            if int(number) in self.found:
                self.repeated += 1
            else:
                self.found[int(number)] = now, is_dead, attributes
