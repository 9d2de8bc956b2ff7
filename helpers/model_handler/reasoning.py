"""The part of a response in which a reasoning model thinks, before its answer begins.

Such models (Qwen3, DeepSeek-R1, SmolLM3, gpt-oss, ...) write their thinking between two marks. It holds
drafts of the answer, so it must not be taken for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Marks(NamedTuple):
    """The texts that thinking begins and ends with."""

    begin: str
    end: str


PUBLISHED = (
    Marks("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, Hunyuan, GLM, Phi-4-reasoning
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<reasoning>", "</reasoning>"),
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("[THINK]", "[/THINK]"),  # Magistral
    Marks("◁think▷", "◁/think▷"),  # Kimi
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
"""Marks of published models, from their templates and model cards."""

NONE = "none"


def parse_marks(text: str) -> Marks | None:
    """The marks of the option `reasoning_marks`: two texts with a space between them, or `none`.

    Raises:
        ValueError: it is neither.
    """
    if text == NONE:
        return None
    parts = text.split()
    if len(parts) != 2 or parts[0] == parts[1]:
        raise ValueError(
            f"reasoning_marks is {text!r}: give the text that thinking begins with, a space, and the one "
            f"that it ends with, as in '<think> </think>', or {NONE}."
        )
    return Marks(*parts)


def named_marks(tokenizer: PreTrainedTokenizerBase) -> Marks | None:
    """The marks that a tokenizer, or its chat template, names; None without any."""
    named = f"{tokenizer.chat_template or ''} {' '.join(tokenizer.get_added_vocab())}"
    return next((marks for marks in PUBLISHED if marks.begin in named or marks.end in named), None)


class Thinking(NamedTuple):
    """A response, divided.

    Attributes:
        tokens: how many tokens the thinking has, its marks included.
        answer: the text of the answer; None if it never began.
    """

    tokens: int
    answer: str | None


def divide(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], marks: Marks, *, is_named: bool, is_open: bool
) -> Thinking | None:
    """Divides a response into thinking and answer.

    What follows the last mark that ends thinking is the answer: a model may think about marks, nest them, and
    think once more. None of what stands before can be told from a draft.

    Args:
        tokenizer: the model's.
        tokens: the response's.
        marks: of its thinking.
        is_named: whether this model is known to use them: then a mark at the end counts without its
            beginning.
        is_open: whether the prompt itself ends with the mark that thinking begins with.

    Returns:
        None if there is no thinking in it.
    """
    whole = tokenizer.decode(tokens)
    end, before = whole.rfind(marks.end), whole.partition(marks.begin)
    begins = bool(before[1]) and not _without_special_tokens(before[0], tokenizer).strip()
    if not (is_open or begins or (is_named and end >= 0)):
        return None
    if end < 0 or marks.begin in whole[end + len(marks.end) :]:
        return Thinking(len(tokens), None)
    # A token may hold the end of the mark and what follows it.
    count = whole.count(marks.end)
    first = bisect.bisect_left(
        range(len(tokens) + 1), count, key=lambda k: tokenizer.decode(tokens[:k]).count(marks.end)
    )
    rest = tokenizer.decode(tokens[:first]).rpartition(marks.end)[2]
    return Thinking(first, (rest + tokenizer.decode(tokens[first:], skip_special_tokens=True)).strip())


def _without_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text
