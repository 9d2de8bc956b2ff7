"""The interface between a language model and what computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from helpers.model_handler.engines.neighbours import Company, Mixing
from helpers.models.architecture import architecture_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from helpers.model_handler.options import AnsweringOptions


STOP, LENGTH, TIME = "stop", "length", "time"
"""Why a response ends: the model's own end, the most tokens, the most seconds."""


class Generated(NamedTuple):
    """A response, as an engine generates it.

    Attributes:
        tokens: token ids up to the end token, and that one too.
        finish_reason: `STOP`, `LENGTH` or `TIME`.
    """

    tokens: list[int]
    finish_reason: str


class Engine(Protocol):
    """Computes the responses to encoded prompts. One thread at a time may use it.

    Tokenizing, batching by length, isolating failures, counting and swapping are not its business.

    Attributes:
        name: as the option `engine` names it.
        dtype: the name of what it computes in.
        device: `cpu`, or where else it computes.
        config: the model's.
        generation_config: the publisher's settings that hold; see `generation_settings`.
        rows: how many tokens the model has embeddings for.
        model: the transformers model. An engine that computes without it loads it when it is first asked for.
    """

    name: str
    dtype: str
    device: str
    config: PretrainedConfig
    generation_config: GenerationConfig
    rows: int

    @property
    def model(self) -> PreTrainedModel: ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: AnsweringOptions,
        prefix_tokens: int = 0,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> list[Generated]:
        """Responses to prompts, all in one batch.

        Args:
            prompts: token ids; they need not be of the same length.
            options: how to answer. After `max_response_seconds`, what is not complete is left as it is; a
                step that has begun is not interrupted.
            prefix_tokens: how many tokens all of them begin with alike, and later ones will too, so that the
                model's state after these may be kept; 0 for nothing to keep.
            is_abandoned: may be asked after each step; true leaves all as it is.
        """
        ...

    def company(self, samples: Sequence[list[int]]) -> Company:
        """Which prompts may share a batch.

        Args:
            samples: encoded prompts to find it out with.
        """
        ...

    def mixing(self) -> Mixing:
        """The lengths of prompts that may share a batch with others, as far as the configs tell."""
        ...

    def why_not(self, options: AnsweringOptions) -> str:
        """Why it cannot answer with these options as they are meant; empty if it can."""
        ...


def shapes_of(config: PretrainedConfig) -> tuple[str, dict[str, tuple]]:
    """The class that a config builds and its weights' shapes, whatever else two configs differ in."""
    architecture = architecture_of(config)
    weights = architecture.empty_model().state_dict()
    return architecture.model_class.__name__, {name: tuple(one.shape) for name, one in weights.items()}


def generated(
    tokens: list[int], ends: set[int], most: int, is_late: bool, forced: set[int] = frozenset()
) -> Generated:
    """A response with the reason for its end.

    Args:
        tokens: token ids up to the end token, and that one too.
        ends: the end tokens.
        most: how many tokens there could be.
        is_late: whether the time was up while it was generated.
        forced: the tokens that the last of so many is forced to be.
    """
    if len(tokens) >= most and tokens[-1] in forced:
        return Generated(tokens, LENGTH)
    if tokens and tokens[-1] in ends:
        return Generated(tokens, STOP)
    if len(tokens) >= most:
        return Generated(tokens, LENGTH)
    return Generated(tokens, TIME if is_late else STOP)


def as_set(ids: int | list[int] | None) -> set[int]:
    """Token ids as a generation config has them: one, several or none."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
