"""How long a batch takes, by its size and tokens: fitted to batches that were measured.

A model reads the prompts, and then takes a step for each token of the longest response. A step costs
something by itself, since all weights are read for it, and something for each prompt that is still being
answered. So

    seconds = per_batch + per_prompt_token · prompt tokens + per_step · steps + per_token · response tokens

with none of the four below 0 (non-negative least squares, from scipy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Observed:
    """A batch that was measured.

    Attributes:
        prompt_tokens: of all its prompts.
        steps: the tokens of its longest response.
        response_tokens: of all its responses.
        seconds: how long it took.

    Raises:
        ValueError: a number that cannot be.
    """

    prompt_tokens: int
    steps: int
    response_tokens: int
    seconds: float

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.steps, self.response_tokens) < 1 or not 0 < self.seconds < math.inf:
            raise ValueError(f"{self} cannot be: a batch has tokens of each kind, and takes time.")


@dataclass(frozen=True)
class ServiceTime:
    """The four numbers of the module's formula, in seconds, and how well they fit.

    Attributes:
        error: the median of the relative differences between fitted and measured times.
    """

    per_batch: float
    per_prompt_token: float
    per_step: float
    per_token: float
    error: float = 0.0

    def seconds(self, prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> float:
        """How long a batch takes, by the tokens of its prompts and responses."""
        return (
            self.per_batch
            + self.per_prompt_token * sum(prompt_tokens)
            + self.per_step * max(response_tokens, default=0)
            + self.per_token * sum(response_tokens)
        )


def fit(batches: Sequence[Observed]) -> ServiceTime:
    """The service time that fits measured batches best.

    Args:
        batches: so different that the four numbers can be told apart: in their prompts' tokens, their
            responses' longest and all of these together.

    Raises:
        ValueError: they cannot be told apart.
    """
    import numpy as np
    from scipy.optimize import nnls

    if not batches:
        raise ValueError("there are no batches, which do not tell a service time: measure some.")
    measured = np.array([one.seconds for one in batches])
    shape = np.array([[1, one.prompt_tokens, one.steps, one.response_tokens] for one in batches], dtype=float)
    # Relative errors count, or long batches alone would decide; columns of like size keep it stable.
    scale = shape.max(axis=0)
    if np.linalg.matrix_rank(shape / scale, tol=1e-3) < 4:
        raise ValueError(
            "these batches do not tell what a batch, a prompt's token, a step and a response's token cost: "
            "measure batches that differ in size, in prompts' lengths and in responses' lengths."
        )
    found, _ = nnls(shape / scale / measured[:, None], np.ones(len(batches)))
    found = found / scale
    error = float(np.median(np.abs(shape @ found - measured) / measured))
    return ServiceTime(*map(float, found), error)
