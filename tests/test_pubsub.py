"""Topics and subscriptions as the notebooks use them, against the local Pub/Sub."""

import inspect
import threading
import time
import uuid

import pytest
from google.api_core.exceptions import NotFound
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import pubsub


@pytest.fixture
def topic(cloud):
    path = pubsub.create_topic(cloud.project, f"topic-{uuid.uuid4().hex[:8]}")
    yield path
    pubsub.delete(path)


def test_what_is_published_is_collected_with_its_id_and_attributes(topic):
    subscription = pubsub.create_subscription(topic, "read")
    ids = pubsub.publish(topic, ["one", b"\xfftwo"], origin="test")
    arrived = []
    messages = pubsub.collect(subscription, 2, timeout=300, progress=arrived.append)
    assert {m.message_id: m.data for m in messages} == dict(zip(ids, [b"one", b"\xfftwo"], strict=True))
    assert all(m.attributes == {"origin": "test"} for m in messages)
    assert sum(arrived) == 2


ARGUMENTS = {
    name
    for function in (pubsub.publish, pubsub_v1.PublisherClient.publish, PublisherClient.publish)
    for name in inspect.signature(function).parameters
}


@given(names=st.sets(st.sampled_from(sorted(ARGUMENTS)), min_size=1))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(names=ARGUMENTS)
def test_attributes_may_have_the_names_of_arguments(topic, names):
    assert {"topic", "data", "timeout", "retry", "ordering_key", "messages", "texts"} <= ARGUMENTS
    subscription = pubsub.create_subscription(topic, f"named-{uuid.uuid4().hex[:8]}")
    attributes = dict.fromkeys(names, "7")
    pubsub.publish(topic, ["x"], **attributes)
    [message] = pubsub.collect(subscription, 1, timeout=300)
    assert dict(message.attributes) == attributes
    pubsub.delete(subscription)


def test_more_messages_than_a_request_may_hold_are_published(topic):
    subscription = pubsub.create_subscription(topic, "many")
    ids = pubsub.publish(topic, [b"x" * 4_000_000] * 3 + [b"y"] * 1100)
    assert len(set(ids)) == 1103
    assert len(pubsub.collect(subscription, 1103, timeout=300)) == 1103


def test_answers_are_matched_to_their_prompts_once(topic):
    subscription = pubsub.create_subscription(topic, "answers")
    for prompt_id, text in (("1", "one"), ("1", "one again"), ("7", "another's"), ("2", "two")):
        pubsub.publish(topic, [text], prompt_message_id=prompt_id)
    pubsub.publish(topic, ["of no prompt"])
    answers = pubsub.collect_answers(subscription, ["1", "2"], timeout=300)
    assert answers["1"].data in (b"one", b"one again")
    assert answers["2"].data == b"two"
    assert set(pubsub.collect_answers(subscription, ["3"], timeout=1)) == set()


def test_an_empty_message_is_told_before_any_is_published(topic):
    subscription = pubsub.create_subscription(topic, f"empty-{uuid.uuid4().hex[:8]}")
    with pytest.raises(ValueError, match=r"Message 2 of 2 is empty, and Pub/Sub takes no message without"):
        pubsub.publish(topic, ["one", ""])
    assert len(pubsub.publish(topic, [""], kind="empty")) == 1
    [message] = pubsub.collect(subscription, 1, timeout=300)
    assert dict(message.attributes) == {"kind": "empty"}
    pubsub.delete(subscription)


def test_a_subscription_that_is_to_be_kept_keeps_its_messages(topic, cloud, capsys):
    name = topic.split("/")[-1]
    create = ["create", "--project", cloud.project, name]
    assert pubsub.main(create) == 0
    pubsub.publish(topic, ["one"])
    assert pubsub.main(create) == 0
    subscription = f"projects/{cloud.project}/subscriptions/{name}"
    assert capsys.readouterr().out == f"{subscription}\n{subscription}\n"
    assert len(pubsub.collect(subscription, 1, timeout=300)) == 1
    other = pubsub.create_topic(cloud.project, f"{name}-other")
    with pytest.raises(ValueError, match="is a subscription to"):
        pubsub.create_subscription(other, name, replace=False)
    pubsub.delete(subscription, other)


