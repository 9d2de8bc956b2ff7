"""The local Pub/Sub, driven with Google's own clients."""

import itertools
import queue
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.protobuf import duration_pb2
from google.pubsub_v1 import types

from helpers.local_cloud.pubsub.subscription import Subscription

_numbers = itertools.count()


@pytest.fixture
def publisher(cloud):
    client = pubsub_v1.PublisherClient()
    yield client
    client.stop()


@pytest.fixture
def subscriber(cloud):
    with pubsub_v1.SubscriberClient() as client:
        yield client


@pytest.fixture
def topic(cloud, publisher):
    path = publisher.topic_path(cloud.project, f"topic-{next(_numbers)}")
    publisher.create_topic(name=path)
    yield path
    publisher.delete_topic(topic=path)


@pytest.fixture
def subscription(cloud, subscriber, topic):
    path = subscriber.subscription_path(cloud.project, f"subscription-{next(_numbers)}")
    subscriber.create_subscription(name=path, topic=topic)
    yield path
    subscriber.delete_subscription(subscription=path)


def publish(publisher, topic, *texts, **attributes):
    return [publisher.publish(topic, text.encode(), **attributes).result(300) for text in texts]


def pull(subscriber, subscription, count, seconds=300.0):
    """Pulls until `count` messages have come or the time is up."""
    received, end = [], time.monotonic() + seconds
    while len(received) < count and time.monotonic() < end:
        answer = subscriber.pull(subscription=subscription, max_messages=count - len(received))
        received.extend(answer.received_messages)
    return received


def texts_of(received):
    return [m.message.data.decode() for m in received]


def acknowledge(subscriber, subscription, received):
    subscriber.acknowledge(subscription=subscription, ack_ids=[m.ack_id for m in received])


def test_a_published_message_arrives_with_its_id_time_and_attributes(
    publisher, subscriber, topic, subscription
):
    (message_id,) = publish(publisher, topic, "hello", language="en")
    (received,) = pull(subscriber, subscription, 1)
    assert received.message.data == b"hello"
    assert received.message.message_id == message_id
    assert dict(received.message.attributes) == {"language": "en"}
    assert abs(received.message.publish_time - datetime.now(UTC)) < timedelta(minutes=1)


def test_every_subscription_gets_every_message_in_order(cloud, publisher, subscriber, topic, subscription):
    other = subscriber.subscription_path(cloud.project, f"other-{next(_numbers)}")
    subscriber.create_subscription(name=other, topic=topic)
    texts = [str(i) for i in range(30)]
    publish(publisher, topic, *texts)
    assert texts_of(pull(subscriber, subscription, 30)) == texts
    assert texts_of(pull(subscriber, other, 30)) == texts
    subscriber.delete_subscription(subscription=other)


def test_an_acknowledged_message_does_not_come_again_and_a_nacked_one_does(
    publisher, subscriber, topic, subscription
):
    publish(publisher, topic, "kept", "given back")
    kept, given_back = pull(subscriber, subscription, 2)
    acknowledge(subscriber, subscription, [kept])
    subscriber.modify_ack_deadline(
        subscription=subscription, ack_ids=[given_back.ack_id], ack_deadline_seconds=0
    )
    again = pull(subscriber, subscription, 1)
    assert texts_of(again) == ["given back"]
    assert again[0].message.message_id == given_back.message.message_id
    acknowledge(subscriber, subscription, again)
    with pytest.raises(exceptions.DeadlineExceeded):
        subscriber.pull(subscription=subscription, max_messages=1, timeout=0.5, retry=None)


def test_streaming_pull_delivers_everything_once_when_all_is_acknowledged(
    publisher, subscriber, topic, subscription
):
    count, arrived, done = 2000, [], threading.Event()

    def receive(message):
        arrived.append(message.data)
        message.ack()
        if len(arrived) >= count:
            done.set()

    stream = subscriber.subscribe(subscription, receive)
    for future in [publisher.publish(topic, str(i).encode()) for i in range(count)]:
        future.result(300)
    assert done.wait(300)
    stream.cancel()
    stream.result(300)
    assert sorted(arrived) == sorted(str(i).encode() for i in range(count))


