"""Pub/Sub: create topics and subscriptions, publish prompts, collect what comes back.

    python -m helpers.pubsub create --project P messages responses
    python -m helpers.pubsub ask    --project P "What is the capital of France?"

`create` makes topics, each with a subscription of its name, and keeps those that are there. `ask` publishes
prompts to the topic `messages`, and prints their responses from the topic `responses`, as a running job sends
them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

from google.api_core.exceptions import (
    AlreadyExists,
    DeadlineExceeded,
    Forbidden,
    GoogleAPICallError,
    NotFound,
)
from google.auth.exceptions import GoogleAuthError
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.types import PubsubMessage

from helpers.files import access

# How long, in seconds, a pull waits for a first message before it is repeated.
PULL_SECONDS = 5

DELETED_TOPIC = "_deleted-topic_"  # of a subscription that has outlived its topic

PUBLISH_SECONDS = 60
MAX_REQUEST_MESSAGES = 1000
MAX_REMEMBERED = 1_000_000
MAX_REQUEST_BYTES = 9_000_000  # of 10 MB, which the request's own bytes count to


# Of the prompts that this process has published: their prompt_id by their message id.
_prompt_ids: dict[str, str] = {}


def create_topic(project: str, name: str) -> str:
    """Makes a topic, unless it exists, and returns its path: `projects/PROJECT/topics/NAME`."""
    publisher = pubsub_v1.PublisherClient()
    path = publisher.topic_path(project, name)
    with contextlib.suppress(AlreadyExists):
        publisher.create_topic(name=path)
    return path


def create_subscription(
    topic: str, name: str, *, ack_deadline_seconds: int = 60, replace: bool = True
) -> str:
    """Makes a subscription to a topic, and returns its path: `projects/PROJECT/subscriptions/NAME`.

    One of the same name, left by an earlier run, is replaced: its messages are not this run's.

    Args:
        topic: the topic's path.
        name: the subscription's name, in the topic's project.
        ack_deadline_seconds: an unacknowledged message is delivered again after this time, 10 to 600.
        replace: whether to replace one of the same name, rather than to keep it with its messages.

    Raises:
        google.api_core.exceptions.NotFound: there is no such topic.
        ValueError: one is to be kept that is of another topic.
    """
    with pubsub_v1.SubscriberClient() as subscriber:
        path = subscriber.subscription_path(topic.split("/")[1], name)
        if replace:
            with contextlib.suppress(NotFound):
                subscriber.delete_subscription(subscription=path)
        request = {"name": path, "topic": topic, "ack_deadline_seconds": ack_deadline_seconds}
        try:
            subscriber.create_subscription(request=request)
        except AlreadyExists:
            if replace:
                raise
            if (own := subscriber.get_subscription(subscription=path).topic) == DELETED_TOPIC:
                raise ValueError(
                    f"The topic of {path} was deleted, so that nothing new comes to it. Delete it too, with "
                    f"its messages, and run this again: gcloud pubsub subscriptions delete {name} "
                    f"--project={topic.split('/')[1]}"
                ) from None
            if own != topic:
                raise ValueError(f"{path} is a subscription to {own}, not to {topic}.") from None
    return path


def publish(topic: str, texts: Iterable[str | bytes], /, **attributes: str) -> list[str]:
    """Publishes messages, all with the same attributes, and returns their ids in order.

    Raises:
        ValueError: a message is empty; none has been published.
        google.api_core.exceptions.NotFound: there is no such topic.
    """
    data = _encoded(texts)
    if not attributes:
        _check_not_empty(data)
    return _publish(topic, [PubsubMessage(data=item, attributes=attributes) for item in data])


def publish_prompts(topic: str, prompts: Iterable[str | bytes]) -> list[str]:
    """Publishes prompts, each with a UUID of its own as the attribute `prompt_id`, and returns their message
    ids in order.

    A response carries both ids, and `collect_answers` knows it by either: nothing waits in vain if a service
    hands messages to its workers without their message ids.

    Raises:
        ValueError: a prompt is empty; none has been published.
        google.api_core.exceptions.NotFound: there is no such topic.
    """
    data = _encoded(prompts)
    _check_not_empty(data)
    messages = [PubsubMessage(data=item, attributes={"prompt_id": uuid.uuid4().hex}) for item in data]
    ids = _publish(topic, messages)
    _prompt_ids.update(
        {one: message.attributes["prompt_id"] for one, message in zip(ids, messages, strict=True)}
    )
    while len(_prompt_ids) > MAX_REMEMBERED:
        del _prompt_ids[next(iter(_prompt_ids))]
    return ids


def _encoded(texts: Iterable[str | bytes]) -> list[bytes]:
    return [text if isinstance(text, bytes) else text.encode() for text in texts]


def _check_not_empty(data: list[bytes]) -> None:
    if b"" in data:
        raise ValueError(
            f"Message {data.index(b'') + 1} of {len(data)} is empty, and Pub/Sub takes no message without "
            "data or attributes: leave it out."
        )


def _publish(topic: str, messages: list[PubsubMessage]) -> list[str]:
    publisher = pubsub_v1.PublisherClient()
    ids: list[str] = []
    for batch in in_requests(messages):
        # As messages, by the service's own call, which the client inherits: its publish() takes attributes
        # for arguments, of which `topic`, `data` and `timeout` are its own.
        response = PublisherClient.publish(publisher, topic=topic, messages=batch, timeout=PUBLISH_SECONDS)
        ids += response.message_ids
    return ids


def in_requests(messages: Iterable[PubsubMessage]) -> Iterator[list[PubsubMessage]]:
    """Messages in lots that one request may hold: https://cloud.google.com/pubsub/quotas#resource_limits"""
    batch: list[PubsubMessage] = []
    size = 0
    for message in messages:
        own = PubsubMessage.pb(message).ByteSize() + 16
        if batch and (len(batch) == MAX_REQUEST_MESSAGES or size + own > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += own
    if batch:
        yield batch


def collect(
    subscription: str,
    count: int,
    *,
    timeout: float = 120,
    progress: Callable[[int], object] | None = None,
) -> list[PubsubMessage]:
    """Receives and acknowledges messages, until there are `count` or time runs out.

    Args:
        subscription: the subscription's path.
        count: how many to wait for.
        timeout: how long to wait for all of them, in seconds.
        progress: called with the number of messages in each lot that arrives.

    Returns:
        The messages in the order of their arrival; fewer than `count` if time ran out.
    """
    messages: list[PubsubMessage] = []
    deadline = time.monotonic() + timeout
    with pubsub_v1.SubscriberClient() as subscriber:
        while len(messages) < count and (left := deadline - time.monotonic()) > 0:
            try:
                pulled = subscriber.pull(
                    subscription=subscription,
                    max_messages=count - len(messages),
                    timeout=min(PULL_SECONDS, max(left, 0.1)),
                ).received_messages
            except DeadlineExceeded:  # nothing came
                continue
            if pulled:
                ack_ids = [received.ack_id for received in pulled]
                subscriber.acknowledge(subscription=subscription, ack_ids=ack_ids)
                messages += [received.message for received in pulled]
                if progress:
                    progress(len(pulled))
    return messages


def collect_answers(
    subscription: str,
    prompt_ids: Iterable[str],
    *,
    timeout: float = 120,
    progress: Callable[[int], object] | None = None,
) -> dict[str, PubsubMessage]:
    """Receives the responses to prompts, whatever else arrives, until each has one or time runs out.

    Args:
        subscription: the path of a subscription to the responses topic.
        prompt_ids: the message ids of the prompts, as `publish_prompts` gives them.
        timeout: how long to wait for all of them, in seconds.
        progress: called with the number of new responses in each lot that arrives.

    Returns:
        The first response to each prompt that has one, by the prompt's id. A job with at-least-once delivery
        may send a second, which is only acknowledged, as are responses to other prompts.
    """
    wanted = set(prompt_ids)
    by_own_id = {_prompt_ids[one]: one for one in wanted if one in _prompt_ids}
    answers: dict[str, PubsubMessage] = {}
    deadline = time.monotonic() + timeout
    while (missing := len(wanted) - len(answers)) and (left := deadline - time.monotonic()) > 0:
        for message in collect(subscription, missing, timeout=min(left, PULL_SECONDS)):
            own_id = message.attributes.get("prompt_id", "")
            prompt_id = message.attributes.get("prompt_message_id") or by_own_id.get(own_id)
            if prompt_id in wanted:
                answers.setdefault(prompt_id, message)
        if progress:
            progress(missing - len(wanted) + len(answers))
    return answers


def ask(
    topic: str, responses_topic: str, prompts: Sequence[str], *, timeout: float = 120
) -> list[str | None]:
    """Publishes prompts, and waits for their responses, beside whatever else reads these.

    Args:
        topic: the path of the topic of the prompts.
        responses_topic: the path of the topic of the responses. It is read by a subscription for these
            prompts alone, made before they are published and deleted afterwards.
        prompts: the prompts.
        timeout: how long to wait, in seconds.

    Returns:
        The response to each prompt, in order; None for one without a response in time.

    Raises:
        ValueError: a prompt is empty.
        google.api_core.exceptions.NotFound: there is no such topic.
    """
    subscription = create_subscription(responses_topic, f"ask-{uuid.uuid4().hex[:12]}")
    try:
        ids = publish_prompts(topic, prompts)
        answers = collect_answers(subscription, ids, timeout=timeout)
    finally:
        delete(subscription)
    return [answers[one].data.decode() if one in answers else None for one in ids]


def delete(*paths: str) -> None:
    """Deletes topics and subscriptions by their paths; those already gone are ignored."""
    publisher = pubsub_v1.PublisherClient()
    with pubsub_v1.SubscriberClient() as subscriber:
        for path in paths:
            with contextlib.suppress(NotFound):
                if path.split("/")[2] == "subscriptions":
                    subscriber.delete_subscription(subscription=path)
                else:
                    publisher.delete_topic(topic=path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Exit codes: 0; 1 for what went wrong, such as a prompt without a response, with a line on stderr; 2 for a
    command line that is not understood; 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.pubsub", description="Topics, and prompts.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make topics, each with a subscription of its name")
    create.add_argument("names", nargs="+", metavar="NAME")
    ask = commands.add_parser("ask", help="publish prompts, and print their responses")
    ask.add_argument("prompts", nargs="+", metavar="PROMPT")
    ask.add_argument("--messages", default="messages", metavar="NAME", help="the topic to publish to")
    ask.add_argument("--responses", default="responses", metavar="NAME", help="the topic of the responses")
    ask.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="default: %(default)g")
    for command in (create, ask):
        command.add_argument("--project", required=True)
    given = parser.parse_args(arguments)
    try:
        if given.command == "create":
            for name in given.names:
                print(create_subscription(create_topic(given.project, name), name, replace=False))
            return 0
        return _ask(given)
    except GoogleAuthError as error:
        mend = f"{access.log_in()}, or try it with python -m helpers.local_cloud"
        print(f"error: no credentials for Google Cloud: {mend}. ({error})", file=sys.stderr)
        return 1
    except Forbidden as error:
        print(f"error: {access.explain(error, given.project)}", file=sys.stderr)
        return 1
    except NotFound as error:
        print(f"error: {error.message} (`create` makes topics.)", file=sys.stderr)
        return 1
    except (GoogleAPICallError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _ask(given: argparse.Namespace) -> int:
    topics = f"projects/{given.project}/topics"
    answers = ask(
        f"{topics}/{given.messages}", f"{topics}/{given.responses}", given.prompts, timeout=given.timeout
    )
    for prompt, answer in zip(given.prompts, answers, strict=True):
        if answer is not None:
            print(f"{prompt}\n{answer}\n")
    if missing := answers.count(None):
        print(
            f"error: {missing} of {len(answers)} prompts have no response. Is a job running?", file=sys.stderr
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
