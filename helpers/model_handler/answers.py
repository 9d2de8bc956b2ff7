"""What comes of prompts: responses, failures, and the batches that they were answered in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """A model's answer to one prompt.

    Attributes:
        text: what it says.
        prompt_tokens: the tokens of what was asked, with all that surrounds it.
        response_tokens: the tokens of the answer.
        finish_reason: why it ends: `stop` for the model's own end, `length` for max_response_tokens.
        was_asked_again: whether it is the second answer, after one that did not fit the schema.
        reasoning_tokens: the tokens generated before the answer, in which a reasoning model thinks. With
            `keep_reasoning` they are part of the answer.
    """

    text: str
    prompt_tokens: int
    response_tokens: int
    finish_reason: str = "stop"
    was_asked_again: bool = False
    reasoning_tokens: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether there is an answer, rather than thinking alone."""
        return not self.reasoning_tokens or self.response_tokens > 0


@dataclass(frozen=True)
class Batch:
    """The figures of one batch.

    Attributes:
        size: the number of prompts.
        prompt_tokens: the prompts' tokens, without padding.
        padding_tokens: the tokens that pad the prompts to the length of the longest.
        response_tokens: the tokens generated, thinking included, without padding after a response's end.
        seconds: how long it took.
    """

    size: int
    prompt_tokens: int
    padding_tokens: int
    response_tokens: int
    seconds: float

    @classmethod
    def of(
        cls, prompts: Sequence[list[int]], responses: Sequence[Response | Failure], seconds: float
    ) -> Batch:
        """Sums up a batch of encoded prompts and their responses."""
        tokens = sum(map(len, prompts))
        generated = sum(
            one.response_tokens + one.reasoning_tokens for one in responses if isinstance(one, Response)
        )
        padding = len(prompts) * max(map(len, prompts)) - tokens
        return cls(len(prompts), tokens, padding, generated, seconds)


@dataclass(frozen=True)
class Failure:
    """Why a prompt has no response.

    Attributes:
        error: the reason.
        finish_reason: `time` if the response was not complete in time; else, where there was a response, why
            that ended.
        answer: what the model said, if that did not fit the schema.
        was_asked_again: whether that is its second answer.
    """

    error: str
    finish_reason: str = ""
    answer: str | None = None
    was_asked_again: bool = False


def batches_by_length(
    lengths: dict[int, int],
    max_batch_size: int,
    max_batch_tokens: int,
    response_tokens: int = 0,
    mixes: Callable[[int], bool] = lambda length: True,
) -> Iterator[list[int]]:
    """Puts prompts of similar length into batches, longest first.

    Args:
        lengths: tokens of each prompt, by its index.
        max_batch_size: prompts in a batch.
        max_batch_tokens: the limit for a batch's size times the tokens of its longest prompt and response.
        response_tokens: what a response may add to each prompt.
        mixes: whether a prompt of so many tokens may share a batch with prompts of another length.

    Yields:
        Indices; a prompt that is over the budget by itself stands alone.
    """
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else 0
        full = (
            len(batch) >= max_batch_size
            or (len(batch) + 1) * (longest + response_tokens) > max_batch_tokens
            or (lengths[index] != longest and not (mixes(longest) and mixes(lengths[index])))
        )
        if batch and full:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
