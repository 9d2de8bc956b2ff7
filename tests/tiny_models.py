"""Tiny checkpoints of every kind of model that the project serves, with a tokenizer of their own."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<pad>", "</s>", "<unk>", "<|start|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


def byte_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """One token for each byte; a sentence ends with </s>, or is wrapped by the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if not chat:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>" if chat else "</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|start|>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


VOCABULARY = len(SPECIAL) + 256


def t5(*, distinct_head: bool) -> T5ForConditionalGeneration:
    """A T5; with `distinct_head` its output layer differs from its embeddings, as flan-t5's does."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=not distinct_head,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # Random weights say the same to every prompt; larger ones tell prompts apart.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        if distinct_head:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    return model


def llama(width: int = 32) -> LlamaForCausalLM:
    """A Llama whose head is its embeddings, with grouped-query attention."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=4,
    )
    return LlamaForCausalLM(config)


KINDS = {
    "t5_distinct": lambda: (t5(distinct_head=True), byte_tokenizer(chat=False)),
    "t5_tied": lambda: (t5(distinct_head=False), byte_tokenizer(chat=False)),
    "llama": lambda **shape: (llama(**shape), byte_tokenizer(chat=True)),
}


def save_checkpoint(kind: str, folder: str | Path, **shape: int) -> PreTrainedModel:
    """Writes an ordinary checkpoint of a kind, and returns the model that it holds, ready to generate."""
    model, tokenizer = KINDS[kind](**shape)
    config = model.config
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()
