"""Answers that must be JSON of a certain form: found in what the model says, parsed and validated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from helpers.model_handler.prompts import STRICT, json_text

# Braces around a name are prose, or a formula.
_BEGINNING = re.compile(r"\[|\{(?=\s*[\"}])")
MOST_PLACES = 20
"""How many times an answer is searched for JSON: there is one in a good answer."""

MOST_REASON = 300
"""The most characters of a reason: it goes into an attribute, and back to the model."""

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SAMPLES = (None, False, 0, "", [], {}, [{}], {"a": {}})


class InvalidAnswerError(ValueError):
    """An answer that is not JSON, or does not fit the schema; the message says where."""


class AnswerSchema:
    """A JSON Schema for answers. Its `format`s are not checked, which is the specification's default.

    Args:
        text: the schema, as JSON. Its `$schema` says which draft it is of; 2020-12 if it does not say.

    Raises:
        ValueError: it is no JSON, no JSON Schema, or refers to something that is not in it, or to itself
            without end.
    """

    def __init__(self, text: str) -> None:
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry

        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"answer_schema is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError("answer_schema is not a JSON object, as a JSON Schema is.")
        if not isinstance(schema.get("$schema", ""), str):
            raise ValueError("answer_schema has a $schema that is no text.")
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            _check(schema, kind)
            _check_references(schema, kind)
            # With a registry of its own it never fetches anything.
            self._validator = kind(schema, registry=Registry())
            for sample in _SAMPLES:  # finds what refers to itself without end
                self._validator.is_valid(sample)
        except RecursionError:
            raise ValueError("answer_schema is nested too deeply, or refers to itself without end.") from None

    def read(self, answer: str) -> str:
        """The JSON in an answer, written anew, without what the model said around it.

        That is the whole answer, or what stands in its first fenced block, or the first JSON object or list
        in it that fits. What is a part of a broken object or list is not taken for the whole.

        Raises:
            InvalidAnswerError: there is none, or it does not fit the schema.
        """
        reason = ""
        try:
            for value in _values_in(answer):
                error = self._error_of(value)
                if not error:
                    return _written(value)
                reason = reason or error
        except RecursionError:
            reason = reason or "it is nested too deeply"
        raise InvalidAnswerError((reason or "it is not JSON")[:MOST_REASON])

    def _error_of(self, value: Any) -> str:
        """What is wrong with a value; empty if it fits."""
        from jsonschema.exceptions import best_match

        try:
            error = best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "it is nested too deeply"
        except Exception as error:  # numbers that no check can be made of, for instance
            return f"it cannot be checked: {error}"
        return "" if error is None else _where(error)


@lru_cache(maxsize=16)
def answer_schema(text: str) -> AnswerSchema:
    """The schema of this text, made once.

    Raises:
        ValueError: as `AnswerSchema`.
    """
    return AnswerSchema(text)


def _values_in(answer: str) -> Iterator[Any]:
    """The JSON in an answer.

    Raises:
        InvalidAnswerError: after what there is comes an object or a list that is broken.
    """
    for text in (answer, _fenced(answer)):
        try:
            value = json.loads(text, **STRICT, parse_float=_Float, parse_int=_Int)
        except ValueError:
            continue
        yield value
        return
    decoder, place = json.JSONDecoder(**STRICT, parse_float=_Float, parse_int=_Int), 0
    for _ in range(MOST_PLACES):
        found = _BEGINNING.search(answer, place)
        if not found:
            return
        try:
            value, place = decoder.raw_decode(answer, found.start())
        except ValueError as error:
            end = answer.find("]", found.start())
            if found[0] == "{" or end < 0 or any(sign in answer[found.start() : end] for sign in '"{'):
                raise InvalidAnswerError(f"it is not JSON: {error}"[:MOST_REASON]) from error
            place = end + 1  # brackets of prose, as in "[3 items]"
            continue
        yield value


def _fenced(answer: str) -> str:
    """What stands in the first fenced block; empty without one."""
    _, _, block = answer.partition("```")
    _, newline, content = block.partition("\n")
    content, fence, _ = content.partition("```")
    return content if newline and fence else ""


class _Int(int):
    def __new__(cls, text: str) -> _Int:
        number = super().__new__(cls, text)
        number.written = text
        return number


class _Float(float):
    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        if math.isinf(number):
            raise ValueError(f"{text[:20]} is too large a number")
        number.written = text
        return number


def _written(value: Any) -> str:
    # Half of a pair of escapes is no character: it stays an escape.
    return "".join(
        sign if not "\ud800" <= sign <= "\udfff" else f"\\u{ord(sign):04x}" for sign in json_text(value)
    )


def _where(error: Any) -> str:
    place = error.json_path.removeprefix("$").removeprefix(".")
    return f"{place + ': ' if place else ''}{error.message}"[:MOST_REASON]


def _check(schema: Any, kind: Any) -> None:
    from jsonschema.exceptions import SchemaError

    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"answer_schema is no JSON Schema: {_where(error)}") from error


def _check_references(schema: dict, kind: Any) -> None:
    """Checks that every reference leads to a schema; what is referred to is looked through in turn."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = Registry().with_resource(root.id() or "", root).resolver(root.id() or "")
    waiting, seen = [(root, resolver)], set()
    while waiting:
        resource, resolver = waiting.pop()
        contents = resource.contents
        if not isinstance(contents, dict) or id(contents) in seen:
            continue
        seen.add(id(contents))
        for name in _REFERENCES:
            if isinstance(reference := contents.get(name), str):
                try:
                    found = resolver.lookup(reference)
                except Exception as error:  # no such place, or a pointer that is none
                    raise ValueError(
                        f"answer_schema refers to {reference!r}, which is not in it: nothing is fetched, so "
                        "put it into $defs."
                    ) from error
                if not isinstance(found.contents, dict | bool):
                    raise ValueError(f"answer_schema refers to {reference!r}, which is no schema.")
                _check(found.contents, kind)
                target = Resource.from_contents(found.contents, default_specification=DRAFT202012)
                waiting.append((target, found.resolver))
        waiting += [(one, resolver.in_subresource(one)) for one in resource.subresources()]
