"""How much memory a language model takes, computed from its config alone: parameters, KV cache, activations.

No weights are downloaded and none are allocated: the model is built on torch's meta device, where tensors
have shapes but no data. `tests/test_model_memory.py` checks the formulas against real caches, and
`helpers.measuring.memory` against real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.models.architecture import architecture_of, head_is_separate
from helpers.models.dtypes import DTYPE_BYTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A cache that grows by one token a step is copied into a larger block every time. The old block lives until
# the copy is done, and the holes that old blocks leave in the heap are not all filled. Measured with the
# shapes of flan-t5-small and flan-t5-base, batches of 32 and 64, 64 and 256 new tokens: 1.6 times the cache's
# bytes.
CACHE_GROWTH = 1.6


class SizingError(ValueError):
    """A model or a workload that cannot be sized: the message says why, and what to do."""


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        checkpoint: the published number: what a download and a state dict hold.
        built: the number in the model that transformers builds from the config: fewer where it ties a head
            that the checkpoint keeps separate.
    """

    checkpoint: int
    built: int


def parameter_count(config: PretrainedConfig) -> ParameterCount:
    """Counts a model's parameters on the meta device: shared ones once, and every expert of a mixture.

    A head that the checkpoint keeps apart and transformers ties (see `helpers.models.architecture`) is added
    to the checkpoint's count: vocabulary × width.

    Raises:
        ModelError: not a model that generates text, or one that is quantized.
    """
    model = architecture_of(config).empty_model()
    built = sum(parameter.numel() for parameter in model.parameters())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is getattr(embeddings, "weight", None)
    extra = head.weight.numel() if is_tied and head_is_separate(config) else 0
    return ParameterCount(checkpoint=built + extra, built=built)


def kv_cache_bytes(
    config: PretrainedConfig, batch_size: int, prompt_tokens: int, response_tokens: int, dtype: str
) -> int:
    """Bytes of keys and values that a batch holds when its last token is generated.

    Causal: two tensors a layer, of batch × key-value heads × tokens × head width. The tokens are the prompt's
    and the response's, and at most the window's in sliding-window layers. Encoder-decoder: the same for the
    response, and once more for the prompt, which the cross-attention of every decoder layer keeps.
    Grouped-query attention has fewer key-value heads than heads. The tests check this against
    transformers' own caches.

    Args:
        batch_size: prompts generated together.
        prompt_tokens: the length of the longest prompt, to which the others are padded.
        response_tokens: the most tokens to generate per prompt.
        dtype: `float32`, `float16` or `bfloat16`.
    """
    own, cross = _cached_elements(config, prompt_tokens, response_tokens)
    return batch_size * (own + cross) * dtype_bytes(dtype)


def activation_bytes(
    config: PretrainedConfig, batch_size: int, prompt_tokens: int, response_tokens: int, dtype: str
) -> int:
    """Bytes that computing takes at its peak, besides the weights and `kv_cache_bytes`.

    Estimated at the two moments that decide. Reading the prompt: the feed-forward block's four intermediate
    tensors, the residual stream, and the attention mask (for T5 with its bias: twice, and for every head).
    Generating: logits in the model's dtype and twice in float32, and the growth of the cache
    (`CACHE_GROWTH`). An encoder is done, and its memory free, before the cache is filled; a causal
    model fills the cache while it reads.

    The arguments are those of `kv_cache_bytes`.
    """
    size = dtype_bytes(dtype)
    own, cross = _cached_elements(config, prompt_tokens, response_tokens)
    cache = batch_size * (own + cross) * size

    reader = _part(config, "encoder")
    tokens = batch_size * prompt_tokens
    reading = tokens * size * (4 * _feed_forward_width(reader) + 2 * _width(reader))
    square = batch_size * prompt_tokens**2
    if config.model_type in _BIASED_ATTENTION:
        reading += 2 * square * config.num_heads * size
    else:
        reading += square * (size + 1)

    logits = batch_size * _first(_part(config, "decoder"), "vocab_size") * (size + 2 * 4)
    generating = logits + int((CACHE_GROWTH - 1) * batch_size * own * size)
    if config.is_encoder_decoder:
        return max(reading - cache, generating)
    return max(reading, generating)


