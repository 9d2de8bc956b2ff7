"""Cloud Pub/Sub on this machine, as Google's clients and Beam use it.

What it does: topics and subscriptions (create, get, delete); Publish with the service's limits; Pull,
StreamingPull with flow control, acknowledgement, nack, lease extension, redelivery when a lease ends.
Delivery is at least once. Messages live in memory: they go when the local cloud stops.

What it does not imitate, and refuses with UNIMPLEMENTED: push, BigQuery and Cloud Storage subscriptions,
filters, dead-letter and retry policies, exactly-once delivery, ordered delivery, schemas, ingestion, message
transforms, snapshots, Seek, updates and lists. An ordering key on a message is carried but orders nothing.
Retention and expiration are stored but delete nothing.

Threads: a StreamingPull holds one thread of the server's pool and one of its own until it ends, and a Pull on
an empty subscription holds one until its deadline, as the service does. At most MAX_WAITING calls wait at a
time, so a pool of SERVER_THREADS always has threads left for everything else.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.pubsub_v1.types import pubsub as types

from ..front.grpc_service import (
    RpcError,
    add_service,
    already_exists,
    invalid_argument,
    not_found,
    unimplemented,
)
from ..front.permissions import Permissions
from .fields import TABLES
from .limits import (
    ACK_DEADLINE_SECONDS,
    MAX_MESSAGES_PER_PUBLISH,
    check_ack_deadline,
    check_name,
    check_publish,
)
from .subscription import Flow, Subscription

PULL_WAIT_SECONDS = 90.0  # of a client that sets no deadline
MAX_WAITING = 96
SERVER_THREADS = 128
TOO_MANY = f"{MAX_WAITING} pulls are already waiting on this local cloud: close some subscribers."

_DELETED_TOPIC = "_deleted-topic_"


def _message_class(name: str) -> Any:
    return getattr(types, name).pb()


class PubSub:
    """The Publisher and Subscriber services."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._topics: dict[str, Any] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._message_ids = itertools.count(1)
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)

    def register(self, server: grpc.Server, permissions: Permissions) -> None:
        """Adds the services to a server, whose pool should have SERVER_THREADS threads."""

        def with_requests(methods: list[Callable]) -> dict[Callable, type]:
            special = {"CreateTopic": "Topic", "CreateSubscription": "Subscription"}
            return {m: _message_class(special.get(m.__name__, m.__name__ + "Request")) for m in methods}

        publisher = [
            self.CreateTopic,
            self.Publish,
            self.GetTopic,
            self.DeleteTopic,
        ]
        subscriber = [
            self.CreateSubscription,
            self.GetSubscription,
            self.DeleteSubscription,
            self.ModifyAckDeadline,
            self.Acknowledge,
            self.Pull,
        ]
        add_service(server, "google.pubsub.v1.Publisher", with_requests(publisher), TABLES, permissions)
        add_service(
            server,
            "google.pubsub.v1.Subscriber",
            with_requests(subscriber),
            TABLES,
            permissions,
            streaming={self.StreamingPull: _message_class("StreamingPullRequest")},
        )

    def waiting(self, path: str) -> int | None:
        """How many messages of a subscription are not acknowledged yet; None if there is no such one."""
        with self._lock:
            subscription = self._subscriptions.get(path)
        return subscription.unacknowledged() if subscription else None

    def stop(self) -> None:
        """Ends the calls that are waiting."""
        for subscription in list(self._subscriptions.values()):
            subscription.close()

    # Topics

    def CreateTopic(self, request: Any, context: grpc.ServicerContext) -> Any:
        check_name(request.name, "topics")
        with self._lock:
            if request.name in self._topics:
                raise already_exists(f"Resource already exists in the project (resource={request.name}).")
            self._topics[request.name] = request
        return request

    def GetTopic(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            return self._topic(request.topic)

    def DeleteTopic(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self._topic(request.topic)
            del self._topics[request.topic]
            for subscription in self._subscriptions_of(request.topic):
                subscription.settings = _copy(subscription.settings, topic=_DELETED_TOPIC)
        return empty_pb2.Empty()

    def Publish(self, request: Any, context: grpc.ServicerContext) -> Any:
        check_publish(request)
        with self._lock:
            self._topic(request.topic)
            for message in request.messages:
                message.message_id = str(next(self._message_ids))
                message.publish_time.GetCurrentTime()
            for subscription in self._subscriptions_of(request.topic):
                subscription.put(request.messages)
        return _message_class("PublishResponse")(message_ids=[m.message_id for m in request.messages])

    # Subscriptions

    def CreateSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        check_name(request.name, "subscriptions")
        request.ack_deadline_seconds = request.ack_deadline_seconds or ACK_DEADLINE_SECONDS[0]
        check_ack_deadline(request.ack_deadline_seconds)
        with self._lock:
            self._topic(request.topic)
            if request.name in self._subscriptions:
                raise already_exists(f"Resource already exists in the project (resource={request.name}).")
            request.state = types.Subscription.State.ACTIVE
            self._subscriptions[request.name] = Subscription(request)
        return request

    def GetSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            return self._subscription(request.subscription).settings

    def DeleteSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            subscription = self._subscription(request.subscription)
            del self._subscriptions[request.subscription]
        subscription.close()
        return empty_pb2.Empty()

    # Messages

    def Pull(self, request: Any, context: grpc.ServicerContext) -> Any:
        subscription = self._found(request.subscription)
        if request.max_messages < 1:
            raise invalid_argument("max_messages must be at least 1.")
        if request.return_immediately:
            raise unimplemented("return_immediately, which Pub/Sub advises against.")
        if not self._waiting.acquire(blocking=False):
            raise RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)
        try:
            context.add_callback(subscription.wake)  # a client that gave up must not hold the thread
            taken = subscription.take(
                min(request.max_messages, MAX_MESSAGES_PER_PUBLISH),
                PULL_WAIT_SECONDS,
                lambda: subscription.settings.ack_deadline_seconds,
                abandoned=lambda: not context.is_active(),
            )
        finally:
            self._waiting.release()
        if subscription.closed:
            raise not_found(f"Resource not found (resource={request.subscription}).")
        if taken and not context.is_active():  # the client has just given up: nobody will acknowledge them
            subscription.modify_deadline([ack_id for ack_id, _ in taken], [0] * len(taken))
        return _message_class("PullResponse")(received_messages=_received(taken))

    def Acknowledge(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._found(request.subscription).acknowledge(request.ack_ids)
        return empty_pb2.Empty()

    def ModifyAckDeadline(self, request: Any, context: grpc.ServicerContext) -> Any:
        seconds = request.ack_deadline_seconds
        if not 0 <= seconds <= ACK_DEADLINE_SECONDS[-1]:
            raise invalid_argument(f"ack_deadline_seconds must be 0 to 600, not {seconds}.")
        subscription = self._found(request.subscription)
        subscription.modify_deadline(request.ack_ids, [seconds] * len(request.ack_ids))
        return empty_pb2.Empty()

    def StreamingPull(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        first = next(requests, None)
        if first is None:
            return
        subscription = self._found(first.subscription)
        check_ack_deadline(first.stream_ack_deadline_seconds)
        if not self._waiting.acquire(blocking=False):
            raise RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)
        try:
            yield from _Stream(subscription, first, requests, context).answers()
        finally:
            self._waiting.release()
        if subscription.closed and context.is_active():
            raise not_found(f"Resource not found (resource={first.subscription}).")

    # The following expect the lock to be held.

    def _topic(self, name: str) -> Any:
        if name not in self._topics:
            raise not_found(f"Resource not found (resource={name}).")
        return self._topics[name]

    def _subscription(self, name: str) -> Subscription:
        if name not in self._subscriptions:
            raise not_found(f"Resource not found (resource={name}).")
        return self._subscriptions[name]

    def _subscriptions_of(self, topic: str) -> list[Subscription]:
        return [s for s in self._subscriptions.values() if s.settings.topic == topic]

    def _found(self, name: str) -> Subscription:
        """A subscription, for a caller without the lock."""
        with self._lock:
            return self._subscription(name)


class _Stream:
    """One StreamingPull: a thread reads what the subscriber sends; the call's own delivers messages."""

    def __init__(self, subscription: Subscription, first: Any, requests: Iterator[Any], context: Any):
        self._subscription = subscription
        self._requests = requests
        self._context = context
        self._lease_seconds = first.stream_ack_deadline_seconds
        self._flow = Flow(max(0, first.max_outstanding_messages), max(0, first.max_outstanding_bytes))
        self._open = True
        self._apply(first)

    def answers(self) -> Iterator[Any]:
        threading.Thread(target=self._read, daemon=True).start()
        if not self._context.add_callback(self._end):
            return
        while self._open and not self._subscription.closed:
            taken = self._subscription.take(
                MAX_MESSAGES_PER_PUBLISH,
                None,
                lambda: self._lease_seconds,
                self._flow,
                abandoned=lambda: not self._open,
            )
            if taken:
                yield _message_class("StreamingPullResponse")(received_messages=_received(taken))

    def _read(self) -> None:
        with suppress(Exception):  # gRPC ends the iteration of a broken stream with an exception of its own
            for request in self._requests:
                self._lease_seconds = request.stream_ack_deadline_seconds or self._lease_seconds
                self._apply(request)
        self._end()

    def _apply(self, request: Any) -> None:
        if request.ack_ids:
            self._subscription.acknowledge(request.ack_ids)
        if request.modify_deadline_ack_ids:
            self._subscription.modify_deadline(
                request.modify_deadline_ack_ids, request.modify_deadline_seconds
            )

    def _end(self) -> None:
        self._open = False
        self._subscription.wake()


def _received(taken: list[tuple[str, Any]]) -> list[Any]:
    received = _message_class("ReceivedMessage")
    return [received(ack_id=ack_id, message=message) for ack_id, message in taken]


def _copy(message: Any, **changes: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    for field, value in changes.items():
        setattr(copy, field, value)
    return copy
