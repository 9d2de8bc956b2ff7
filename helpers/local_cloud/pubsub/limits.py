"""The names and sizes that Pub/Sub accepts.

Every check raises the RpcError that its caller should see.
"""

from __future__ import annotations

import re
from typing import Any

from ..front.grpc_service import invalid_argument

MAX_REQUEST_BYTES = (
    10_000_000  # this and the following: https://cloud.google.com/pubsub/quotas#resource_limits
)
MAX_MESSAGES_PER_PUBLISH = 1000
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY_BYTES = 256
MAX_ATTRIBUTE_VALUE_BYTES = 1024
MAX_ORDERING_KEY_BYTES = 1024
ACK_DEADLINE_SECONDS = range(10, 601)

_ID = re.compile(r"(?!goog)[A-Za-z][A-Za-z0-9\-_.~+%]{2,254}")


def check_name(name: str, kind: str) -> None:
    """Checks the full name of a topic or subscription; `kind` is `topics` or `subscriptions`."""
    project, _, id_ = name.partition(f"/{kind}/")
    if not project.startswith("projects/") or project.count("/") != 1 or not _ID.fullmatch(id_):
        raise invalid_argument(
            f"Invalid [{kind}] name: (name={name}). Use projects/PROJECT/{kind}/ID, where the ID has 3 to "
            "255 letters, digits and -_.~+%, and begins with a letter but not with goog."
        )


def check_ack_deadline(seconds: int) -> None:
    """Checks a subscription's or a stream's acknowledgement deadline."""
    if seconds not in ACK_DEADLINE_SECONDS:
        raise invalid_argument(f"Invalid ack deadline: {seconds}; it must be 10 to 600 seconds.")


def check_publish(request: Any) -> None:
    """Checks a PublishRequest against the service's limits."""
    if not request.messages:
        raise invalid_argument("The request holds no messages.")
    if len(request.messages) > MAX_MESSAGES_PER_PUBLISH:
        raise invalid_argument(f"The request holds more than {MAX_MESSAGES_PER_PUBLISH} messages.")
    if request.ByteSize() > MAX_REQUEST_BYTES:
        raise invalid_argument(f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes.")
    for message in request.messages:
        if not message.data and not message.attributes:
            raise invalid_argument("A message must have data or at least one attribute.")
        if len(message.ordering_key.encode()) > MAX_ORDERING_KEY_BYTES:
            raise invalid_argument(f"An ordering key has at most {MAX_ORDERING_KEY_BYTES} bytes.")
        if len(message.attributes) > MAX_ATTRIBUTES:
            raise invalid_argument(f"A message has at most {MAX_ATTRIBUTES} attributes.")
        for key, value in message.attributes.items():
            if not 0 < len(key.encode()) <= MAX_ATTRIBUTE_KEY_BYTES or key.startswith("goog"):
                raise invalid_argument(
                    f"The attribute key {key[:40]!r} must have 1 to {MAX_ATTRIBUTE_KEY_BYTES} bytes and "
                    "must not begin with goog."
                )
            if len(value.encode()) > MAX_ATTRIBUTE_VALUE_BYTES:
                raise invalid_argument(
                    f"The value of attribute {key[:40]!r} has more than {MAX_ATTRIBUTE_VALUE_BYTES} bytes."
                )
