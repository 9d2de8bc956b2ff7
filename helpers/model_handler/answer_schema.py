"""Answers that must be JSON of a certain form: found in what the model says, parsed and validated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NoReturn

_FENCE = re.compile(r"```[a-zA-Z]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_VALUES = ("const", "default", "enum", "examples")
"""Keywords that hold values, not schemas."""

MOST_REASON = 300
"""The most characters of a reason: it goes into an attribute, and back to the model."""


class InvalidAnswerError(ValueError):
    """An answer that is not JSON, or does not fit the schema; the message says where."""


class AnswerSchema:
    """A JSON Schema for answers.

    Args:
        text: the schema, as JSON. Its `$schema` says which draft it is of; 2020-12 if it does not say.

    Raises:
        ValueError: it is no JSON, no JSON Schema, or refers to something outside itself.
    """

    def __init__(self, text: str) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry

        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"answer_schema is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError("answer_schema is not a JSON object, as a JSON Schema is.")
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"answer_schema is no JSON Schema: {_where(error)}") from error
        for reference in _references(schema):
            _check_reference(schema, reference)
        # With a registry of its own it never fetches anything.
        self._validator = kind(schema, registry=Registry())

    def read(self, answer: str) -> str:
        """The JSON in an answer, written anew, without what the model said around it.

        That is the whole answer, or what stands in its first fenced block, or the first JSON object or list
        in it.

        Raises:
            InvalidAnswerError: there is none, or it does not fit the schema.
        """
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        try:
            value = _find_json(answer)
            error = best_match(self._validator.iter_errors(value))
            if error is not None:
                raise InvalidAnswerError(_where(error))
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            # Half of a pair of escapes, which JSON allows, is no character: it stays an escape.
            return written if _is_unicode(written) else json.dumps(value)
        except RecursionError:
            raise InvalidAnswerError("it is nested too deeply") from None
        except Unresolvable as error:
            raise InvalidAnswerError(f"the schema refers to what it does not hold: {error}") from error


@lru_cache(maxsize=16)
def answer_schema(text: str) -> AnswerSchema:
    """The schema of this text, made once.

    Raises:
        ValueError: as `AnswerSchema`.
    """
    return AnswerSchema(text)


def _find_json(answer: str) -> Any:
    fenced = _FENCE.search(answer)
    for text in (answer, *([fenced[1]] if fenced else [])):
        try:
            return json.loads(text, parse_constant=_refuse)
        except ValueError:
            pass
    decoder = json.JSONDecoder(parse_constant=_refuse)
    start = re.search(r"[{\[]", answer)
    if not start:
        raise InvalidAnswerError("it is not JSON")
    try:
        return decoder.raw_decode(answer, start.start())[0]
    except ValueError as error:
        raise InvalidAnswerError(f"it is not JSON: {error}"[:MOST_REASON]) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _where(error: Any) -> str:
    place = error.json_path.removeprefix("$").removeprefix(".")
    return f"{place + ': ' if place else ''}{error.message}"[:MOST_REASON]


def _references(part: Any) -> Iterator[str]:
    """The references in a part of a schema, but not in what has an address of its own, which they may be
    relative to."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            elif name not in _VALUES and not (isinstance(value, dict) and "$id" in value):
                yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def _check_reference(schema: dict, reference: str) -> None:
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    base = resource.id() or ""
    resolver = Registry().with_resource(base, resource).resolver(base)
    try:
        resolver.lookup(reference)
    except Unresolvable as error:
        raise ValueError(
            f"answer_schema refers to {reference!r}, which is not in it: nothing is fetched, so put it into "
            "$defs."
        ) from error