def test_a_subscription_that_has_outlived_its_topic_says_what_to_do(topic):
    name = topic.rpartition("/")[2]
    pubsub.create_subscription(topic, name)
    pubsub.delete(topic)
    pubsub.create_topic(topic.split("/")[1], name)
    with pytest.raises(ValueError, match=f"gcloud pubsub subscriptions delete {name} --project="):
        pubsub.create_subscription(topic, name, replace=False)


def test_prompts_are_asked_beside_other_readers(topic, cloud, capsys):
    """A thread stands in for the job: it answers what it reads."""
    name = topic.split("/")[-1]
    responses = pubsub.create_topic(cloud.project, f"{name}-responses")
    reader = pubsub.create_subscription(responses, f"{name}-reader")
    messages = pubsub.create_subscription(topic, f"{name}-job")

    def answer() -> None:
        for message in pubsub.collect(messages, 2, timeout=300):
            pubsub.publish(responses, [message.data.upper()], prompt_message_id=message.message_id)

    job = threading.Thread(target=answer)
    job.start()
    command = ["ask", "--project", cloud.project, "--messages", name, "--responses", f"{name}-responses"]
    assert pubsub.main([*command, "one", "two"]) == 0
    job.join()
    assert capsys.readouterr().out == "one\nONE\n\ntwo\nTWO\n\n"
    assert len(pubsub.collect(reader, 2, timeout=300)) == 2, "the other reader has them too"
    assert pubsub.main([*command, "--timeout=1", "three"]) == 1
    assert "1 of 1 prompts have no response" in capsys.readouterr().err
    pubsub.delete(reader, messages, responses)


def test_collect_ends_when_its_time_is_over(topic):
    subscription = pubsub.create_subscription(topic, "silent")
    started = time.monotonic()
    assert pubsub.collect(subscription, 1, timeout=1) == []
    assert time.monotonic() - started < 6


def test_a_subscription_of_an_earlier_run_is_replaced(topic):
    subscription = pubsub.create_subscription(topic, "again")
    pubsub.publish(topic, ["old"])
    pubsub.create_subscription(topic, "again")
    pubsub.publish(topic, ["new"])
    assert [m.data for m in pubsub.collect(subscription, 1, timeout=300)] == [b"new"]


def test_making_and_deleting_twice_is_no_error(topic):
    assert pubsub.create_topic(*topic.split("/")[1::2]) == topic
    subscription = pubsub.create_subscription(topic, "twice")
    for _ in range(2):
        pubsub.delete(subscription, topic)


def test_a_topic_that_does_not_exist_is_an_error(cloud):
    absent = f"projects/{cloud.project}/topics/absent"
    with pytest.raises(NotFound):
        pubsub.publish(absent, ["lost"])
    with pytest.raises(NotFound):
        pubsub.create_subscription(absent, "absent")


def test_an_answer_is_known_by_either_of_its_prompts_ids(topic):
    """Also where a service hands messages to its workers without their message ids."""
    name = f"either-{uuid.uuid4().hex[:8]}"
    subscription = pubsub.create_subscription(topic, name)
    ids = pubsub.publish_prompts(topic, ["one", "two", "three"])
    sent = {m.message_id: m.attributes["prompt_id"] for m in pubsub.collect(subscription, 3, timeout=300)}
    assert len(set(sent.values())) == 3
    pubsub.publish(topic, ["1"], prompt_message_id=ids[0])
    pubsub.publish(topic, ["2"], prompt_message_id="", prompt_id=sent[ids[1]])
    pubsub.publish(topic, ["another's"], prompt_message_id="", prompt_id="unknown")
    pubsub.publish(topic, ["3"], prompt_message_id=ids[2], prompt_id=sent[ids[2]])
    answers = pubsub.collect_answers(subscription, ids, timeout=300)
    assert [answers[one].data for one in ids] == [b"1", b"2", b"3"]
    pubsub.delete(subscription)
    with pytest.raises(ValueError, match="Message 1 of 1 is empty"):
        pubsub.publish_prompts(topic, [""])
