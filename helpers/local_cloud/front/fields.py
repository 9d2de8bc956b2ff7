"""What becomes of each field of a request: honoured, without effect, or refused by name.

A field that is accepted and then forgotten is the worst that an imitation can do. So each call has a table of
the fields that it honours and of those that have no effect here (each table says why); a request that
sets any other field is refused with the field's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HONOURED, WITHOUT_EFFECT, REFUSED = "honoured", "without effect", "refused"


@dataclass(frozen=True)
class Fields:
    """The fields of one kind of request, by name; `a.b` is a field of field a, and a name stands for all the
    fields in it that have no entry of their own.

    Attributes:
      honoured: what they ask for is done.
      without_effect: what they ask for means nothing here, or is stored only.
      refused: exceptions in a field that is not refused.
    """

    honoured: frozenset[str]
    without_effect: frozenset[str]
    refused: frozenset[str]

    def of(self, path: str) -> str:
        """What becomes of a field."""
        while True:
            for kind, names in (
                (REFUSED, self.refused),
                (HONOURED, self.honoured),
                (WITHOUT_EFFECT, self.without_effect),
            ):
                if path in names:
                    return kind
            if "." not in path:
                return REFUSED
            path = path.rpartition(".")[0]

    def has_entries_in(self, path: str) -> bool:
        """Whether some of the fields in a field have entries of their own."""
        every = self.honoured | self.without_effect | self.refused
        return any(name.startswith(f"{path}.") for name in every)


def fields(honoured: str, without_effect: str = "", refused: str = "") -> Fields:
    """A table, from names separated by spaces."""
    return Fields(*(frozenset(names.split()) for names in (honoured, without_effect, refused)))


def refused_in_message(message: Any, table: Fields) -> str | None:
    """The first field that is set in a protobuf message and that the table refuses; None if there is none."""
    return next((path for path in _set_fields(message, table) if table.of(path) == REFUSED), None)


def refused_in_json(content: Mapping[str, Any], table: Fields) -> str | None:
    """The first field of a JSON object that says something and that the table refuses; None if there is
    none."""
    return next((path for path in _set_names(content, table) if table.of(path) == REFUSED), None)


def _set_fields(message: Any, table: Fields, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        path = prefix + field.name
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        is_open = field.message_type is not None and not is_map and table.has_entries_in(path)
        # An empty message says no more than its absence.
        repeated = not is_map and not hasattr(value, "ListFields") and hasattr(value, "__len__")
        if is_open:
            for one in value if repeated and field.message_type else [value]:
                yield from _set_fields(one, table, f"{path}.")
        elif not (hasattr(value, "ListFields") and not value.ListFields()):
            yield path


def _set_names(content: Mapping[str, Any], table: Fields, prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        path = prefix + name
        if says_nothing(value):
            continue
        parts = value if isinstance(value, list) else [value]
        if table.has_entries_in(path) and all(isinstance(part, Mapping) for part in parts):
            for part in parts:
                yield from _set_names(part, table, f"{path}.")
        else:
            yield path


def says_nothing(value: object) -> bool:
    """Whether a value asks for nothing: it is empty, zero or false."""
    if isinstance(value, str):
        return value.lower() in ("", "false", "0", "0s")
    if isinstance(value, Mapping):
        return all(says_nothing(part) for part in value.values())
    return not value
