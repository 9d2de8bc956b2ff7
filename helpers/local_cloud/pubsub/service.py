"""Cloud Pub/Sub on this machine, as Google's clients and Beam use it.

What it does: topics and subscriptions (create, get, update, list, delete, detach); Publish with the service's
limits; Pull, StreamingPull with flow control, acknowledgement, nack, lease extension, redelivery when a lease
ends; Seek to a time. Delivery is at least once. Messages live in memory: they go when the local cloud stops.

What it does not imitate, and refuses with UNIMPLEMENTED: push, BigQuery and Cloud Storage subscriptions,
filters, dead-letter and retry policies, exactly-once delivery, ordered delivery, schemas, ingestion, message
transforms, snapshots. An ordering key on a message is carried but orders nothing. Permissions: everything is
allowed. Retention and expiration are stored but delete nothing. Lists come as one page.

Threads: a StreamingPull holds one thread of the server's pool and one of its own until it ends, and a Pull on
an empty subscription holds one for up to PULL_WAIT_SECONDS. At most MAX_WAITING calls wait at a time, so a
pool of SERVER_THREADS always has threads left for everything else.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.protobuf import empty_pb2
from google.pubsub_v1.types import pubsub as types

from ..front.grpc_service import (
    RpcError,
    add_service,
    already_exists,
    failed_precondition,
    invalid_argument,
    not_found,
)
from .fields import TABLES
from .limits import (
    ACK_DEADLINE_SECONDS,
    MAX_MESSAGES_PER_PUBLISH,
    check_ack_deadline,
    check_name,
    check_publish,
    updated,
)
from .subscription import Flow, Subscription

PULL_WAIT_SECONDS = 2.0  # Beam's direct runner gives up after four pulls that hang for 30 s
MAX_WAITING = 96
SERVER_THREADS = 128

_DELETED_TOPIC = "_deleted-topic_"


def _message_class(name: str) -> Any:
    return getattr(types, name).pb()


class PubSub:
    """The Publisher and Subscriber services, and the permissions of their resources."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._topics: dict[str, Any] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._message_ids = itertools.count(1)
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)

    def register(self, server: grpc.Server) -> None:
        """Adds the services to a server, whose pool should have SERVER_THREADS threads."""

        def with_requests(methods: list[Callable]) -> dict[Callable, type]:
            special = {"CreateTopic": "Topic", "CreateSubscription": "Subscription"}
            return {m: _message_class(special.get(m.__name__, m.__name__ + "Request")) for m in methods}

        publisher = [
            self.CreateTopic,
            self.UpdateTopic,
            self.Publish,
            self.GetTopic,
            self.ListTopics,
            self.ListTopicSubscriptions,
            self.DeleteTopic,
            self.DetachSubscription,
        ]
        subscriber = [
            self.CreateSubscription,
            self.GetSubscription,
            self.UpdateSubscription,
            self.ListSubscriptions,
            self.DeleteSubscription,
            self.ModifyAckDeadline,
            self.Acknowledge,
            self.Pull,
            self.Seek,
        ]
        add_service(server, "google.pubsub.v1.Publisher", with_requests(publisher), TABLES)
        add_service(
            server,
            "google.pubsub.v1.Subscriber",
            with_requests(subscriber),
            TABLES,
            streaming={self.StreamingPull: _message_class("StreamingPullRequest")},
        )
        add_service(
            server,
            "google.iam.v1.IAMPolicy",
            {
                self.TestIamPermissions: iam_policy_pb2.TestIamPermissionsRequest,
                self.GetIamPolicy: iam_policy_pb2.GetIamPolicyRequest,
            },
            TABLES,
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

    def UpdateTopic(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            topic = updated(self._topic(request.topic.name), request.topic, request.update_mask, "topic")
            self._topics[topic.name] = topic
        return topic

    def ListTopics(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            topics = [t for name, t in sorted(self._topics.items()) if name.startswith(request.project + "/")]
        return _message_class("ListTopicsResponse")(topics=topics)

    def ListTopicSubscriptions(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self._topic(request.topic)
            names = [s.settings.name for s in self._subscriptions_of(request.topic)]
        return _message_class("ListTopicSubscriptionsResponse")(subscriptions=sorted(names))

    def DeleteTopic(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self._topic(request.topic)
            del self._topics[request.topic]
            for subscription in self._subscriptions_of(request.topic):
                subscription.settings = _copy(subscription.settings, topic=_DELETED_TOPIC)
        return empty_pb2.Empty()

    def DetachSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            subscription = self._subscription(request.subscription)
            subscription.settings = _copy(subscription.settings, detached=True)
        subscription.seek(2**63 - 1)
        return _message_class("DetachSubscriptionResponse")()

    def Publish(self, request: Any, context: grpc.ServicerContext) -> Any:
        check_publish(request)
        with self._lock:
            self._topic(request.topic)
            for message in request.messages:
                message.message_id = str(next(self._message_ids))
                message.publish_time.GetCurrentTime()
            for subscription in self._subscriptions_of(request.topic):
                if not subscription.settings.detached:
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

    def UpdateSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        new = request.subscription
        if "ack_deadline_seconds" in request.update_mask.paths:
            check_ack_deadline(new.ack_deadline_seconds)
        with self._lock:
            subscription = self._subscription(new.name)
            subscription.settings = updated(subscription.settings, new, request.update_mask, "subscription")
            return subscription.settings

    def ListSubscriptions(self, request: Any, context: grpc.ServicerContext) -> Any:
        prefix = request.project + "/"
        with self._lock:
            found = [s.settings for name, s in sorted(self._subscriptions.items()) if name.startswith(prefix)]
        return _message_class("ListSubscriptionsResponse")(subscriptions=found)

    def DeleteSubscription(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            subscription = self._subscription(request.subscription)
            del self._subscriptions[request.subscription]
        subscription.close()
        return empty_pb2.Empty()

    # Messages

    def Pull(self, request: Any, context: grpc.ServicerContext) -> Any:
        subscription = self._attached(request.subscription)
        if request.max_messages < 1:
            raise invalid_argument("max_messages must be at least 1.")
        wait, slot = 0.0, False
        if not request.return_immediately:
            remaining = context.time_remaining()
            wait = PULL_WAIT_SECONDS if remaining is None else min(PULL_WAIT_SECONDS, remaining * 0.8)
            slot = self._waiting.acquire(blocking=False)
        try:
            taken = subscription.take(
                min(request.max_messages, MAX_MESSAGES_PER_PUBLISH),
                wait if slot else 0.0,
                lambda: subscription.settings.ack_deadline_seconds,
                abandoned=lambda: not context.is_active(),
            )
        finally:
            if slot:
                self._waiting.release()
        return _message_class("PullResponse")(received_messages=_received(taken))

    def Acknowledge(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._attached(request.subscription).acknowledge(request.ack_ids)
        return empty_pb2.Empty()

    def ModifyAckDeadline(self, request: Any, context: grpc.ServicerContext) -> Any:
        seconds = request.ack_deadline_seconds
        if not 0 <= seconds <= ACK_DEADLINE_SECONDS[-1]:
            raise invalid_argument(f"ack_deadline_seconds must be 0 to 600, not {seconds}.")
        subscription = self._attached(request.subscription)
        subscription.modify_deadline(request.ack_ids, [seconds] * len(request.ack_ids))
        return empty_pb2.Empty()

    def Seek(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not request.HasField("time"):
            raise invalid_argument("The request names no time.")
        self._attached(request.subscription).seek(request.time.ToNanoseconds())
        return _message_class("SeekResponse")()

    def StreamingPull(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        first = next(requests, None)
        if first is None:
            return
        subscription = self._attached(first.subscription)
        check_ack_deadline(first.stream_ack_deadline_seconds)
        if not self._waiting.acquire(blocking=False):
            raise RpcError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WAITING} pulls are already waiting on this local cloud: close some subscribers.",
            )
        try:
            yield from _Stream(subscription, first, requests, context).answers()
        finally:
            self._waiting.release()
        if subscription.closed and context.is_active():
            raise not_found(f"Resource not found (resource={first.subscription}).")

    # Permissions

    def TestIamPermissions(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_exists(request.resource)
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=request.permissions)

    def GetIamPolicy(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_exists(request.resource)
        return policy_pb2.Policy(version=1)

    # The following expect the lock to be held, save _attached and _check_exists, which take it.

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

    def _attached(self, name: str) -> Subscription:
        with self._lock:
            subscription = self._subscription(name)
        if subscription.settings.detached:
            raise failed_precondition(f"Subscription {name} is detached from its topic.")
        return subscription

    def _check_exists(self, resource: str) -> None:
        with self._lock:
            if resource not in self._topics and resource not in self._subscriptions:
                raise not_found(f"Resource not found (resource={resource}).")


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
