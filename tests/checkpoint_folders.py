"""Small checkpoint folders of every kind that can be converted."""

import json
from pathlib import Path

import gguf
import numpy as np
import tiny_models
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)


def save_t5(folder: Path, distinct_head: bool = True, **save_options) -> PreTrainedModel:
    """An encoder-decoder model, whose head differs from its embedding unless asked otherwise."""
    model = _save(tiny_models.t5(distinct_head=distinct_head), folder, save_options)
    # transformers 5 writes "tie_word_embeddings": true for every T5; published configs say what is true.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"tie_word_embeddings": not distinct_head}))
    return model


def save_llama(folder: Path, tied: bool = True, **save_options) -> PreTrainedModel:
    """A causal model with grouped-query attention and a chat template."""
    model = tiny_models.llama()
    if not tied:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    return _save(model, folder, save_options, chat=True)


def save_gpt2(folder: Path) -> PreTrainedModel:
    """A causal model whose published checkpoints lack the `transformer.` prefix."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=tiny_models.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1
    )
    return _save(GPT2LMHeadModel(config), folder, {})


def save_mixtral(folder: Path) -> PreTrainedModel:
    """A mixture of experts: checkpoints hold each expert apart, the model holds a layer's in one tensor."""
    torch.manual_seed(4)
    config = MixtralConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        eos_token_id=1,
    )
    return _save(MixtralForCausalLM(config), folder, {})


def write_gguf(path: Path) -> None:
    """A tiny Llama with quantized weights, as llama.cpp stores it."""
    sizes = {
        "vocabulary": tiny_models.VOCABULARY + 1,
        "hidden": 64,
        "intermediate": 128,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(256)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_feed_forward_length(sizes["intermediate"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_rope_dimension_count(sizes["hidden"] // sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes["vocabulary"])
    vocabulary = tiny_models.byte_tokenizer(chat=True).get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny_models.SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(0)
    hidden, kv = sizes["hidden"], sizes["hidden"] // sizes["heads"] * sizes["kv_heads"]
    shapes = {"token_embd": (sizes["vocabulary"], hidden), "output_norm": (hidden,)}
    for layer in range(sizes["layers"]):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "ffn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (kv, hidden),
                "attn_v": (kv, hidden),
                "attn_output": (hidden, hidden),
                "ffn_gate": (sizes["intermediate"], hidden),
                "ffn_up": (sizes["intermediate"], hidden),
                "ffn_down": (hidden, sizes["intermediate"]),
            }.items()
        }
    random_numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random_numbers.standard_normal(shape, dtype=np.float32) * 0.1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _save(model: PreTrainedModel, folder: Path, save_options: dict, chat: bool = False) -> PreTrainedModel:
    model.save_pretrained(folder, **save_options)
    tiny_models.byte_tokenizer(chat=chat).save_pretrained(folder)
    return model
