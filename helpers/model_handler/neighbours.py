"""Whether a model's answer to a prompt depends on the prompts that share its batch.

Padding comes with a mask that says what it is, and most models heed it. Some do not: a recurrent state runs
over the padding (RWKV), positions are counted with it, or experts that are full turn away the tokens of
others. It is established by looking at what the model does, once, rather than by a list of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch

# How much of the logits' standard deviation two rows may differ by on average. Measured: what rounding makes
# of the same row in another batch is below 2e-6 in float32, and up to 0.05 in bfloat16 (SmolLM2-135M). What a
# row owes to its neighbours was 0.13 or more (RWKV, RecurrentGemma, XLNet, GIT, TrOCR).
TOLERANCE = {torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 0.1


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
    """Finds out which company a model's answers bear.

    Args:
        next_logits: the model: encoded prompts, padded to the longest, to the logits of their next tokens, of
            shape (prompts, tokens × vocabulary).
        prompts: token ids of a few, of which the parts are asked too. What all of them show is taken to be
            so: rounding may look like it in one.
        dtype: what the model computes in.
    """
    tolerance = TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)

    def depends(on_length: bool) -> bool:
        for prompt in prompts:
            part = max(1, len(prompt) // 3)
            neighbour = prompt if on_length else prompt[-part:]
            alone, together = next_logits([prompt[:part]])[0], next_logits([prompt[:part], neighbour])[0]
            if not _differ(alone, together, tolerance):
                return False
        return True

    if depends(on_length=False):
        return Company.NONE
    return Company.SAME_LENGTH if depends(on_length=True) else Company.ANY


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not finite.any():
        return True
    one, other = one[finite], other[finite]
    return bool((one - other).abs().mean() > tolerance * one.std())
