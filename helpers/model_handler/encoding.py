"""Prompts to token ids: with the chat template around them, within the limits of the model and the
options."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from helpers.model_handler.chat_template import ChatTemplate, TemplateError
from helpers.models.architecture import positions_of
from helpers.models.error_text import first_line
from helpers.models.model_error import ModelError
from helpers.sizing.sizes import PROMPT_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from helpers.model_handler.options import AnsweringOptions

# A tokenizer without a limit reports a number larger than this.
NO_LIMIT = 10**6


# Room for a chat template's own text.
SPARE_CHARACTERS = 2**16


MOST_GROWTH = 1000
"""How many times longer the steps of a tokenizer may make a text: far more than spaces and accents need."""


LEAST_PREFIX_TOKENS = 8
"""The fewest tokens at the beginning of all prompts whose computing is worth sparing."""

DIFFERENT_PROMPTS = ("Why?", "7 of them", "é", " x", "\n-")
"""Prompts that begin differently, in every way that a template may look at."""


class PromptError(ValueError):
    """A prompt that cannot be asked."""


class Encoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: the model's.
        config: the model's.
        is_encoder_decoder: whether an encoder reads the prompt; only causal models use a chat template.

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

    def _chat_template(self) -> ChatTemplate | None:
        from transformers import PreTrainedTokenizerBase

        if not self._has_template:
            return None
        # Some tokenizers have a way of their own, and no template that a checkpoint could bring along.
        is_usual = type(self._tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        return ChatTemplate(self._tokenizer) if is_usual else None

    @property
    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template) and not self._is_encoder_decoder

    @cached_property
    def _longest_token(self) -> int:
        """How many characters a token stands for at most: it is written with a sign for each, or for each
        byte."""
        return max((len(token) for token in self._tokenizer.get_vocab()), default=1)

    def encode(self, prompt: str, options: AnsweringOptions) -> list[int]:
        """A prompt's token ids, with the chat template around it where the model has one.

        Raises:
            PromptError: the prompt is empty, is not text, or is longer than allowed.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is {type(prompt).__name__}, not text")
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from error
        limit, room = self.limit(options), options.max_batch_tokens - options.max_response_tokens
        most = min(limit or room, room)
        # Tokenizing takes seconds a megabyte, while other prompts wait: text that cannot fit is not
        # tokenized.
        if len(prompt) > most * self._longest_token:
            if not options.truncate:
                raise PromptError(
                    f"the prompt has {len(prompt):,} characters, too many by far: the limit is {most} tokens"
                )
            prompt = prompt[: most * self._longest_token]
        ids = self._tokenize(prompt, most)
        limit = most if options.truncate else limit
        if limit is None or len(ids) <= limit:
            return ids
        if not options.truncate:
            raise PromptError(f"the prompt has {len(ids)} tokens, but the limit is {limit}")
        # Only the prompt's own text is cut: what surrounds it (template, end token) must stay whole.
        room = limit - len(self._tokenize("", most))
        if room < 1:
            raise PromptError(f"the limit of {limit} tokens leaves no room beside the chat template")
        with panics_as_errors():
            plain = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        while room > 0:
            ids = self._tokenize(self._tokenizer.decode(plain[:room]), most)
            if len(ids) <= limit:
                return ids
            room -= len(ids) - limit  # text cut in the middle of a word may have more tokens than before
        raise PromptError(f"the prompt cannot be cut to {limit} tokens")

    def prefix_tokens(self, prompts: Sequence[list[int]]) -> int:
        """How many tokens all these prompts begin with that later ones will begin with too: what stands
        before the user's text in the chat template. 0 where that is too little to be worth keeping."""
        prefix = self._prefix
        if len(prefix) < LEAST_PREFIX_TOKENS or any(ids[: len(prefix)] != prefix for ids in prompts):
            return 0
        return len(prefix) if all(len(ids) > len(prefix) for ids in prompts) else 0

    @cached_property
    def _prefix(self) -> list[int]:
        """What prompts of every kind have in common at their beginning."""
        if not self._has_template:
            return []
        try:
            encoded = [self._tokenize(text, SPARE_CHARACTERS) for text in DIFFERENT_PROMPTS]
        except Exception:  # such a template's own prompts tell why, one by one
            return []
        return os.path.commonprefix(encoded)  # noqa: RUF071 - of lists, not of paths

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

    def _tokenize(self, prompt: str, most: int) -> list[int]:
        """A prompt's token ids, with what surrounds it; text that is sure to have more than twice `most` of
        them is not made."""
        with panics_as_errors():
            if self._template:
                try:
                    text = self._template.render(prompt, 2 * most * self._longest_token + SPARE_CHARACTERS)
                except TemplateError as error:
                    raise PromptError(str(error)) from error
                return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if self._has_template:
                return self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
                )["input_ids"]
            return self._tokenizer(prompt, verbose=False)["input_ids"]


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
