"""Prompts to token ids: with the chat template around them, within the limits of the model and the
options."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

from helpers.models.architecture import positions_of
from helpers.sizing.sizes import PROMPT_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from helpers.model_handler.options import AnsweringOptions

# A tokenizer without a limit reports a number larger than this.
NO_LIMIT = 10**6


class PromptError(ValueError):
    """A prompt that cannot be asked."""


class Encoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: the model's.
        config: the model's.
        is_encoder_decoder: whether an encoder reads the prompt; only causal models use a chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, is_encoder_decoder: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._is_encoder_decoder = is_encoder_decoder

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
        ids = self._tokenize(prompt)
        limit = most if options.truncate else limit
        if limit is None or len(ids) <= limit:
            return ids
        if not options.truncate:
            raise PromptError(f"the prompt has {len(ids)} tokens, but the limit is {limit}")
        # Only the prompt's own text is cut: what surrounds it (template, end token) must stay whole.
        room = limit - len(self._tokenize(""))
        if room < 1:
            raise PromptError(f"the limit of {limit} tokens leaves no room beside the chat template")
        plain = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        while room > 0:
            ids = self._tokenize(self._tokenizer.decode(plain[:room]))
            if len(ids) <= limit:
                return ids
            room -= len(ids) - limit  # text cut in the middle of a word may have more tokens than before
        raise PromptError(f"the prompt cannot be cut to {limit} tokens")

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

    def _tokenize(self, prompt: str) -> list[int]:
        if self._tokenizer.chat_template and not self._is_encoder_decoder:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        return self._tokenizer(prompt, verbose=False)["input_ids"]
