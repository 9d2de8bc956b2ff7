"""How prompts are answered: each option once, with its type, default, range and explanation.

From `AnsweringOptions` come the keyword arguments of `LanguageModelHandler`, `AskModel` and
`helpers.dataflow.submit`, the arguments of the command lines, and the workload that machines are sized for.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from helpers.files.storage import read_bytes
from helpers.model_handler.answer_schema import answer_schema
from helpers.model_handler.prompts import FORMATS, TEXT, check_prompting
from helpers.model_handler.reasoning import parse_marks
from helpers.sizing.sizes import COMPUTE_BYTES, ENGINES, PROMPT_TOKENS, RESPONSE_TOKENS

Decorated = TypeVar("Decorated", bound=Callable)


@dataclass(frozen=True)
class Range:
    """The values that an option takes.

    Attributes:
        at_least, at_most: bounds that are values themselves; None for no bound.
        above: a bound that is not.
    """

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        bounds = []
        if self.at_least is not None:
            bounds.append(f"{self.at_least:g} or more")
        if self.above is not None:
            bounds.append(f"above {self.above:g}")
        if self.at_most is not None:
            bounds.append(f"at most {self.at_most:g}")
        return " and ".join(bounds)


ANSWER_FORMATS = ("text", "record")

LEAST_TEMPERATURE = 1e-5
"""Dividing by less could overflow, and would leave the most probable token alone anyway."""

COUNT = Range(at_least=1)
SECONDS = Range(above=0)


def option(
    default: Any,
    explanation: str,
    *,
    metavar: str | None = None,
    within: Range | None = None,
    choices: tuple[str, ...] = (),
    pattern: str = "",
    is_path: bool = False,
) -> Any:
    """A field of `AnsweringOptions`.

    Args:
        default: its value unless another is given; None leaves the choice to the model or the machine.
        explanation: what it does, in a sentence or two: for docstrings and command lines.
        metavar: stands for its value in the command line's help.
        within: the numbers that it takes.
        choices: the texts that it takes.
        pattern: a regular expression for those that it takes, in any case.
        is_path: whether it may be a path.
    """
    return field(
        default=default,
        metadata={
            "explanation": explanation,
            "metavar": metavar,
            "within": within,
            "choices": choices,
            "pattern": pattern,
            "is_path": is_path,
        },
    )


@dataclass(frozen=True, kw_only=True)
class AnsweringOptions:
    """How prompts are answered. The defaults are greedy: the same batch gives the same responses.

    Raises:
        ValueError: a value is out of its range.
    """

    system_prompt: str | None = option(
        None,
        "What the model is told before every prompt, such as its task. If the model's template has no place "
        "for it, it is put before the prompt itself.",
        metavar="TEXT",
    )
    template: str | None = option(
        None,
        "What is asked: a text in which {text} stands for the prompt, or {NAME} for a field of a record.",
        metavar="TEXT",
    )
    prompt_format: str = option(
        TEXT,
        "What the data of a message is: text, a record (a JSON object, for the template), or a conversation "
        "(a JSON list of turns with role and content). A message's attribute prompt_format overrides it.",
        choices=FORMATS,
    )
    answer_format: str = option(
        "text",
        "What the data of a response is: the answer's text, or a record, which is JSON of the answer, the "
        "tokens and whatever else is known, for BigQuery for instance.",
        choices=ANSWER_FORMATS,
    )
    answer_schema: str | None = option(
        None,
        "A JSON Schema, or the file that has it: answers that are not JSON of this form fail. Its formats, "
        "such as date, are not checked.",
        metavar="SCHEMA",
        is_path=True,
    )
    ask_again: bool = option(
        False,
        "Ask once more for an answer that does not fit answer_schema, if with that answer the prompt is not "
        "too long.",
    )
    keep_reasoning: bool = option(
        False,
        "Leave in the answer what a reasoning model thinks before it. By default the answer is what follows.",
    )
    reasoning_marks: str | None = option(
        None,
        "What a reasoning model's thinking begins and ends with: two texts with a space between them, or "
        "none for a model that does not think. By default those that its chat template or its tokenizer "
        "names.",
        metavar="MARKS",
    )
    max_response_tokens: int = option(
        RESPONSE_TOKENS,
        "The most tokens in a response, what a reasoning model thinks included; the model may end it sooner.",
        metavar="N",
        within=COUNT,
    )
    max_prompt_tokens: int | None = option(
        None,
        "Longer prompts fail, or are cut if truncate is set. By default the model's own limit.",
        metavar="N",
        within=COUNT,
    )
    max_response_seconds: float | None = option(
        None,
        "The longest that responses which are computed together may take to generate; those not complete by "
        "then fail. By default as long as it takes.",
        metavar="S",
        within=SECONDS,
    )
    truncate: bool = option(False, "Cut prompts that are too long, rather than fail them.")
    temperature: float = option(
        0.0,
        f"Above 0 the responses are sampled; 0, or less than {LEAST_TEMPERATURE:g}, is greedy and "
        "repeatable.",
        metavar="T",
        within=Range(at_least=0),
    )
    top_p: float = option(
        1.0,
        "When sampling, choose from the most probable tokens that together have this probability.",
        metavar="P",
        within=Range(above=0, at_most=1),
    )
    seed: int | None = option(
        None,
        "Makes the sampling of the same batch repeatable; in a stream, batches differ.",
        metavar="N",
        within=Range(at_least=0, at_most=2**64 - 1),
    )
    device: str | None = option(
        None,
        "Where to compute: cpu or cuda. By default a GPU if there is one.",
        pattern=r"|auto|cpu|(cuda|mps|xpu)(:\d+)?",
    )
    engine: str | None = option(
        None,
        "What computes: torch, for every model; torch_packed, the same with weights that a CPU multiplies by "
        "faster, of which each process has a copy; or ctranslate2, for some models. By default the faster "
        "one of torch and ctranslate2, as measured on machines of this kind, where it is installed and "
        "takes the model.",
        choices=("auto", *ENGINES),
    )
    dtype: str | None = option(
        None,
        "What to compute in. By default what the device is fast in. With int8, which only ctranslate2 "
        "computes in, weights are rounded to 8-bit integers: smaller and faster, with other answers.",
        choices=("auto", *COMPUTE_BYTES),
    )
    max_batch_size: int = option(32, "How many prompts the model answers at once.", metavar="N", within=COUNT)
    max_batch_tokens: int = option(
        32_768,
        "The most tokens in a batch, padding and responses included; bounds its memory.",
        metavar="N",
        within=COUNT,
    )
    torch_threads: int | None = option(
        None,
        "The threads that compute in this process. By default one for each core.",
        metavar="N",
        within=COUNT,
    )
    recompute: bool = option(
        False,
        "Compute again what prompts repeat. By default the beginning that all of them share, as of a chat "
        "template, is computed once, and so are prompts of a batch that are equal, unless they are sampled.",
    )
    reload_seconds: float | None = option(
        None,
        "How often to look for a new state dict, of the same model, at the same path; the old one answers "
        "until the new one is ready. By default only when Beam sets up a DoFn.",
        metavar="S",
        within=SECONDS,
    )
    cache_dir: str | None = option(
        None, "The folder that state dicts are copied to on a worker.", metavar="FOLDER", is_path=True
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            _check(one, getattr(self, one.name))
        check_prompting(self.system_prompt, self.template, self.prompt_format)
        self._read_schema()
        if self.reasoning_marks is not None:
            parse_marks(self.reasoning_marks)
        if self.keep_reasoning and self.answer_schema is not None:
            raise ValueError("keep_reasoning and answer_schema exclude each other: the answer is JSON alone.")
        if self.engine not in (None, "auto") and self.dtype not in (None, "auto", *ENGINES[self.engine]):
            raise ValueError(
                f"engine {self.engine} does not compute in {self.dtype}: leave the engine out, or the dtype."
            )
        if self.engine == "torch_packed" and self.device not in (None, "", "auto", "cpu"):
            raise ValueError(
                f"engine torch_packed computes on CPUs only: leave it out, or device {self.device}."
            )
        is_ctranslate2 = self.engine == "ctranslate2" or self.dtype == "int8"
        if is_ctranslate2 and self.is_sampled and self.seed is not None:
            raise ValueError(
                "ctranslate2, which int8 needs, cannot repeat what it has sampled: leave the seed out, or "
                "the engine and int8."
            )
        if self.max_response_tokens >= self.max_batch_tokens:
            raise ValueError(
                f"max_response_tokens is {self.max_response_tokens}, and a batch may have "
                f"{self.max_batch_tokens} tokens, prompts included: ask for shorter responses, or raise "
                "max_batch_tokens."
            )

    def _read_schema(self) -> None:
        """Puts the schema itself in the place of its file's name, and checks it."""
        if self.answer_schema is None:
            if self.ask_again:
                raise ValueError("ask_again needs an answer_schema, which says what answers must be.")
            return
        text = str(self.answer_schema)
        if not text.lstrip().startswith("{"):
            try:
                text = read_bytes(text).decode()
            except (OSError, UnicodeDecodeError, ValueError) as error:
                raise ValueError(f"answer_schema is no JSON object, and no file of one: {error}") from error
            object.__setattr__(self, "answer_schema", text)
        answer_schema(text)

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are sampled, rather than the most probable ones taken."""
        return self.temperature >= LEAST_TEMPERATURE

    def workload(self) -> dict[str, int]:
        """The largest batch that a machine needs memory for, as `helpers.sizing.size_model` takes it."""
        largest = self.max_batch_tokens // (PROMPT_TOKENS + self.max_response_tokens)
        return {
            "batch_size": max(1, min(self.max_batch_size, largest)),
            "prompt_tokens": PROMPT_TOKENS,
            "response_tokens": self.max_response_tokens,
        }


NAMES = tuple(one.name for one in fields(AnsweringOptions))
"""The names of all answering options."""

_BY_NAME = {one.name: one for one in fields(AnsweringOptions)}


def answering_options(values: Mapping[str, Any]) -> AnsweringOptions:
    """The options of these names and values.

    Raises:
        TypeError: there is no such option; the message names the one that may be meant.
        ValueError: as `AnsweringOptions`.
    """
    for name in values:
        if name not in _BY_NAME:
            close = difflib.get_close_matches(name, NAMES, 1)
            raise TypeError(
                f"there is no option {name}={values[name]!r}: "
                + (f"do you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}.")
            )
    return AnsweringOptions(**values)


def options_among(arguments: Mapping[str, Any]) -> AnsweringOptions:
    """The options that are among other arguments, such as those of `helpers.pipeline.build`.

    Raises:
        ValueError: as `AnsweringOptions`.
    """
    return AnsweringOptions(**{name: arguments[name] for name in NAMES if name in arguments})


def add_arguments(parser: argparse._ActionsContainer, names: Iterable[str] = NAMES) -> None:
    """Adds answering options to a command line: `max_batch_size` as `--max-batch-size`.

    The defaults are not added: what is not on the command line is not in what argparse returns, if the parser
    has `argument_default=argparse.SUPPRESS`.
    """
    for name in names:
        one = _BY_NAME[name]
        # argparse formats help with %, which no explanation may hold.
        settings: dict[str, Any] = {"help": _command_line_help(one).replace("%", "%%")}
        if one.type == "bool":
            settings["action"] = "store_true"
        else:
            settings |= {"type": functools.partial(_parse, one), "metavar": one.metadata["metavar"]}
            if one.metadata["choices"]:
                settings["metavar"] = "{" + ",".join(one.metadata["choices"]) + "}"
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)


def takes_options(decorated: Decorated) -> Decorated:
    """Gives a function or class that takes `**options` the answering options' signature and documentation.

    Its docstring has a line `{options}` where their explanations belong.
    """
    function = decorated.__init__ if inspect.isclass(decorated) else decorated
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in fields(AnsweringOptions)
        if one.name not in signature.parameters
    ]
    if inspect.isclass(decorated):
        own = own[1:]  # self
        decorated.__signature__ = inspect.Signature(own + options)
    else:
        decorated.__signature__ = signature.replace(parameters=own + options)
    decorated.__doc__ = _with_explanations(decorated.__doc__ or "")
    return decorated


def _with_explanations(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if line.strip() != "{options}":
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for one in fields(AnsweringOptions):
            lines += textwrap.wrap(
                f"{one.name}: {_explained(one)}",
                width=110,
                initial_indent=indent,
                subsequent_indent=f"{indent}    ",
            )
    return "\n".join(lines)


def _explained(one: Field) -> str:
    default = "" if one.default is None else f" Default: {one.default}."
    return f"{one.metadata['explanation']}{default}"


def _command_line_help(one: Field) -> str:
    return _explained(one) if one.type != "bool" else one.metadata["explanation"]


def _parse(one: Field, text: str) -> Any:
    """The value of an option on the command line."""
    kind = {"int": int, "float": float, "str": str}[one.type.split(" ")[0]]
    try:
        value = kind(text)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind.__name__]
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    try:
        _check(one, value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _check(one: Field, value: Any) -> None:
    """Raises a ValueError for a value that an option does not take."""
    if value is None and one.default is None:
        return
    kind = one.type.split(" ")[0]
    is_right = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "str": isinstance(value, (str | os.PathLike) if one.metadata["is_path"] else str),
    }[kind]
    within, choices = one.metadata["within"], one.metadata["choices"]
    if not is_right:
        wanted = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text"}[kind]
        raise ValueError(f"{one.name} is {value!r}: it must be {wanted}.")
    if within is not None and value not in within:
        raise ValueError(f"{one.name} is {value!r}: it must be {within}.")
    pattern = one.metadata["pattern"]
    if pattern and not re.fullmatch(pattern, value, re.IGNORECASE):
        raise ValueError(f"{one.name} is {value!r}: it must be auto, cpu, cuda or one of several, as cuda:1.")
    if choices and value not in choices:
        raise ValueError(f"{one.name} is {value!r}: it must be one of {', '.join(choices)}.")
