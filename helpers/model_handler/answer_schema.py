"""Answers that must be JSON of a certain form: found in what the model says, parsed and validated."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any, NoReturn

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
        in it.

        Raises:
            InvalidAnswerError: there is none, or it does not fit the schema.
        """
        from jsonschema.exceptions import best_match

        try:
            value = _find_json(answer)
            error = best_match(self._validator.iter_errors(value))
        except InvalidAnswerError:
            raise
        except RecursionError:
            raise InvalidAnswerError("it is nested too deeply") from None
        except Exception as error:  # numbers that no check can be made of, for instance
            raise InvalidAnswerError(f"it cannot be checked: {error}"[:MOST_REASON]) from error
        if error is not None:
            raise InvalidAnswerError(_where(error))
        written = json.dumps(value, ensure_ascii=False)
        try:
            written.encode()
        except UnicodeEncodeError:  # half of a pair of escapes is no character: it stays an escape
            return json.dumps(value)
        return written


@lru_cache(maxsize=16)
def answer_schema(text: str) -> AnswerSchema:
    """The schema of this text, made once.

    Raises:
        ValueError: as `AnswerSchema`.
    """
    return AnswerSchema(text)


def _find_json(answer: str) -> Any:
    for text in (answer, _fenced(answer)):
        try:
            return json.loads(text, parse_constant=_refuse, parse_float=_finite)
        except ValueError:
            pass
    decoder = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
    for start in re.finditer(r"[{\[](?=\s*[\[\]{}\"\d\-tfn])", answer):
        try:
            return decoder.raw_decode(answer, start.start())[0]
        except json.JSONDecodeError as error:
            if error.pos <= start.start() + 1:  # as in "[sic]": not even the beginning of JSON
                continue
            raise InvalidAnswerError(f"it is not JSON: {error}"[:MOST_REASON]) from error
        except ValueError as error:
            raise InvalidAnswerError(f"it is not JSON: {error}"[:MOST_REASON]) from error
    raise InvalidAnswerError("it is not JSON")


def _fenced(answer: str) -> str:
    """What stands in the first fenced block; empty without one."""
    _, _, block = answer.partition("```")
    _, newline, content = block.partition("\n")
    content, fence, _ = content.partition("```")
    return content if newline and fence else ""


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


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
