"""What error messages quote: others' errors in a line, and the first of many names."""

from __future__ import annotations

from collections.abc import Collection


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def some(names: Collection[str], limit: int) -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
