"""Prompts as people have them: a text, a record or a conversation, with an instruction and a template around
them.

* A *text* is a `str`.
* A *record* is a JSON object, a `dict`; a template says how its fields are asked about.
* A *conversation* is a list of turns `{"role": ..., "content": ...}`, as chat programs write them.

A template is a text with fields in braces: `Summarize for a customer: {text}`. `{text}` is the whole of a
text prompt; of a record, each name is a field's, with dots for a field in a field. `{{` and `}}` are braces
themselves. Nothing in a template or a message is ever evaluated, and what a field holds is not looked at for
fields again.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, str]]
"""What is asked; see the module."""

TEXT, RECORD, CONVERSATION = FORMATS = ("text", "record", "conversation")

ROLES = ("system", "user", "assistant")

WHOLE_TEXT = "text"
"""The name by which a template has the whole of a text prompt."""

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[^\W\d][\w -]*(\.[\w -]+)*")


class PromptError(ValueError):
    """A prompt that cannot be asked; the message says why."""


class StoppedPromptError(PromptError):
    """A prompt whose chat template was not rendered within its limits, perhaps only this once."""


@dataclass(frozen=True)
class Template:
    """A text with fields; see the module.

    Attributes:
        parts: pieces of text, each with the field that follows it; None at the end.
    """

    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> set[str]:
        """The names of its fields."""
        return {name for _, name in self.parts if name is not None}

    def fill(self, values: Mapping[str, str]) -> str:
        """The text, with the values of all fields in place."""
        return "".join(text + ("" if name is None else values[name]) for text, name in self.parts)


@lru_cache(maxsize=64)
def parse_template(text: str) -> Template:
    """A template, from its text.

    Raises:
        ValueError: it has a brace that is no field's, or no field at all.
    """
    parts, literal, end = [], "", 0
    for found in _BRACES.finditer(text):
        literal += text[end : found.start()]
        end = found.end()
        if found[0] in ("{{", "}}"):
            literal += found[0][0]
        elif found[1] is not None and _FIELD.fullmatch(found[1]):
            parts.append((literal, found[1]))
            literal = ""
        else:
            raise ValueError(
                f"the template's {found[0]!r} is no field: a field is a name in braces, as in {{text}}; for "
                "braces themselves write {{ and }}."
            )
    if not parts:
        raise ValueError("the template has no field, so that all prompts would be the same: write {text}.")
    return Template((*parts, (literal + text[end:], None)))


def check_prompting(system_prompt: str | None, template: str | None, prompt_format: str) -> None:
    """Checks the options that stand around prompts against each other.

    Raises:
        ValueError: the template is wrong, or has fields that prompts of this format lack.
    """
    if system_prompt is not None and not system_prompt.strip():
        raise ValueError("system_prompt is empty: leave it out.")
    if template is None:
        if prompt_format == RECORD:
            raise ValueError(
                "prompt_format record needs a template, which says how a record's fields are asked about: "
                "for instance template='Summarize: {description}'."
            )
        return
    fields = parse_template(template).fields
    if prompt_format == CONVERSATION:
        raise ValueError("a template is for texts and records, not for conversations: leave it out.")
    if prompt_format == TEXT and fields != {WHOLE_TEXT}:
        others = ", ".join(sorted(fields - {WHOLE_TEXT}))
        raise ValueError(
            f"the template has the fields {others}, and a text has only {{text}}: use prompt_format record "
            "for messages that are JSON objects."
        )


def parse_prompt(text: str, prompt_format: str, template: str | None = None) -> Prompt:
    """A prompt, from a message's text.

    Args:
        text: the message's.
        prompt_format: `text`, `record` or `conversation`.
        template: how a record is asked about.

    Returns:
        A text; of a record the fields that the template names, as texts; or turns. Unlike JSON from anywhere,
        these have no depth and are all Unicode, so that Beam can code whatever comes.

    Raises:
        PromptError: there is no such format, or the text is not of it.
    """
    if prompt_format == TEXT:
        return text
    if prompt_format not in FORMATS:
        raise PromptError(f"there is no prompt_format {prompt_format[:40]!r}: use {', '.join(FORMATS)}")
    try:
        value = json.loads(text, **STRICT, parse_float=Number, parse_int=Number)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the message is not JSON, as a {prompt_format} must be: {error}") from error
    wanted, name = (dict, "an object") if prompt_format == RECORD else (list, "a list of turns")
    if not isinstance(value, wanted):
        raise PromptError(f"the message is JSON, but not {name}, as a {prompt_format} must be")
    request = Request(value, template=template)
    return request.turns() if prompt_format == CONVERSATION else request.values


class Request:
    """A prompt with what the options put around it.

    Args:
        prompt: what is asked.
        system_prompt: what the model is told before it.
        template: how it is asked.

    Attributes:
        text: the part that may be cut: a text itself, the longest field of a record, the last turn of a
            conversation.
        is_conversation: whether it has several turns, besides a system prompt.
        values: of a record, the fields that the template names, as texts.

    Raises:
        PromptError: it is empty, not of any kind of prompt, not Unicode, or lacks a field of the template.
    """

    def __init__(self, prompt: Prompt, system_prompt: str | None = None, template: str | None = None) -> None:
        self._system = [] if system_prompt is None else [system_prompt]
        self.is_conversation = False
        self._exchanges: list[list[dict[str, str]]] = []
        self._dropped = 0
        self._template: Template | None = None
        self.values: dict[str, str] = {}
        self._cut = WHOLE_TEXT
        if isinstance(prompt, str):
            self.text = prompt
            if template is not None:
                self._template = parse_template(template)
                if missing := sorted(self._template.fields - {WHOLE_TEXT}):
                    raise PromptError(f"the prompt is a text, without the template's field {missing[0]!r}")
        elif isinstance(prompt, Mapping):
            self._take_record(prompt, template)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
            self._take_conversation(prompt)
        else:
            raise PromptError(f"the prompt is {type(prompt).__name__}: give text, a record or a conversation")
        if not self.text.strip() and not any(value.strip() for value in self.values.values()):
            raise PromptError("the prompt is empty")
        try:
            for turn in self.turns():
                turn["content"].encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from error

    def turns(self, text: str | None = None) -> list[dict[str, str]]:
        """The turns to put to the model: a system prompt, if there is one, and those of the user and the
        assistant.

        Args:
            text: stands in the place of what may be cut.
        """
        text = self.text if text is None else text
        if self._template:
            text = self._template.fill({**self.values, self._cut: text})
        system = [{"role": "system", "content": "\n\n".join(self._system)}] if self._system else []
        earlier = [turn for exchange in self._exchanges[self._dropped :] for turn in exchange]
        return [*system, *earlier, {"role": "user", "content": text}]

    @property
    def repeats(self) -> int:
        """How often the part that may be cut stands in what is asked."""
        return sum(name == self._cut for _, name in self._template.parts) if self._template else 1

    def drop_oldest(self, until: Callable[[], bool]) -> bool:
        """Leaves out the oldest exchanges of a conversation, as few as it takes.

        Args:
            until: whether enough are left out.

        Returns:
            Whether it was enough, were it all of them.
        """

        def is_enough(dropped: int) -> bool:
            self._dropped = dropped
            return until()

        before, most = self._dropped, len(self._exchanges)
        first = before + bisect.bisect_left(range(before, most + 1), True, key=is_enough)
        self._dropped = min(first, most)
        return first <= most

    def _take_record(self, record: Mapping[str, Any], template: str | None) -> None:
        if not template:
            raise PromptError("the prompt is a record, and there is no template to ask about it with")
        self._template = parse_template(template)
        self.values = {
            name: _as_text(_field_of_message(record, name)) for name in sorted(self._template.fields)
        }
        self._cut = max(self.values, key=lambda name: len(self.values[name]))
        self.text = self.values[self._cut]

    def _take_conversation(self, turns: Sequence[Any]) -> None:
        """Checks the turns: those of the system come first, those of the user begin and end the rest."""
        kept: list[dict[str, str]] = []
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
                raise PromptError(
                    f"turn {number} of the conversation is no object with a text as its content"
                )
            if others := sorted(map(str, turn.keys() - {"role", "content"})):
                raise PromptError(
                    f"turn {number} has {others[0][:40]!r}: only role and content are understood"
                )
            role = turn.get("role")
            if role not in ROLES:
                raise PromptError(f"turn {number} has the role {str(role)[:40]!r}: use {', '.join(ROLES)}")
            if role == "system":
                if kept:
                    raise PromptError(f"turn {number} is the system's: only the first may be")
                self._system.append(turn["content"])
            else:
                kept.append({"role": role, "content": turn["content"]})
        if not kept or kept[-1]["role"] != "user":
            raise PromptError("the conversation does not end with a turn of the user, to be answered")
        if kept[0]["role"] != "user":
            raise PromptError("the conversation does not begin with a turn of the user")
        self.text, self.is_conversation = kept[-1]["content"], len(kept) > 1
        for turn in kept[:-1]:
            if turn["role"] == "user":
                self._exchanges.append([])
            self._exchanges[-1].append(turn)


def find_field(record: Any, name: str) -> Any:
    """A field's value: of that very name, or step by step where the name has dots.

    Raises:
        KeyError: there is no such field.
    """
    if isinstance(record, Mapping) and name in record:
        return record[name]
    value = record
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value


def _field_of_message(record: Mapping[str, Any], name: str) -> Any:
    try:
        return find_field(record, name)
    except KeyError:
        raise PromptError(f"the message has no field {name!r}, which the template names") from None


class Number(str):
    """A number of a JSON text, as it is written there: every digit of it."""


def json_text(value: Any) -> str:
    """A value as JSON, with its numbers as they were written.

    Raises:
        TypeError, ValueError: JSON has no such value.
        RecursionError: it is nested too deeply.
    """
    if isinstance(value, Number):
        return str(value)
    if written := getattr(value, "written", None):
        return written
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)}: {json_text(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _key(name: Any) -> str:
    return json.dumps(name if isinstance(name, str) else json.dumps(name), ensure_ascii=False)


def _as_text(value: Any) -> str:
    """A text as it is, and anything else as JSON writes it."""
    if isinstance(value, str):
        return str(value)
    try:
        return json_text(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"a field's value cannot be written as text: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [name, _], *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the name {name[:40]!r} twice")
    return found


STRICT: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _object}
"""For json's functions: Python would take NaN and infinities, and of a name that is there twice the last."""
