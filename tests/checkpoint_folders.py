"""Checkpoint folders of every kind that can be converted: small ones, and random weights of real shapes."""

import json
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)


def save_t5(folder: Path, distinct_head: bool = True, **save_options) -> PreTrainedModel:
    """An encoder-decoder model, whose head differs from its embedding unless asked otherwise."""
    model = _save(tiny_models.t5(distinct_head=distinct_head), folder, save_options)
    # transformers 5 writes "tie_word_embeddings": true for every T5; published configs say what is so.
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


def _save(model: PreTrainedModel, folder: Path, save_options: dict, chat: bool = False) -> PreTrainedModel:
    model.save_pretrained(folder, **save_options)
    tiny_models.byte_tokenizer(chat=chat).save_pretrained(folder)
    return model


def save_random(folder: Path, config: dict, shards: int = 2) -> None:
    """A float32 checkpoint of a real encoder-decoder model's shapes, for little more than writing it:
    its weights repeat one block of random numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_models.byte_tokenizer(chat=False).save_pretrained(folder)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config.from_pretrained(folder))
    duplicates = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in duplicates}
    block = torch.randn(2**22) * 0.05
    weight_map = {}
    names = list(shapes)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Every other layer, so that the shards are of about one size.
        held = names[shard::shards]
        tensors = {}
        for name in held:
            size = shapes[name].numel()
            tensors[name] = block.repeat(-(-size // block.numel()))[:size].reshape(shapes[name])
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