def packed_bytes(config: PretrainedConfig, parameters: int, dtype: str) -> tuple[int, int]:
    """The second copy that CTranslate2 makes of its linear weights on Intel's CPUs, packed for MKL's
    products.

    The copy takes the first one's place, which is freed once all are packed: while it loads, a worker holds
    both. Source: CTranslate2 4.8.1, src/models/model.cc (`process_linear_weights`) and src/cpu/backend.cc.
    The size of packed weights was measured with MKL's AVX2 kernels: 0.98 bytes for each of int8's, 4.9 for
    each of float32's. With AMX, one figure is known, 1.00 in int8.

    Args:
        config: the model's.
        parameters: how many it has.
        dtype: what it computes in: int8 or float32.

    Returns:
        The bytes of the copy, and how many more those are than the first one's that they replace.
    """
    size, packed = (1, 1.0) if dtype == "int8" else (4, 5.0)
    vocabulary = _first(_part(config, "decoder"), "vocab_size") * _width(_part(config, "decoder"))
    has_own_head = head_is_separate(config) if config.is_encoder_decoder else not config.tie_word_embeddings
    if config.is_encoder_decoder:  # neither embedding nor head are packed
        linear = replaced = parameters - vocabulary * (1 + has_own_head)
    else:  # the head is, and an embedding that is tied to it stays besides
        replaced = parameters - vocabulary
        linear = replaced if has_own_head else parameters
    return int(linear * packed), int(linear * packed - replaced * size)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        SizingError: an unknown dtype.
    """
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise SizingError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPE_BYTES)}.") from None


# Their relative position bias is added to the scores of every head, so the mask has a copy for each head.
_BIASED_ATTENTION = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def _cached_elements(config: PretrainedConfig, prompt_tokens: int, response_tokens: int) -> tuple[int, int]:
    """Numbers cached for one prompt: by a decoder's self-attention, and by its cross-attention."""
    decoder = _part(config, "decoder")
    layers = _first(
        decoder, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers"
    )
    heads = _first(decoder, "decoder_attention_heads", "num_attention_heads", "n_head", default=0)
    if rank := _value(decoder, "kv_lora_rank"):
        # Multi-head latent attention (DeepSeek): one compressed vector per token, and its rotary part.
        row = rank + _first(decoder, "qk_rope_head_dim")
    elif heads:
        head_width = _value(decoder, "d_kv") or _value(decoder, "head_dim") or _width(decoder) // heads
        row = 2 * head_width * (_value(decoder, "num_key_value_heads") or heads)
    else:
        # Without attention (Mamba, RWKV) a layer keeps a state that does not grow. It is counted as keys and
        # values of the model's width, which are more as soon as there are more than some tens of tokens.
        row = 2 * _width(decoder)

    if config.is_encoder_decoder:
        return layers * row * response_tokens, layers * row * prompt_tokens
    tokens = prompt_tokens + response_tokens
    window = _value(decoder, "sliding_window") or tokens
    kinds = getattr(decoder, "layer_types", None) or ["sliding_attention"] * layers
    return row * sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds), 0


def _feed_forward_width(config: PretrainedConfig) -> int:
    names = ("d_ff", "encoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner")
    if experts := _value(config, "num_experts_per_tok"):
        return experts * _first(config, "moe_intermediate_size", *names, default=4 * _width(config))
    return _first(config, *names, default=4 * _width(config))


def _width(config: PretrainedConfig) -> int:
    return _first(config, "d_model", "hidden_size", "n_embd", "dim", "emb_dim", "hidden_dim")


def _part(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """The config of an encoder or decoder: most families keep both in one, some nest them."""
    for part in (name, "text_config"):
        nested = getattr(config, part, None)
        config = nested if hasattr(nested, "model_type") else config
    return config


def _first(config: PretrainedConfig, *names: str, default: int | None = None) -> Any:
    """The first of these attributes that a config has: families call the same thing by different names."""
    for name in names:
        if (value := _value(config, name)) is not None:
            return value
    if default is not None:
        return default
    raise SizingError(
        f"The config of this {config.model_type!r} model has none of {', '.join(names)}, so that its memory "
        "cannot be computed: serve it where the published figures say that it fits, or choose another model"
    )


def _value(config: PretrainedConfig, name: str) -> int | None:
    """A whole number of a config, or the largest of its layers' where they differ; None where it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers' own, of no public name, where layers differ
        layers = getattr(config, "per_layer_config", None) or ()
        value = max((found for layer in layers if (found := _value(layer, name))), default=None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