def test_streaming_pull_gives_back_what_is_nacked(publisher, subscriber, topic, subscription):
    arrivals = queue.Queue()
    refused = threading.Event()

    def receive(message):
        arrivals.put(message.message_id)
        if refused.is_set():
            message.ack()
        else:
            refused.set()
            message.nack()

    stream = subscriber.subscribe(subscription, receive)
    publish(publisher, topic, "twice")
    assert arrivals.get(timeout=300) == arrivals.get(timeout=300)
    stream.cancel()
    stream.result(300)


def test_streaming_pull_holds_no_more_than_its_flow_control_allows(
    publisher, subscriber, topic, subscription
):
    held, enough = [], threading.Event()

    def receive(message):
        held.append(message)
        if len(held) >= 5:
            enough.set()

    publish(publisher, topic, *[str(i) for i in range(20)])
    stream = subscriber.subscribe(
        subscription, receive, flow_control=pubsub_v1.types.FlowControl(max_messages=5)
    )
    assert enough.wait(300)
    # What the stream may not hold is left for others.
    assert len(pull(subscriber, subscription, 15)) == 15
    assert len(held) == 5
    stream.cancel()
    stream.result(300)


def test_deleting_the_subscription_ends_a_stream_with_not_found(cloud, publisher, subscriber, topic):
    path = subscriber.subscription_path(cloud.project, f"short-lived-{next(_numbers)}")
    subscriber.create_subscription(name=path, topic=topic)
    arrived = threading.Event()

    def receive(message):
        message.ack()
        arrived.set()

    stream = subscriber.subscribe(path, receive)
    publish(publisher, topic, "the stream is open")
    assert arrived.wait(300)
    subscriber.delete_subscription(subscription=path)
    with pytest.raises(exceptions.NotFound):
        stream.result(300)


def test_what_exists_or_does_not_has_its_status(cloud, publisher, subscriber, topic, subscription):
    with pytest.raises(exceptions.AlreadyExists):
        publisher.create_topic(name=topic)
    with pytest.raises(exceptions.AlreadyExists):
        subscriber.create_subscription(name=subscription, topic=topic)
    absent = publisher.topic_path(cloud.project, "absent")
    with pytest.raises(exceptions.NotFound, match="absent"):
        publisher.publish(absent, b"x").result(300)
    with pytest.raises(exceptions.NotFound, match="absent"):
        subscriber.create_subscription(name=subscription + "-2", topic=absent)
    with pytest.raises(exceptions.NotFound):
        subscriber.pull(subscription=subscription + "-2", max_messages=1)
    with pytest.raises(exceptions.InvalidArgument):
        publisher.create_topic(name=publisher.topic_path(cloud.project, "goog-topic"))
    with pytest.raises(exceptions.InvalidArgument):
        subscriber.create_subscription(name=subscription + "-2", topic=topic, ack_deadline_seconds=5)


@pytest.mark.parametrize(
    "message",
    [
        {"data": b""},
        {"data": b"x", "attributes": {str(i): "v" for i in range(101)}},
        {"data": b"x", "attributes": {"k" * 257: "v"}},
        {"data": b"x", "attributes": {"k": "é" * 513}},
        {"data": b"x", "attributes": {"goog-key": "v"}},
        {"data": b"x" * 10_000_001},
    ],
    ids=["empty", "101 attributes", "long key", "long value", "reserved key", "10 MB"],
)
def test_a_message_beyond_the_limits_is_refused(publisher, topic, message):
    with pytest.raises(exceptions.InvalidArgument):
        publisher.api.publish(request={"topic": topic, "messages": [message]}, timeout=300)


