"""Labels of jobs, as Google Cloud accepts them."""

import re


def label_value(text: str) -> str:
    """Text as the value of a label: lower case, at most 63 letters, digits, underscores and dashes.

    The rule: https://cloud.google.com/resource-manager/docs/labels-overview#requirements
    """
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:63].strip("-")
