"""Job labels in the form that Google Cloud accepts."""

import re

SERIES = {"series": "streaming-llm"}
"""On every job of these notebooks: by it they are found again."""


def label_value(text: str) -> str:
    """Turns text into a label's value: lower case, at most 63 letters, digits, underscores and dashes.

    The rule: https://cloud.google.com/resource-manager/docs/labels-overview#requirements
    """
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:63].strip("-")