def test_a_message_at_the_limits_passes(publisher, subscriber, topic, subscription):
    attributes = {f"{i:03d}" + "k" * 253: "v" * 1024 for i in range(100)}
    message = {"data": b"x" * 9_000_000, "attributes": attributes}
    publisher.api.publish(request={"topic": topic, "messages": [message]}, timeout=300)
    (received,) = pull(subscriber, subscription, 1)
    assert dict(received.message.attributes) == attributes
    assert len(received.message.data) == 9_000_000


@pytest.mark.parametrize(
    "settings",
    [
        {"filter": 'attributes.language = "en"'},
        {"push_config": {"push_endpoint": "https://example.com"}},
        {"dead_letter_policy": {"max_delivery_attempts": 5}},
        {"retry_policy": {"minimum_backoff": duration_pb2.Duration(seconds=10)}},
        {"enable_message_ordering": True},
        {"enable_exactly_once_delivery": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_imitated_is_refused(cloud, subscriber, topic, settings):
    name = subscriber.subscription_path(cloud.project, "not-imitated")
    with pytest.raises(exceptions.MethodNotImplemented, match=next(iter(settings))):
        subscriber.create_subscription(request={"name": name, "topic": topic, **settings})


def test_a_deleted_topic_leaves_its_subscription_behind(cloud, publisher, subscriber):
    topic = publisher.topic_path(cloud.project, f"deleted-{next(_numbers)}")
    path = subscriber.subscription_path(cloud.project, f"deleted-{next(_numbers)}")
    publisher.create_topic(name=topic)
    subscriber.create_subscription(name=path, topic=topic, ack_deadline_seconds=20)
    publisher.delete_topic(topic=topic)
    assert subscriber.get_subscription(subscription=path).topic == "_deleted-topic_"
    subscriber.delete_subscription(subscription=path)
    with pytest.raises(exceptions.NotFound):
        subscriber.get_subscription(subscription=path)


def test_an_empty_pull_is_held_to_its_deadline(subscriber, subscription):
    """As the service does; Beam's direct runner gives up after four of 30 s."""
    with pytest.raises(exceptions.DeadlineExceeded):
        subscriber.pull(subscription=subscription, max_messages=1, timeout=0.5, retry=None)


def test_a_waiting_pull_gets_the_next_message(publisher, subscriber, topic, subscription):
    answers = queue.Queue()
    thread = threading.Thread(target=lambda: answers.put(pull(subscriber, subscription, 1)))
    thread.start()
    publish(publisher, topic, "now")
    assert texts_of(answers.get(timeout=300)) == ["now"]
    thread.join()


@pytest.mark.parametrize(
    "call",
    [
        lambda client, path: client.seek({"subscription": path, "time": datetime.now(UTC)}),
        lambda client, path: list(client.list_subscriptions(project="projects/" + path.split("/")[1])),
    ],
)
def test_calls_that_nobody_here_makes_are_refused(call, subscriber, subscription):
    with pytest.raises(exceptions.MethodNotImplemented):
        call(subscriber, subscription)


# The queue, by a clock of the test's own


class Clock:
    time = 100.0

    def __call__(self):
        return self.time


def test_a_message_comes_again_when_its_lease_ends_and_not_before():
    clock, message = Clock(), types.PubsubMessage.pb()(data=b"slow")
    subscription = Subscription(None, clock)

    def take():
        return subscription.take(1, 0.0, lambda: 10)

    subscription.put([message])
    [(first, _)] = take()
    clock.time += 9.9
    assert take() == []
    subscription.modify_deadline([first], [10])
    clock.time += 9.9
    assert take() == []
    clock.time += 0.2
    [(again, found)] = take()
    assert (again != first, found.data) == (True, b"slow")
    subscription.acknowledge([first])  # too late: ignored
    subscription.modify_deadline([again], [0])
    [(last, _)] = take()
    subscription.acknowledge([last])
    clock.time += 1000
    assert take() == []
    assert subscription.unacknowledged() == 0
