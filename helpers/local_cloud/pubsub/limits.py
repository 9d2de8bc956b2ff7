"""What Pub/Sub accepts: names, sizes, the fields that may change, and what the local cloud does not imitate.

Every check raises the RpcError that its caller should see.
"""

from __future__ import annotations

import re
from typing import Any

from ..front.fields import REFUSED
from ..front.grpc_service import invalid_argument, unimplemented
from .fields import TABLES

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
_UPDATABLE = {
    "topic": {"labels", "message_retention_duration"},
    "subscription": {
        "ack_deadline_seconds",
        "retain_acked_messages",
        "message_retention_duration",
        "labels",
        "expiration_policy",
    },
}
_TABLES = {"topic": TABLES["CreateTopic"], "subscription": TABLES["CreateSubscription"]}


def updated(old: Any, new: Any, mask: Any, kind: str) -> Any:
    """A copy of `old` with the fields that the mask names taken from `new`."""
    if not mask.paths:
        raise invalid_argument("The update_mask must name at least one field.")
    for path in mask.paths:
        name = path.partition(".")[0]
        if name in new.DESCRIPTOR.fields_by_name and _TABLES[kind].of(name) == REFUSED:
            raise unimplemented(f"{path} of a {kind}.")
        if path not in _UPDATABLE[kind]:
            raise invalid_argument(f"Invalid update_mask: {path!r} of a {kind} cannot be changed.")
    merged = type(old)()
    merged.CopyFrom(old)
    mask.MergeMessage(new, merged, replace_message_field=True, replace_repeated_field=True)
    return merged


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
