"""The settings of generation_config.json: which of them hold here, and which do not.

The rule: what the publisher says about *which tokens* a response may begin with, hold and end with, holds.
*How* tokens are chosen, how many there are at most, how many responses there are and in what form, is said by
the answering options alone: greedy unless there is a temperature, one response, its text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from helpers.model_handler.options import AnsweringOptions

HELD = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "stop_strings",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "renormalize_logits",
    "remove_invalid_values",
    "use_cache",
)
"""Settings of the publisher's that hold."""

# Settings that do not hold and change no answer: the form of what generate() returns, and how it computes.
_OF_NO_EFFECT = frozenset(
    {
        "_from_model_config",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "low_memory",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "return_legacy_cache",
        "transformers_version",
    }
)


def held(config: GenerationConfig) -> GenerationConfig:
    """The settings that hold, and no others: transformers fills in from a model's own what a call leaves
    open."""
    values = config.to_dict()
    return type(config)(**{name: values[name] for name in HELD if values.get(name) is not None})


def not_honoured(config: GenerationConfig) -> dict[str, Any]:
    """The publisher's settings that would change answers and do not hold, by name."""
    usual = type(config)().to_dict() | config._get_default_generation_params()
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in HELD and name not in _OF_NO_EFFECT and value is not None and value != usual.get(name)
    }


def for_answering(
    held_config: GenerationConfig, options: AnsweringOptions, pad_token_id: int
) -> GenerationConfig:
    """The settings of one batch: those that hold, and what the answering options say."""
    sampled = options.is_sampled
    values = held_config.to_dict() | {
        "max_new_tokens": options.max_response_tokens,
        "max_length": None,
        "do_sample": sampled,
        "num_beams": 1,
        "num_return_sequences": 1,
        # Unset rather than left as transformers has them: greedy search warns about each.
        "temperature": options.temperature if sampled else None,
        "top_p": options.top_p if sampled else None,
        "top_k": 0 if sampled else None,
        "pad_token_id": pad_token_id,
    }
    return type(held_config)(**values)
