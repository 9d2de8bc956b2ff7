"""Whether a state dict answers as it should, before it takes another's place: prompts with expected answers.

A case is a prompt and what its answer must be, as a JSON object: `prompt`, which is a text, a record (an
object) or a conversation (a list of turns), and one or more of

* `exact`: the answer, but for space around it;
* `contains`: a text in it, in capitals or not;
* `pattern`: a regular expression that is found in it;
* `field`: of an answer that is or holds JSON, values by name, with dots for a field in a field. A field that
  is absent is null.

A file of cases has one on each line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.files import storage
from helpers.load_state_dict import read_manifest
from helpers.model_handler import AnsweringOptions, Failure, Response
from helpers.model_handler.answer_schema import InvalidAnswerError, answer_schema
from helpers.model_handler.handler import engine_for
from helpers.model_handler.options import answering_options, takes_options
from helpers.model_handler.prompts import Prompt, find_field
from helpers.model_handler.served_model import ModelSource

TICKETS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("tickets.json").read_text())
"""Twelve support tickets of a bicycle shop, as cases: records, each with the kind that a person gives it."""

CHECKS = ("exact", "contains", "pattern", "field")


class CaseError(ValueError):
    """A case that cannot be judged; the message says which, and why."""


@dataclass(frozen=True)
class Outcome:
    """One case, answered.

    Attributes:
        prompt: what was asked.
        answer: the response's text, or the reason why there is none.
        wrong: what is wrong with it; empty if it is right.
        before: the answer of the state dict that this one was compared with; None without one.
        was_right: whether that one was right; None without one.
    """

    prompt: Prompt
    answer: str
    wrong: str
    before: str | None = None
    was_right: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """A state dict's answers to all cases.

    Attributes:
        state_dict_path: `.../NAME.pt`.
        model_name: the model that it was made from.
        outcomes: in the order of the cases.
    """

    state_dict_path: str
    model_name: str
    outcomes: list[Outcome]

    @property
    def right(self) -> float:
        """The share of cases whose answers are right, 0 to 1."""
        return sum(not one.wrong for one in self.outcomes) / len(self.outcomes)

    @property
    def changed(self) -> list[Outcome]:
        """Those whose answers differ from the other state dict's."""
        return [one for one in self.outcomes if one.before is not None and one.before != one.answer]

    @property
    def lost(self) -> list[Outcome]:
        """Those that the other state dict got right, and this one does not."""
        return [one for one in self.outcomes if one.was_right and one.wrong]

    @property
    def gained(self) -> list[Outcome]:
        """Those that the other state dict got wrong, and this one does not."""
        return [one for one in self.outcomes if one.was_right is False and not one.wrong]


@takes_options
def evaluate(
    state_dict_path: str,
    cases: str | Path | Sequence[Mapping[str, Any]],
    *,
    against: str | None = None,
    **options: Any,
) -> Evaluation:
    """Asks a state dict the prompts of all cases, and judges its answers.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        cases: see the module; a file of them, local or `gs://`, or the cases themselves.
        against: the state dict that serves now, to compare with. One model is in memory at a time.
        {options}

    Raises:
        CaseError: there are no cases, or one cannot be judged.
        TypeError, ValueError: there is no such option, or it is out of its range.
        LoadError, ModelError: a state dict is damaged, or its model is of no use here.
        FileNotFoundError, PermissionError, StorageError: a state dict, or the file, cannot be read.
    """
    chosen = answering_options(options)
    checked = _read_cases(cases)
    for path in filter(None, (against, state_dict_path)):  # before either of them is asked for minutes
        read_manifest(path)
    before = None if against is None else _outcomes(against, checked, chosen)
    outcomes = _outcomes(state_dict_path, checked, chosen)
    if before is not None:
        outcomes = [
            replace(now, before=then.answer, was_right=not then.wrong)
            for now, then in zip(outcomes, before, strict=True)
        ]
    return Evaluation(state_dict_path, read_manifest(state_dict_path).model_name, outcomes)


def _outcomes(path: str, cases: list[Mapping[str, Any]], options: AnsweringOptions) -> list[Outcome]:
    source = ModelSource(
        path,
        device=options.device,
        dtype=options.dtype,
        cache_dir=options.cache_dir,
        engine=engine_for(options),
    )
    model, _ = source.load()
    model.check(options)
    answers = model.ask([case["prompt"] for case in cases], options)
    return [
        Outcome(
            case["prompt"],
            answer.text if isinstance(answer, Response) else answer.error,
            _wrong(case, answer),
        )
        for case, answer in zip(cases, answers, strict=True)
    ]


def _read_cases(cases: str | Path | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(cases, str | Path):
        found, where = [], f"line {{}} of {cases}"
        try:
            text = storage.read_bytes(cases).decode()
        except UnicodeDecodeError as error:
            raise CaseError(f"{cases} is not UTF-8: {error}") from error
        # Not splitlines(): JSON may hold other signs that end lines.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise CaseError(f"{where.format(number)} is not JSON: {error}") from error
    else:
        found, where = list(enumerate(cases, 1)), "case {}"
    if not found:
        raise CaseError("there are no cases: give at least one prompt with what its answer must be.")
    for number, case in found:
        if reason := _why_not(case):
            raise CaseError(f"{where.format(number)} {reason}")
    return [case for _, case in found]


def _why_not(case: Any) -> str:
    """Why a case cannot be judged; empty if it can."""
    if not isinstance(case, Mapping) or "prompt" not in case:
        return "is no object with a prompt."
    if not isinstance(case["prompt"], str | Mapping | list):
        return "has a prompt that is no text, record or conversation."
    if unknown := sorted(map(str, case.keys() - {"prompt", *CHECKS})):
        return f"has {unknown[0]!r}: there are prompt, {', '.join(CHECKS)}."
    if not case.keys() & set(CHECKS):
        return f"does not say what its answer must be: give one of {', '.join(CHECKS)}."
    for name in ("exact", "contains", "pattern"):
        if not isinstance(case.get(name, ""), str):
            return f"has a value for {name} that is no text."
    if not isinstance(case.get("field", {}), Mapping):
        return "has a value for field that is no object of names and values."
    try:
        re.compile(case.get("pattern", ""))
    except re.error as error:
        return f"has a pattern that is no regular expression: {error}."
    return ""


def _wrong(case: Mapping[str, Any], answer: Response | Failure) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if isinstance(answer, Failure):
        return "no answer"
    text = answer.text
    if "exact" in case and text.strip() != case["exact"].strip():
        return f"not exactly {case['exact']!r}"
    if "contains" in case and case["contains"].casefold() not in text.casefold():
        return f"without {case['contains']!r}"
    if "pattern" in case and not re.search(case["pattern"], text):
        return f"without the pattern {case['pattern']!r}"
    if "field" in case:
        try:
            value = json.loads(answer_schema("{}").read(text))
        except InvalidAnswerError as error:
            return str(error)
        for name, wanted in case["field"].items():
            try:
                found = find_field(value, name)
            except KeyError:
                found = None
            # As JSON, so that true is not 1.
            if json.dumps(found, sort_keys=True) != json.dumps(wanted, sort_keys=True):
                return f"{name} is {found!r}, not {wanted!r}"
    return ""
