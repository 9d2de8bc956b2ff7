"""What a language model takes of memory, computed from its config alone: parameters, KV cache, activations.

No weights are downloaded and none are allocated: the model is built on torch's meta device, where tensors
have shapes and no data. ``tests/test_sizing.py`` holds the formulas against real caches, and
``helpers.memory.measure_memory`` against real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

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
        checkpoint: as published: what a download and a state dict hold.
        built: as transformers builds the model from its config: fewer where it ties a head that the
            checkpoint keeps apart.
    """

    checkpoint: int
    built: int


def parameter_count(config: PretrainedConfig) -> ParameterCount:
    """Counts a model's parameters on the meta device; shared ones once, every expert of a mixture.

    transformers 5 ties the head of every T5 to its embeddings, whatever the config file says. Checkpoints of
    T5 1.1 and its descendants (flan-t5, flan-ul2, mT5) hold a head of their own. The config object still
    tells: for T5 and LongT5 the file's ``tie_word_embeddings=false`` lives on as
    ``scale_decoder_outputs=False``; mT5 and umT5 were published with a separate head only. That head,
    vocabulary × width, is added to the checkpoint's count.

    Raises:
        SizingError: not a model that generates text, or one that is quantised.
    """
    model_class = generation_class(config)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (
        AttributeError,
        ImportError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise SizingError(
            f"transformers cannot build {model_class.__name__} from this config ({error}): check config.json."
        ) from error
    built = sum(parameter.numel() for parameter in model.parameters())
    head = config.vocab_size * config.d_model if head_is_separate(config) else 0
    return ParameterCount(checkpoint=built + head, built=built)


def generation_class(config: PretrainedConfig) -> type:
    """The transformers class that generates text for a config: encoder-decoder or causal.

    Raises:
        SizingError: a vision, audio, encoder-only or otherwise unsupported kind, or a quantised checkpoint.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    advice = "choose a causal (Llama, Qwen, ...) or an encoder-decoder (T5, BART, ...) language model."
    kind = type(config)
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise SizingError(f"{config.model_type!r} models take more than text ({part}): {advice}")
    if getattr(config, "quantization_config", None) is not None:
        raise SizingError(
            f"This {config.model_type!r} checkpoint is quantised, whose size its config does not tell: "
            "give the name of the model it was made from."
        )
    if config.is_encoder_decoder:
        if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[kind]
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        # BERT and its like have a causal class too, for use as a decoder. Published ones are encoders.
        if kind not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
            return MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        raise SizingError(f"{config.model_type!r} models are encoders, which do not generate text: {advice}")
    raise SizingError(f"{config.model_type!r} models do not generate text from text: {advice}")


def kv_cache_bytes(
    config: PretrainedConfig, batch_size: int, prompt_tokens: int, response_tokens: int, dtype: str
) -> int:
    """Bytes of keys and values that a batch holds when its last token is generated.

    Causal: two tensors a layer, of batch × key-value heads × tokens × head width. The tokens are the prompt's
    and the response's, and at most the window's in layers that slide one. Encoder-decoder: the same for the
    response, and once more for the prompt, which the cross-attention of every decoder layer keeps.
    Grouped-query attention has fewer key-value heads than heads. Checked against the caches of transformers
    in the tests.

    Args:
        batch_size: prompts generated together.
        prompt_tokens: of the longest prompt, to which the others are padded.
        response_tokens: generated, at most.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    own, cross = _cached_elements(config, prompt_tokens, response_tokens)
    return batch_size * (own + cross) * dtype_bytes(dtype)


def activation_bytes(
    config: PretrainedConfig, batch_size: int, prompt_tokens: int, response_tokens: int, dtype: str
) -> int:
    """Bytes that computing takes at its peak, beside the weights and :func:`kv_cache_bytes`.

    An estimate of the two moments that decide. Reading the prompt: the feed-forward block's four intermediate
    tensors, the residual stream, and the attention mask (for T5 with its bias: twice, and for every head).
    Generating: logits in the model's dtype and twice in float32, and the growth of the cache
    (:data:`CACHE_GROWTH`). An encoder is done, and its memory free, before the cache is filled; a causal
    model fills the cache while it reads.

    The arguments are those of :func:`kv_cache_bytes`.
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

    logits = batch_size * _part(config, "decoder").vocab_size * (size + 2 * 4)
    generating = logits + int((CACHE_GROWTH - 1) * batch_size * own * size)
    if config.is_encoder_decoder:
        return max(reading - cache, generating)
    return max(reading, generating)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        SizingError: an unknown dtype.
    """
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise SizingError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPE_BYTES)}.") from None


# Their relative position bias is added to the scores of every head, which makes a mask of it per head.
_BIASED_ATTENTION = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def head_is_separate(config: PretrainedConfig) -> bool:
    if config.model_type in ("t5", "longt5"):
        return not config.scale_decoder_outputs
    return config.model_type in ("mt5", "umt5")


def _cached_elements(config: PretrainedConfig, prompt_tokens: int, response_tokens: int) -> tuple[int, int]:
    """Numbers cached for one prompt: by the attention of a decoder to itself, and to an encoder's output."""
    decoder = _part(config, "decoder")
    layers = _first(decoder, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer")
    heads = _first(decoder, "decoder_attention_heads", "num_attention_heads", "n_head")
    if getattr(decoder, "kv_lora_rank", None):
        # Multi-head latent attention (DeepSeek): one compressed vector a token, and its rotary part.
        row = decoder.kv_lora_rank + decoder.qk_rope_head_dim
    else:
        head_width = getattr(decoder, "d_kv", None) or getattr(decoder, "head_dim", None)
        row = 2 * (head_width or _width(decoder) // heads)
        row *= getattr(decoder, "num_key_value_heads", None) or heads

    if config.is_encoder_decoder:
        return layers * row * response_tokens, layers * row * prompt_tokens
    tokens = prompt_tokens + response_tokens
    window = getattr(decoder, "sliding_window", None) or tokens
    kinds = getattr(decoder, "layer_types", None) or ["sliding_attention"] * layers
    return row * sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds), 0


def _feed_forward_width(config: PretrainedConfig) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        return experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    names = ("d_ff", "encoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner")
    return _first(config, *names, default=4 * _width(config))


def _width(config: PretrainedConfig) -> int:
    return _first(config, "d_model", "hidden_size", "n_embd")


def _part(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """The config of an encoder or decoder: most families keep both in one, some nest them."""
    nested = getattr(config, name, None)
    return nested if hasattr(nested, "model_type") else config


def _first(config: PretrainedConfig, *names: str, default: int | None = None) -> Any:
    """The first of these attributes that a config has: families call the same thing by different names."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if default is not None:
        return default
    raise SizingError(
        f"The config of this {config.model_type!r} model has none of {', '.join(names)}: its cache cannot be "
        "computed. Models without attention, such as Mamba, are not supported: choose another."
    )
