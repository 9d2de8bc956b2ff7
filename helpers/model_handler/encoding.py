"""Prompts to token ids: with the instruction and the chat template around them, within the limits of the
model and the options."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

from helpers.model_handler.chat_template import ChatTemplate, TemplateError, TemplateStoppedError
from helpers.model_handler.prompts import (
    CONVERSATION,
    RECORD,
    Prompt,
    PromptError,
    Request,
    StoppedPromptError,
    parse_template,
)
from helpers.model_handler.reasoning import Marks
from helpers.models.architecture import positions_of
from helpers.models.error_text import first_line
from helpers.models.model_error import ModelError
from helpers.sizing.sizes import PROMPT_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from helpers.model_handler.options import AnsweringOptions

log = logging.getLogger(__name__)

# A tokenizer without a limit reports a number larger than this.
NO_LIMIT = 10**6


# Room for a chat template's own text.
SPARE_CHARACTERS = 2**16


MOST_GROWTH = 1000
"""How many times longer the steps of a tokenizer may make a text: far more than spaces and accents need."""


Content = str | list[dict[str, str]]
"""What a turn says, as a chat template takes it: a text, or a list of parts."""

LEAST_PREFIX_TOKENS = 8
"""The fewest tokens at the beginning of all prompts whose computing is worth sparing."""

NOTICED = "Zx9"
"""A system prompt that no template says by itself."""

DIFFERENT_PROMPTS = ("Why?", "7 of them", "é", " x", "\n-")
"""Prompts that begin differently, in every way that a template may look at."""


class Encoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: the model's.
        config: the model's.
        is_encoder_decoder: whether an encoder reads the prompt.

    Raises:
        ModelError: the tokenizer may make texts so much longer that they fill the memory.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, is_encoder_decoder: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._is_encoder_decoder = is_encoder_decoder
        _check_growth(tokenizer)
        self._template = self._chat_template()
        self._prefixes: dict[tuple, list[int]] = {}

    def _chat_template(self) -> ChatTemplate | None:
        from transformers import PreTrainedTokenizerBase

        if not self.has_template:
            return None
        # Some tokenizers have a way of their own, and no template that a checkpoint could bring along.
        is_usual = type(self._tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        return ChatTemplate(self._tokenizer) if is_usual else None

    @property
    def has_template(self) -> bool:
        """Whether prompts are put into a chat template."""
        return bool(self._tokenizer.chat_template)

    @cached_property
    def _longest_token(self) -> int:
        """How many characters a token stands for at most: it is written with a sign for each, or for each
        byte."""
        return max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def encode(self, prompt: Prompt, options: AnsweringOptions) -> list[int]:
        """A prompt's token ids, with the chat template around it where the model has one. Without one, the
        system prompt stands before the prompt.

        Raises:
            PromptError: the prompt is empty, of no kind that can be asked, or longer than allowed.
        """
        request = _request(prompt, options)
        if request.is_conversation and not self.has_template:
            raise PromptError("the model has no chat template: it answers single prompts, no conversations")
        limit, most = self.limit(options), self._most(options)
        # Tokenizing takes seconds a megabyte, while other prompts wait: text that cannot fit is not
        # tokenized.
        characters = most * self._longest_token

        def is_far_too_long() -> bool:
            turns = request.turns()
            return len(turns) > most + 2 or _characters(turns) > characters

        if is_far_too_long():
            if not options.truncate:
                size = _characters(request.turns())
                raise PromptError(
                    f"the prompt has {size:,} characters, too many by far: the limit is {most} tokens"
                )
            if not request.drop_oldest(until=lambda: not is_far_too_long()):
                request.text = request.text[: characters // request.repeats]
            if _characters(request.turns("")) > characters:
                raise PromptError(f"the limit of {most} tokens leaves no room beside what is not cut")
        ids = self._tokenize(request.turns(), most)
        if not ids or not (self.has_template or any(self._are_of_text(ids))):
            raise PromptError("the prompt is empty: the tokenizer makes no token of it")
        limit = most if options.truncate else limit
        if limit is None or len(ids) <= limit:
            return ids
        if not options.truncate:
            raise PromptError(f"the prompt has {len(ids)} tokens, but the limit is {limit}")
        if request.drop_oldest(until=lambda: len(self._tokenize(request.turns(), most)) <= limit):
            return self._tokenize(request.turns(), most)
        # Only the prompt's own text is cut: what surrounds it (templates, end token) must stay whole.
        room = (limit - len(self._tokenize(request.turns(""), most))) // request.repeats
        if room < 1:
            raise PromptError(
                f"the limit of {limit} tokens leaves no room beside the instruction and the chat template"
            )
        with panics_as_errors():
            plain = self._tokenizer(request.text, add_special_tokens=False, verbose=False)["input_ids"]
        while room > 0:
            # The last token may be the first bytes of a character.
            text = self._tokenizer.decode(plain[:room])
            text = text if request.text.startswith(text) else text.rstrip("\N{REPLACEMENT CHARACTER}")
            ids = self._tokenize(request.turns(text), most)
            if len(ids) <= limit:
                return ids
            # Text cut in the middle of a word may have more tokens than before.
            room -= max(1, (len(ids) - limit) // request.repeats)
        raise PromptError(f"the prompt cannot be cut to {limit} tokens")

    def _are_of_text(self, ids: list[int]) -> Iterator[bool]:
        special = set(self._tokenizer.all_special_ids)
        return (token not in special or token == self._tokenizer.unk_token_id for token in ids)

    def encode_again(self, prompt: Prompt, options: AnsweringOptions, answer: str, wish: str) -> list[int]:
        """The token ids of a prompt whose answer was not good enough, with that answer and a further wish.

        Raises:
            PromptError: all of that is longer than allowed; nothing is cut.
        """
        most = self._most(options)
        turns = _request(prompt, options).turns()
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": wish}]
        if _characters(turns) > most * self._longest_token:
            raise PromptError("with its first answer, the prompt is too long to be asked again")
        ids = self._tokenize(turns, most)
        if len(ids) > most:
            raise PromptError("with its first answer, the prompt is too long to be asked again")
        return ids

    def check(self, options: AnsweringOptions) -> None:
        """Checks that what the options put around prompts leaves room for them, and can be put there.

        Raises:
            PromptError: it leaves no room, the chat template fails, or there is none, and prompts are
                conversations.
        """
        if options.prompt_format == CONVERSATION and not self.has_template:
            raise PromptError(
                "the model has no chat template: it answers texts and records, no conversations"
            )
        if self.has_template:
            with suppress(StoppedPromptError):
                self._content_of("?")  # a template that cannot be used is told before there is a prompt
        if options.system_prompt is None and options.template is None:
            return
        text = self._sample("?", options)
        most = self._most(options)
        turns = _request(text, options).turns()
        if _characters(turns) > most * self._longest_token or len(self._tokenize(turns, most)) > most:
            raise PromptError(
                "the system prompt and the template leave no room for a prompt, which may have "
                f"{most} tokens in all: shorten them, or raise max_prompt_tokens or max_batch_tokens"
            )

    def prefix_tokens(self, prompts: Sequence[list[int]], options: AnsweringOptions) -> int:
        """How many tokens all these prompts begin with that later ones will begin with too: what stands
        before the user's text in the chat template, the system prompt included. 0 where that is too little to
        be worth keeping."""
        prefix = self._prefix(options)
        if len(prefix) < LEAST_PREFIX_TOKENS or any(ids[: len(prefix)] != prefix for ids in prompts):
            return 0
        return len(prefix) if all(len(ids) > len(prefix) for ids in prompts) else 0

    def _prefix(self, options: AnsweringOptions) -> list[int]:
        """What prompts of every kind have in common at their beginning."""
        if not self.has_template or self._is_encoder_decoder:
            return []
        around = options.system_prompt, options.template, options.prompt_format
        if around not in self._prefixes:
            requests = (_request(self._sample(text, options), options) for text in DIFFERENT_PROMPTS)
            try:
                encoded = [self._tokenize(request.turns(), SPARE_CHARACTERS) for request in requests]
            except Exception:  # such a template's own prompts tell why, one by one
                encoded = [[]]
            self._prefixes[around] = os.path.commonprefix(encoded)  # noqa: RUF071 - of lists, not of paths
        return self._prefixes[around]

    def _sample(self, text: str, options: AnsweringOptions) -> Prompt:
        """A prompt that the options' template takes, which says a text."""
        if options.prompt_format == RECORD and options.template:
            return dict.fromkeys(parse_template(options.template).fields, text)
        return text

    def _most(self, options: AnsweringOptions) -> int:
        """The most tokens in a prompt that has to share a batch's tokens with its response."""
        room = options.max_batch_tokens - options.max_response_tokens
        return min(self.limit(options) or room, room)

    def limit(self, options: AnsweringOptions) -> int | None:
        """The most tokens in a prompt, as asked for and as the model allows; None if unbounded.

        The memory of an encoder grows with the square of a prompt's length. For one that has no positions of
        its own (T5), the limit is what is asked for, or what the tokenizer names, 512 for flan-t5, or else
        the length whose square is that of a full batch of prompts, as machines are sized for.
        """
        positions = positions_of(self._config)
        if not self._is_encoder_decoder:
            limits = [options.max_prompt_tokens]
            limits.append(max(1, positions - options.max_response_tokens) if positions else None)
        else:
            named = self._tokenizer.model_max_length
            limits = [options.max_prompt_tokens or (named if named < NO_LIMIT else None), positions]
            if not any(limits):
                limits.append(int(PROMPT_TOKENS * math.sqrt(options.workload()["batch_size"])))
        return min((limit for limit in limits if limit), default=None)

    def _tokenize(self, turns: list[dict[str, str]], most: int) -> list[int]:
        """The token ids of a conversation, with what surrounds it; text that is sure to have more than twice
        `most` of them is not made."""
        with panics_as_errors():
            if not self.has_template:
                return self._tokenizer(_as_one_text(turns), verbose=False)["input_ids"]
            if turns[0]["role"] == "system" and not self._takes_system_prompts:
                turns = _told_by_user(turns)
            turns = [turn | {"content": self._content_of(turn["content"])} for turn in turns]
            if self._template:
                text = self._render(turns, 2 * most * self._longest_token + SPARE_CHARACTERS)
                return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]

    def opens(self, marks: Marks) -> bool:
        """Whether the chat template ends prompts amid the model's thinking. What users write is not looked
        at."""
        begin, end = (self._tail.rfind(mark) for mark in marks)
        return begin > end

    @cached_property
    def _tail(self) -> str:
        """What the chat template puts after every prompt."""
        if not self._template:
            return ""
        turns = ([{"role": "user", "content": self._content_of(text)}] for text in DIFFERENT_PROMPTS)
        texts = [self._render(one, SPARE_CHARACTERS)[::-1] for one in turns]
        return os.path.commonprefix(texts)[::-1]  # noqa: RUF071 - of texts, not of paths

    def _content_of(self, text: str) -> Content:
        """A turn's text as the chat template takes it."""
        return [{"type": "text", "text": text}] if self._takes_parts else text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template says only the parts of a content, and leaves out a content that is a
        text.

        Raises:
            PromptError: it leaves out what the user says in either form; or there was no time, or no memory,
                to find it out.
        """
        fails = False
        for content in (NOTICED, [{"type": "text", "text": NOTICED}]):
            try:
                said = self._said([{"role": "user", "content": content}])
            except TemplateStoppedError as error:
                raise StoppedPromptError(str(error)) from error
            except Exception:  # whatever a template raises
                fails = True
                continue
            if NOTICED in said:
                return not isinstance(content, str)
        if fails:  # the prompts tell why, one by one
            return False
        raise PromptError("the chat template leaves out what the user says: do not use this checkpoint")

    def _said(self, turns: list[dict]) -> str:
        if self._template:
            return self._template.render(turns, SPARE_CHARACTERS)
        return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def _render(self, turns: list[dict[str, Content]], most_characters: int) -> str:
        try:
            return self._template.render(turns, most_characters)
        except TemplateError as error:
            kind = StoppedPromptError if isinstance(error, TemplateStoppedError) else PromptError
            raise kind(str(error)) from error

    @cached_property
    def _takes_system_prompts(self) -> bool:
        """Whether the chat template says a system prompt. Some refuse it, and some leave it out.

        Raises:
            PromptError: there was no time, or no memory, to find it out; the next prompt tries again.
        """
        turns = [
            {"role": role, "content": self._content_of(text)}
            for role, text in (("system", NOTICED), ("user", "?"))
        ]
        try:
            said = self._said(turns)
        except TemplateStoppedError as error:
            raise StoppedPromptError(str(error)) from error
        except Exception:  # whatever a template raises
            said = ""
        takes = NOTICED in said
        if not takes:
            log.info("The chat template takes no system prompt: it is put before the user's first turn.")
        return takes


def _request(prompt: Prompt, options: AnsweringOptions) -> Request:
    return Request(prompt, options.system_prompt, options.template)


def _characters(turns: list[dict[str, str]]) -> int:
    return sum(len(turn["content"]) for turn in turns)


def _as_one_text(turns: list[dict[str, str]]) -> str:
    """For a model that knows no turns: all that is said, one paragraph after the other."""
    return "\n\n".join(turn["content"] for turn in turns)


def _told_by_user(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system prompt in front of what the user says first."""
    system, first, *rest = turns
    return [{"role": "user", "content": _as_one_text([system, first])}, *rest]


def _check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in (getattr(backend, "normalizer", None), getattr(backend, "decoder", None)):
        if part is not None and _growth(json.loads(part.__getstate__())) > MOST_GROWTH:
            raise ModelError(
                "the tokenizer's replacements may make a text over "
                f"{MOST_GROWTH:,} times as long, and fill the memory: do not use this checkpoint"
            )


def _growth(part: dict) -> float:
    """How many times longer a step of a tokenizer may make a text."""
    steps = part.get("normalizers") or part.get("decoders")
    if steps:
        return math.prod(_growth(step) for step in steps)
    if part.get("type") != "Replace":
        return 1
    content, pattern = len(part["content"]), part["pattern"]
    if "String" in pattern:
        return max(1, (content + 1) / max(1, len(pattern["String"])))
    return content + 1  # a regular expression may match between any two characters


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic of the tokenizers' library, which no `except Exception` catches, into an error.

    Raises:
        PromptError: the library has panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise PromptError(f"the tokenizer fails: {first_line(error)}") from error
