"""What depends on lengths: a prompt's answer beside others, and after others, is the one that a model of its
own gives to it alone."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, byte_tokenizer, llama, t5
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from helpers.model_handler import AnsweringOptions
from helpers.model_handler.engines.torch_engine import TorchEngine
from helpers.model_handler.language_model import LanguageModel
from helpers.models.architecture import positions_of

SHORT = ["Hi", "What is the capital of France?", "a b", "é"]
LONG = "Write one long sentence about the deep blue sea please, with its ships, its fish and its islands."
TOKENS = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ORIGINAL = 64
"""The positions that the models here were made for, before scaling; LONG has more tokens."""

OPTIONS = AnsweringOptions(max_response_tokens=12)


def spread(model):
    """Random weights that tell prompts apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() > 1 else 0.05
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def longrope():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 4.0, 9.0, 20.0],
        "original_max_position_embeddings": ORIGINAL,
    }
    positions = {"max_position_embeddings": 512, "original_max_position_embeddings": ORIGINAL}
    return Phi3ForCausalLM(Phi3Config(**SHAPE, **TOKENS, **positions, rope_parameters=rope))


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, **TOKENS, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    )


def big_bird():
    return BigBirdPegasusForConditionalGeneration(
        BigBirdPegasusConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=256,
            attention_type="block_sparse",
            block_size=4,
            num_random_blocks=1,
            **TOKENS | {"eos_token_id": 1, "bos_token_id": 0},
            decoder_start_token_id=1,
        )
    )


def answers(model, prompts, *, chat) -> list[str]:
    tokenizer = byte_tokenizer(chat=chat)
    return [one.text for one in LanguageModel(TorchEngine(model, tokenizer), tokenizer).ask(prompts, OPTIONS)]


@pytest.mark.parametrize("build", [longrope, dynamic, big_bird])
def test_one_long_prompt_changes_no_other_answer(build):
    model, chat = spread(build()), build is not big_bird
    longer = [LONG, LONG[:-20] + LONG]
    prompts = [longer[1], *SHORT, longer[0]]
    alone = [answers(copy.deepcopy(model), [prompt], chat=chat)[0] for prompt in prompts]
    assert len(set(alone)) > 3, "the model tells prompts apart"
    assert answers(model, prompts, chat=chat) == alone
    # The model has computed a long prompt by now, and a short one.
    again = [answers(model, [prompt], chat=chat)[0] for prompt in prompts]
    assert again == alone


def test_a_response_that_crosses_the_limit_is_computed_as_if_alone():
    model = spread(longrope())
    length = len(byte_tokenizer(chat=True)("Hi")["input_ids"]) + 4
    crossing = "x" * (ORIGINAL - length - 2)
    prompts = [crossing, *SHORT]
    alone = [answers(copy.deepcopy(model), [prompt], chat=True)[0] for prompt in prompts]
    assert answers(model, prompts, chat=True) == alone


ENDS = list(range(4, 120))
"""Many end tokens, so that answers end early unless a setting keeps them from it."""

SETTINGS = {
    "min_length": {"min_length": 24, "eos_token_id": ENDS},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[0, 0, number] for number in range(5, VOCABULARY)]},
    "sequence_bias": {"sequence_bias": [[[3, 3, 40], 50.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 40},
}


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_look_at_a_prompt_see_no_padding(name, kind):
    chat = kind == "causal"
    model = llama() if chat else t5(distinct_head=False)
    given = {"eos_token_id": 4, "pad_token_id": 0, "decoder_start_token_id": 0} | SETTINGS[name]
    if not chat and name == "encoder_repetition_penalty":
        given["encoder_repetition_penalty"] = 0.2  # of what the prompt has not
    model.generation_config = GenerationConfig(**given)
    prompts = ["a", LONG, *SHORT]
    tokenizer = byte_tokenizer(chat=False)  # prompts of a token or two
    language_model = LanguageModel(TorchEngine(model, tokenizer), tokenizer)
    alone = [language_model.ask([prompt], OPTIONS)[0] for prompt in prompts]
    assert language_model.ask(prompts, OPTIONS) == alone


def test_an_end_that_is_forced_at_the_limit_is_no_end_of_the_models():
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        **TOKENS | {"eos_token_id": 1},
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    tokenizer = byte_tokenizer(chat=False)
    model = LanguageModel(TorchEngine(spread(BartForConditionalGeneration(config)), tokenizer), tokenizer)
    for answer in model.ask(SHORT, OPTIONS):
        assert (answer.response_tokens, answer.finish_reason) == (12, "length")


@pytest.mark.parametrize(
    "rope, positions",
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            64,
        ),
    ],
)
def test_scaled_positions_count(rope, positions):
    config = LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4} | rope)
    assert positions_of(config) == positions
