"""Where a stream's messages come from, and where they go: never to the same topic."""

from __future__ import annotations

from helpers.pipeline.stream import CommandLineError


def check_destinations(
    *,
    responses_topic: str,
    messages_topic: str | None = None,
    messages_subscription: str | None = None,
    dead_letter_topic: str | None = None,
) -> None:
    """Refuses a job that would read what it publishes: each message would be answered for ever, and paid for.

    The topic of a subscription is looked up; where it cannot be, because the account may not or there is no
    such subscription, this says nothing.

    Raises:
        CommandLineError: responses or dead letters go to the topic that is read, or both go to the same.
    """
    source = messages_topic or _topic_of(messages_subscription or "")
    for name, topic in (("responses", responses_topic), ("dead letters", dead_letter_topic)):
        if topic and topic == source:
            raise CommandLineError(
                f"{name} would go to {topic}, which the job reads: each would be asked again, for ever. Give "
                "them a topic of their own."
            )
    if dead_letter_topic and dead_letter_topic == responses_topic:
        raise CommandLineError(
            f"responses and dead letters would both go to {responses_topic}: give each a topic of its own."
        )


def _topic_of(subscription: str) -> str:
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import pubsub_v1

    if not subscription:
        return ""
    try:
        with pubsub_v1.SubscriberClient() as client:
            return client.get_subscription(subscription=subscription, timeout=20, retry=None).topic
    except (GoogleAPICallError, GoogleAuthError):
        return ""
