"""Whether a model's answer to a prompt depends on the prompts that share its batch.

Padding comes with a mask that says what it is, and most models heed it. Some do not: a recurrent state runs
over the padding (RWKV), positions are counted with it, or experts that are full turn away the tokens of
others. It is established by looking at what the model does, once, rather than by a list of architectures.

That look is at short prompts. What depends on a length is read from the configs instead: see `Mixing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

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


@dataclass(frozen=True)
class Mixing:
    """The lengths at which prompts of different length may share a batch; others only with their equals.

    Attributes:
        min_prompt_tokens: for shorter prompts, a setting of the publisher's counts the padding, or finds it
            where it looks for the prompt's own tokens.
        max_tokens: with more tokens, response included, the model computes the whole batch in another way
            (LongRoPE, dynamic RoPE scaling, block-sparse attention), or counts positions with the padding.
    """

    min_prompt_tokens: float = 0
    max_tokens: float = math.inf

    def allows(self, prompt_tokens: int, response_tokens: int) -> bool:
        """Whether a prompt of this length, and a response of at most this length, may share a batch with
        prompts of other lengths."""
        return self.min_prompt_tokens <= prompt_tokens and prompt_tokens + response_tokens <= self.max_tokens


def mixing(config: PretrainedConfig, settings: GenerationConfig) -> Mixing:
    """The lengths that may be mixed.

    Args:
        config: the model's.
        settings: the publisher's that hold.
    """
    return Mixing(
        _min_prompt_tokens(settings, bool(config.is_encoder_decoder)),
        min((limit for part in _parts(config) for limit in _limits(part)), default=math.inf),
    )


def _min_prompt_tokens(settings: GenerationConfig, is_encoder_decoder: bool) -> float:
    if settings.encoder_no_repeat_ngram_size:
        return math.inf
    if is_encoder_decoder:  # what the other settings look at is the decoder's, which has no padding
        return 0
    if settings.no_repeat_ngram_size:
        return math.inf
    sequences = [*(settings.bad_words_ids or ()), *(ids for ids, _ in _biases(settings.sequence_bias))]
    texts = [settings.stop_strings] if isinstance(settings.stop_strings, str) else settings.stop_strings
    # Forced is the second token of a row.
    forced = 2 if settings.forced_bos_token_id is not None else 0
    # A token has at least one character or byte.
    return max(forced, settings.min_length or 0, *map(len, sequences), *map(_bytes, texts or ()), 0)


def _biases(bias: dict | list | None) -> list:
    return list(bias.items()) if isinstance(bias, dict) else list(bias or ())


def _bytes(text: str) -> int:
    return len(text.encode())


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield part


def _limits(config: PretrainedConfig) -> Iterator[int]:
    """The numbers of tokens past which a model computes otherwise."""
    for rope in ropes_of(config):
        if rope.get("rope_type") == "longrope":
            yield rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") == "dynamic":
            yield config.max_position_embeddings
    if getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None):
        yield int(config.floor_scale) - 1  # Llama 4
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird
        yield (5 + 2 * config.num_random_blocks) * config.block_size


def ropes_of(config: PretrainedConfig) -> list[dict]:
    """The settings of a model's rotary positions: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [one for one in (rope, *rope.values()) if isinstance(one, dict) and "rope_type" in one]


class Memory:
    """What a model remembers of the lengths that it has computed, so that it can forget it: transformers'
    dynamic RoPE scaling keeps the longest one's frequencies, and BigBird the attention of the shortest one.

    Args:
        model: the transformers model, as it was loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        is_dynamic = any(
            rope["rope_type"] == "dynamic" for part in _parts(model.config) for rope in ropes_of(part)
        )
        self._ropes = [m for m in model.modules() if is_dynamic and hasattr(m, "original_max_seq_len")]
        is_sparse = getattr(model.config, "attention_type", None) == "block_sparse"
        self._sparse = [
            module
            for module in model.modules()
            if is_sparse and hasattr(module, "set_attention_type") and hasattr(module, "layers")
        ]

    def forget(self) -> None:
        """Makes the model what it was when it was loaded."""
        for rope in self._ropes:
            for name, frequencies in [*rope.named_buffers(recurse=False)]:
                if name.endswith("original_inv_freq"):
                    kind = name.removesuffix("original_inv_freq")
                    rope.register_buffer(f"{kind}inv_freq", frequencies, persistent=False)
                    setattr(rope, f"{kind}max_seq_len_cached", rope.original_max_seq_len)
        for encoder in self._sparse:
            encoder.set_attention_type("block_sparse")


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
