"""Parameters, caches and activations computed from a config, against real models."""

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    MT5Config,
    PretrainedConfig,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from helpers.models import ModelError, architecture_of, load_config
from helpers.sizing.model_memory import (
    SizingError,
    activation_bytes,
    kv_cache_bytes,
    parameter_count,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TINY_T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "llama with tied head and wide heads": LlamaConfig(**TINY, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
    "qwen3 moe": Qwen3MoeConfig(**TINY, **EXPERTS, head_dim=8, num_experts=4, decoder_sparse_step=1),
    "deepseek": DeepseekV3Config(
        **TINY | {"num_key_value_heads": 4}, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "t5": T5Config(**TINY_T5, tie_word_embeddings=True),
    "bart": BartConfig(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    ),
}  # fmt: skip
BATCH, PROMPT, RESPONSE = 3, 13, 5


@pytest.fixture(autouse=True, scope="module")
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("google/flan-t5-small", 76_961_152),
        ("google/flan-t5-base", 247_577_856),
        ("google/flan-t5-large", 783_150_080),
        ("google/flan-t5-xl", 2_849_757_184),
        ("google/flan-t5-xxl", 11_135_332_352),
        ("google/flan-ul2", 19_591_209_984),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_parameters_are_counted_as_published(model, parameters):
    assert parameter_count(load_config(model)).checkpoint == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_a_real_model(name):
    config = CONFIGS[name]
    model = architecture_of(config).model_class(config)
    assert parameter_count(config).checkpoint == sum(p.numel() for p in model.parameters())


def test_tied_heads_count_once_and_separate_ones_twice():
    head = 64 * 32
    tied = parameter_count(LlamaConfig(**TINY, tie_word_embeddings=True)).checkpoint
    assert parameter_count(LlamaConfig(**TINY, tie_word_embeddings=False)).checkpoint == tied + head
    tied = parameter_count(T5Config(**TINY_T5, tie_word_embeddings=True))
    separate = parameter_count(T5Config(**TINY_T5, tie_word_embeddings=False))
    assert separate.checkpoint == tied.checkpoint + head
    assert separate.built == tied.built == tied.checkpoint
    mt5 = parameter_count(MT5Config(**TINY_T5, tie_word_embeddings=False))
    assert mt5.checkpoint == mt5.built + head


def test_every_expert_of_a_mixture_counts():
    four, eight = (
        parameter_count(MixtralConfig(**TINY, num_local_experts=n, num_experts_per_tok=2)).checkpoint
        for n in (4, 8)
    )
    assert eight - four == 3 * (4 * 3 * 32 * 64 + 4 * 32)  # three layers; an expert's matrices and router row


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_is_as_large_as_the_real_one(name):
    # The last token that is generated is not read again. An encoder-decoder starts with one more.
    steps = RESPONSE if CONFIGS[name].is_encoder_decoder else RESPONSE - 1
    predicted = kv_cache_bytes(CONFIGS[name], BATCH, PROMPT, steps, "float32")
    assert predicted == real_cache_bytes(CONFIGS[name])
    assert kv_cache_bytes(CONFIGS[name], BATCH, PROMPT, steps, "bfloat16") == predicted // 2


def test_a_sliding_window_bounds_the_cache():
    config = Gemma3TextConfig(**TINY, head_dim=8, sliding_window=8, sliding_window_pattern=3)
    real = real_cache_bytes(config)
    full = kv_cache_bytes(LlamaConfig(**TINY), BATCH, PROMPT, RESPONSE - 1, "float32")
    assert real <= kv_cache_bytes(config, BATCH, PROMPT, RESPONSE - 1, "float32") < min(1.1 * real, full)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_grow_with_the_batch(name):
    one, ten = (activation_bytes(CONFIGS[name], n, PROMPT, RESPONSE, "float32") for n in (1, 10))
    assert 0 < one < ten <= 10 * one


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ViTConfig(), "'vit' models do not generate text"),
        (WhisperConfig(), "'whisper' models do not generate text"),
        (LlavaConfig(), "'llava' models do not generate text"),
        (BertConfig(), "'bert' models are encoders"),
    ],
)
def test_kinds_that_do_not_turn_text_into_text_are_refused(config, reason):
    with pytest.raises(ModelError, match=rf"{reason}.*use a causal"):
        parameter_count(config)


def test_a_quantized_checkpoint_is_refused():
    config = LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized"):
        parameter_count(config)


def test_a_model_without_attention_takes_less_than_one_with_it():
    config = MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=64, state_size=16)
    state = 3 * (config.intermediate_size * (config.state_size + config.conv_kernel)) * 4
    assert state < kv_cache_bytes(config, 1, 512, 256, "float32") == 3 * 2 * 32 * 768 * 4


def test_a_config_that_does_not_say_its_sizes_is_refused():
    with pytest.raises(SizingError, match="cannot be computed"):
        kv_cache_bytes(PretrainedConfig(), 1, 8, 8, "float16")


def real_cache_bytes(config) -> int:
    model = architecture_of(config).model_class(config).eval()
    tokens = torch.randint(3, 60, (BATCH, PROMPT))
    cache = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=RESPONSE,
        max_new_tokens=RESPONSE,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
    ).past_key_values
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache] if config.is_encoder_decoder else [cache]
    )
    return sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)
