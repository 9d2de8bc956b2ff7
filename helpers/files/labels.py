"""Job labels in the form that Google Cloud accepts."""

import json
import re

SERIES = {"series": "streaming-llm"}
"""On every job of these notebooks: by it they are found again."""


def label_value(text: str) -> str:
    """Turns text into a label's value: lower case, at most 63 letters, digits, underscores and dashes.

    The rule: https://cloud.google.com/resource-manager/docs/labels-overview#requirements
    """
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:63].strip("-")


def labels_in(text: str) -> list[str]:
    """The labels of a command line's argument, which is `KEY=VALUE`, or a JSON object as Beam takes it too.

    Returns:
        `KEY=VALUE` for each.

    Raises:
        ValueError: it is neither, or the services would refuse one.
    """
    labels = [text]
    if text.lstrip().startswith("{"):
        try:
            labels = [f"{key}={value}" for key, value in json.loads(text).items()]
        except ValueError as error:
            raise ValueError(f"{text!r} is no JSON object: {error}") from error
    for label in labels:
        _check(label)
    return labels


def _check(text: str) -> None:
    key, _, value = text.partition("=")
    is_key = re.fullmatch(r"(?=[^\W\d_])[\w-]{1,63}", key) and not key.startswith("goog")
    if not is_key or not re.fullmatch(r"[\w-]{0,63}", value) or text != text.lower():
        raise ValueError(
            f"{text!r} is not a label: write KEY=VALUE, each of up to 63 lower-case letters, digits, "
            "underscores and dashes; the key begins with a letter, and not with goog"
        )
