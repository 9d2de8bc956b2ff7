"""Messages from Pub/Sub into the pipeline and out of it."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import apache_beam as beam
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherClient, types

from .graph import Source

LEASE_SECONDS = 15  # how long the messages of a killed worker stay away
EXTEND_EVERY_SECONDS = 3.0
PUBLISH_SECONDS = 60.0
PULL_SECONDS = 2.0  # how long a drain may have to wait for a pull
# Of one request: https://cloud.google.com/pubsub/quotas#resource_limits
MAX_REQUEST_MESSAGES = 1000
MAX_REQUEST_BYTES = 9_000_000

PubsubMessage = types.PubsubMessage.pb()


@dataclass(frozen=True)
class Element:
    """A message as the pipeline's read emits it: its bytes, and its timestamp in microseconds."""

    value: bytes
    timestamp: int


@dataclass(frozen=True)
class Batch:
    """Messages, with what is needed to acknowledge them."""

    elements: list[Element]
    ack_ids: list[str]


class Intake:
    """Pulls messages for a pipeline's read, and keeps their leases until they are done or given back.

    A read of a topic gets a subscription of its own, which `close` deletes. Any thread may use it.

    Args:
      source: the pipeline's read.
      name: names the subscription of a topic; the same in every worker of a job, so that a worker carries on
        where the one before it stopped.

    Raises:
      google.api_core.exceptions.NotFound: the topic or subscription does not exist.
    """

    def __init__(self, source: Source, name: str):
        self._client = pubsub_v1.SubscriberClient()
        self._source = source
        self._lock = threading.Lock()
        self._leased: set[str] = set()  # acknowledgement ids
        self.own_subscriptions: list[str] = []
        if source.subscription:
            self._client.get_subscription(subscription=source.subscription)
            self._subscription = source.subscription
        else:
            project = source.topic.split("/")[1]
            self._subscription = self._client.subscription_path(project, f"{name}-0")
            self.own_subscriptions.append(self._subscription)
            with contextlib.suppress(exceptions.AlreadyExists):
                self._client.create_subscription(name=self._subscription, topic=source.topic)
        threading.Thread(target=self._keep_leases, daemon=True).start()

    def pull(self, max_messages: int) -> Batch:
        """The next messages; none if there are none for a while."""
        try:
            received = self._client.pull(
                subscription=self._subscription, max_messages=max_messages, timeout=PULL_SECONDS
            ).received_messages
        except exceptions.DeadlineExceeded:  # as Pub/Sub answers where nothing came
            received = []
        ack_ids = [r.ack_id for r in received]
        with self._lock:
            self._leased.update(ack_ids)
        return Batch([_element(r.message, self._source) for r in received], ack_ids)

    def acknowledge(self, batch: Batch) -> None:
        """Says that a batch's messages are done."""
        self._client.acknowledge(subscription=self._subscription, ack_ids=batch.ack_ids, timeout=30)
        self._release(batch.ack_ids)

    def give_back(self, batch: Batch, seconds: int = 0) -> None:
        """Has a batch's messages redelivered after some seconds."""
        self._release(batch.ack_ids)
        self._modify_deadline(batch.ack_ids, seconds)

    def give_back_all(self) -> None:
        """Gives back every message that is not acknowledged yet."""
        with self._lock:
            leased, self._leased = self._leased, set()
        self._modify_deadline(list(leased), 0)

    def close(self) -> None:
        """Deletes the subscription that was made for a topic."""
        for subscription in self.own_subscriptions:
            with contextlib.suppress(exceptions.NotFound):
                self._client.delete_subscription(subscription=subscription, timeout=10)

    def _release(self, ack_ids: Iterable[str]) -> None:
        with self._lock:
            self._leased.difference_update(ack_ids)

    def _modify_deadline(self, ack_ids: list[str], seconds: int) -> None:
        for start in range(0, len(ack_ids), MAX_REQUEST_MESSAGES):
            some = ack_ids[start : start + MAX_REQUEST_MESSAGES]
            self._client.modify_ack_deadline(
                subscription=self._subscription, ack_ids=some, ack_deadline_seconds=seconds, timeout=10
            )

    def _keep_leases(self) -> None:
        while True:
            time.sleep(EXTEND_EVERY_SECONDS)
            with self._lock:
                leased = list(self._leased)
            try:
                self._modify_deadline(leased, LEASE_SECONDS)
            except exceptions.GoogleAPICallError as error:
                print(f"Leases in {self._subscription} could not be extended: {error}", flush=True)


def _element(message: Any, source: Source) -> Element:
    pb = type(message).pb(message)
    timestamp = pb.publish_time.ToMicroseconds()
    if source.timestamp_attribute:
        # As Beam's own reader has it, a message without it, or with nonsense in it, has the time it came.
        with contextlib.suppress(ValueError, OverflowError):
            timestamp = _parse_timestamp(pb.attributes[source.timestamp_attribute])
    return Element(pb.SerializeToString() if source.with_attributes else pb.data, timestamp)


def _parse_timestamp(text: str) -> int:
    """Microseconds since the epoch, from milliseconds since then or RFC 3339."""
    if text.lstrip("-").isdigit():
        return int(text) * 1000
    return round(datetime.fromisoformat(text).timestamp() * 1_000_000)


class Publish(beam.DoFn):
    """Publishes serialized PubsubMessages at the end of their bundle: a failed one publishes nothing."""

    _client: PublisherClient | None = None  # one for the whole process
    _client_lock = threading.Lock()

    def __init__(self, topic: str, id_attribute: str, timestamp_attribute: str):
        self._topic = topic
        self._id_attribute = id_attribute
        self._timestamp_attribute = timestamp_attribute
        self._bundle: list[types.PubsubMessage] = []

    def setup(self) -> None:
        with Publish._client_lock:
            if Publish._client is None:
                Publish._client = PublisherClient()

    def start_bundle(self) -> None:
        self._bundle = []

    def process(self, element: bytes, timestamp: Any = beam.DoFn.TimestampParam) -> Iterable[bytes]:
        message = PubsubMessage.FromString(element)
        attributes = dict(message.attributes)
        if self._id_attribute:
            attributes[self._id_attribute] = uuid.uuid4().hex
        if self._timestamp_attribute:
            attributes[self._timestamp_attribute] = str(timestamp.micros // 1000)
        self._bundle.append(types.PubsubMessage(data=message.data, attributes=attributes))
        return ()

    def finish_bundle(self) -> None:
        # As messages: attributes may have the names of a client's own arguments, such as `topic`.
        batch, size = [], 0
        for message in self._bundle:
            own = PubsubMessage.ByteSize(types.PubsubMessage.pb(message))
            if batch and (len(batch) == MAX_REQUEST_MESSAGES or size + own > MAX_REQUEST_BYTES):
                self._publish(batch)
                batch, size = [], 0
            batch.append(message)
            size += own
        if batch:
            self._publish(batch)
        self._bundle = []

    def _publish(self, messages: list[types.PubsubMessage]) -> None:
        Publish._client.publish(topic=self._topic, messages=messages, timeout=PUBLISH_SECONDS)
