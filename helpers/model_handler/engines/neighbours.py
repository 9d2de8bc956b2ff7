"""Whether a model's answer to a prompt depends on the prompts that share its batch.

Padding comes with a mask that says what it is, and most models heed it. Some do not: a recurrent state runs
over the padding (RWKV), positions are counted with it, or experts that are full turn away the tokens of
others. It is established by looking at what the model does, once, rather than by a list of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch

# How much of the logits' standard deviation two rows may differ by on average. Measured with the parts below:
# what rounding makes of the same row in another batch is below 2e-6 in float32, and up to 0.02 in bfloat16
# (SmolLM2-135M). What a row owes to its neighbours is 0.35 or more (RWKV, RecurrentGemma, GIT, TrOCR).
TOLERANCE = {torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 0.1

# Tokens of a prompt that is asked alone and beside others. The fewer, the more of its batch is padding.
PART = 2


class Company(Enum):
    """Which prompts may share a batch, so that each gets the answer that it gets alone."""

    ANY = "prompts of any length share a batch"
    SAME_LENGTH = "only prompts of the same length share a batch"
    NONE = "each prompt is answered alone"


def establish(
    next_logits: Callable[[Sequence[list[int]]], torch.Tensor],
    prompts: Sequence[list[int]],
    dtype: torch.dtype,
) -> Company:
    """Finds out which prompts may share this model's batches.

    Args:
        next_logits: the model: encoded prompts, padded to the longest, to the logits of their next tokens, of
            shape (prompts, tokens × vocabulary).
        prompts: token ids of a few prompts. The beginning of each is asked alone, beside the prompt's end,
            and beside the whole prompt.
        dtype: what the model computes in.
    """
    tolerance = TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)

    def differ(neighbour_of: Callable[[list[int]], list[int]]) -> bool:
        pairs = []
        for prompt in prompts:
            part = prompt[:PART]
            pairs.append((next_logits([part])[0], next_logits([part, neighbour_of(prompt)])[0]))
        return not sum(_difference(*pair) for pair in pairs) <= tolerance * len(pairs)

    if differ(lambda prompt: prompt[-PART:]):
        return Company.NONE
    return Company.SAME_LENGTH if differ(lambda prompt: prompt) else Company.ANY


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean difference of two rows of logits, in standard deviations of the first."""
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not finite.any():
        return torch.inf
    one, other = one[finite], other[finite]
    return float((one - other).abs().mean() / one.std())
