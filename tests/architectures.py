"""Small configs of every text architecture that transformers registers, made from the registry.

    python tests/architectures.py    tries each, and writes helpers/models/ARCHITECTURES.md anew

A config class says by its defaults which sizes it has; those are made small. What does not fit together then
is in `ADJUSTED`, by model type.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    EncoderDecoderConfig,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

import helpers
from helpers.load_state_dict import LoadError, convert
from helpers.load_state_dict.engine_file import EngineError, why_not
from helpers.model_handler import LanguageModelHandler, served_model
from helpers.model_handler.engines.ctranslate2_engine import DisagreementError
from helpers.models import ModelError, architecture_of
from helpers.sizing import size_model

TABLE = Path(helpers.__file__).parent / "models" / "ARCHITECTURES.md"
PROMPTS = [
    "Hi",
    "What is the capital of France?",
    "é",
    "Write one long sentence about the deep blue sea please.",
    "a b",
]
NEW_TOKENS = 12
MOST_PARAMETERS = 8_000_000
VOCABULARY = tiny_models.VOCABULARY
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "decoder_start_token_id": 0}

_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size", "dim_model"),
    *("hidden_dim", "attention_hidden_size", "lru_width", "out_hidden_size"),
)
_INNER = (
    *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("ffn_hidden_size", "dff", "intermediate_size_mlp", "d_inner", "mlp_hidden_size"),
)
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers", "depth"),
)
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
)
_HEAD_WIDTHS = (
    *("head_dim", "d_kv", "attention_head_dim", "d_head", "kv_channels", "qk_nope_head_dim", "v_head_dim"),
    *("index_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
)
_EXPERT_WIDTHS = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    "shared_experts_intermediate_size",
)
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_encoder_position_embeddings"),
    "max_decoder_position_embeddings",
)
# More than ten experts: in the order of their names as text, the eleventh comes before the second.
EXPERTS = 12
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

SMALL = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(_HEAD_WIDTHS, 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(_EXPERTS, EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "linear_num_key_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(_EXPERT_WIDTHS, 16),
    **dict.fromkeys(_POSITIONS, 256),
    **dict.fromkeys(("sliding_window", "index_topk", "attention_chunk_size"), 64),
    "image_size": 28,
    "patch_size": 14,
    "hidden_size_per_layer_input": 8,
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64}
_VISION = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 32}
_VISION |= {"num_hidden_layers": 1, "num_attention_heads": 2, "model_type": "siglip_vision_model"}
ADJUSTED = {
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    **{name: {"rotary_dim": 4} for name in ("codegen", "gptj")},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "num_attention_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 1, "image_token_index": 252},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | {"mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "linear_attn_config": {
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "kda_layers": [1],
            "full_attn_layers": [2],
        }
    },
    "led": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 16},
    "nemotron": {"num_key_value_heads": 2},
    **{name: {"num_hidden_layers": 4} for name in ("lfm3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": _HYBRID,
    "zamba2": _HYBRID
    | {"mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """The types of every causal and encoder-decoder model that transformers registers."""
    names = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return sorted({name for mapping in names for name in mapping})


def small_config(model_type: str) -> PretrainedConfig:
    """A small config of a type; what a config of its kind refuses, it raises."""
    if model_type == "encoder-decoder":
        return _two_berts()
    return _small(CONFIG_MAPPING[model_type])


def _small(kind: type[PretrainedConfig]) -> PretrainedConfig:
    base = kind()
    values = {
        name: value
        for name, value in SMALL.items()
        if not isinstance(getattr(kind, name, None), property) and _has_number(base, name)
    }
    if hasattr(base, "kv_lora_rank"):  # multi-head latent attention rotates a part of each head
        values |= {"num_key_value_heads": 4} | ({"head_dim": 4} if "head_dim" in values else {})
    for name, value in TOKENS.items():
        if hasattr(base, name) and not isinstance(getattr(base, name), list):
            values[name] = value
    for name, part in (kind.sub_configs or {}).items():
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part is not AutoConfig:
            values[name] = _small(part)
    return kind(**values | ADJUSTED.get(base.model_type, {}))


def _has_number(config: PretrainedConfig, name: str) -> bool:
    try:
        value = getattr(config, name)
    except Exception:  # absent, or of several values
        return False
    return isinstance(value, int) and not isinstance(value, bool)


def _two_berts() -> PretrainedConfig:
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 256}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    )
    for name, value in TOKENS.items():
        setattr(config, name, value)
    return config


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture.

    Attributes:
        result: `served`, `refused` or `not tried`.
        detail: which prompts may share a batch; or the reason.
        wrong: what was not as it should be; empty if all was.
        engines: which of them compute it; where CTranslate2 knows it and does not, what happens.
    """

    result: str
    detail: str
    wrong: str = ""
    engines: str = ""


def attempt(model_type: str, folder: Path) -> Outcome:
    """Converts, loads and asks a tiny random model of a type, beside plain transformers."""
    try:
        config = small_config(model_type)
    except Exception as error:
        return Outcome("not tried", f"no small config: {_line(error)}")
    try:
        architecture = architecture_of(config)
    except ModelError as error:
        return Outcome("refused", str(error), _refusals_differ(config, folder, str(error)))
    try:
        model = _random_model(config, architecture, folder)
        if model is None:
            return Outcome("not tried", "no small config: its parts stay large")
        plain, theirs = _plain_answers(config, folder)
    except Exception as error:
        return Outcome("not tried", f"plain transformers: {_line(error)}")
    size_model(str(folder))
    path = folder.parent / "model.pt"
    convert(str(folder), path, "float32", progress=False)
    written, expected = torch.load(path, weights_only=True), model.state_dict()
    different = [name for name, value in expected.items() if not torch.equal(written[name], value)]
    missing = plain.state_dict().keys() - written.keys()
    company, wrong = _answers(str(path), "torch", theirs)
    wrong += [f"tensors differ: {different[:3]}"] if different or missing else []
    try:
        if "does not know" in why_not(path.with_suffix("")):  # of most: without a look at their files
            return Outcome("served", company, "; ".join(wrong), "torch")
        _, more = _answers(str(path), "ctranslate2", theirs)
        engines, wrong = "both", wrong + more
    except DisagreementError:
        engines = "torch (CTranslate2's answers differ)"
    except (EngineError, LoadError) as error:
        reasons = {
            "attention windows": " (attention windows)",
            "positions": " (positions)",
            "": " (CTranslate2's converter fails)",
        }
        engines = "torch" + next(text for words, text in reasons.items() if words in str(error))
    return Outcome("served", company, "; ".join(wrong), engines)


def _answers(path: str, engine: str, theirs: list[str]) -> tuple[str, list[str]]:
    """Which prompts may share a batch, and which answers of an engine are not plain transformers'."""
    handler = LanguageModelHandler(
        path, max_response_tokens=NEW_TOKENS, device="cpu", dtype="float32", engine=engine
    )
    language_model = handler.load_model()
    try:
        together = [result.inference for result in handler.run_inference(PROMPTS, language_model)]
        alone = [
            result.inference
            for prompt in PROMPTS
            for result in handler.run_inference([prompt], language_model)
        ]
        company = language_model._bears().value
    finally:
        served_model._served.clear()
    wrong = [f"{engine}, alone: {alone} rather than {theirs}"] if alone != theirs else []
    wrong += [f"{engine}, together: {together} rather than {theirs}"] if together != theirs else []
    return company, wrong


def _random_model(config, architecture, folder: Path):
    """Writes a checkpoint whose answers tell prompts apart; None if it is not small."""
    if sum(p.numel() for p in architecture.empty_model().parameters()) > MOST_PARAMETERS:
        return None
    torch.manual_seed(0)
    model = architecture.model_class(architecture.config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        computed = (
            model._keys_to_ignore_on_save or ()
        )  # by the model itself, so that they are not in its file
        for name, parameter in model.named_parameters():
            if name in computed:
                continue
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.generation_config.update(**TOKENS)
    if not config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = None
    model.save_pretrained(folder)
    if architecture.config is not config:
        config.save_pretrained(folder)  # as published: the text model inside its wrapper
    tokenizer = tiny_models.byte_tokenizer(chat=not config.is_encoder_decoder)
    if not config.is_encoder_decoder:  # what all prompts begin with, computed once
        tokenizer.chat_template = "{{ 'You are brief. ' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return model


def _plain_answers(config, folder: Path):
    automatic = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = automatic.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        if config.is_encoder_decoder:
            inputs, start = tokenizer(prompt, return_tensors="pt"), 0
        else:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            start = inputs["input_ids"].shape[1]
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
        answers.append(tokenizer.decode(output[0, start:], skip_special_tokens=True).strip())
    return model, answers


def _refusals_differ(config: PretrainedConfig, folder: Path, reason: str) -> str:
    """What sizing, converting and loading say of a config that is refused, if it is not the same."""
    from helpers.load_state_dict.mapped_model import load_model

    config.save_pretrained(folder)
    torch.save({}, folder / "pytorch_model.bin")
    steps = {
        "sizing": lambda: size_model(str(folder)),
        "converting": lambda: convert(str(folder), folder.parent / "model.pt", progress=False),
        "loading": lambda: load_model(folder / "pytorch_model.bin", folder),
    }
    for step, run in steps.items():
        try:
            run()
        except ModelError as error:
            if str(error) != reason:
                return f"{step} says: {error}"
        else:
            return f"{step} accepts it"
    return ""


def _line(error: Exception) -> str:
    text = " ".join((str(error) or type(error).__name__).split())
    return text[:100] + ("..." if len(text) > 100 else "")


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as a page in Markdown."""
    kinds = ("served", "refused", "not tried")
    counts = ", ".join(f"{sum(one.result == kind for one in outcomes.values())} {kind}" for kind in kinds)
    head = f"""\
# Architectures

Every causal and encoder-decoder architecture that transformers {transformers.__version__} registers, each as
a tiny random model (with {EXPERTS} experts where it has any): converted, loaded, and asked {len(PROMPTS)}
prompts alone and together in float32. *Served* means that the state dict and every answer are plain
transformers', with torch and, where it says both, with CTranslate2. Where CTranslate2's converter fails, or
what it computes is found to differ when it is loaded, torch serves. *Refused* means that sizing, converting
and loading refuse it with the same sentence. *Not tried*: no small model of it could be built here, or plain
transformers does not answer with it.

{counts}. Made by `python tests/architectures.py`; a test holds it to what is so.

| model type | result | engines | |
|---|---|---|---|
"""
    rows = [
        f"| {name} | {one.result} | {one.engines} | {one.detail} |" for name, one in sorted(outcomes.items())
    ]
    return head + "\n".join(rows) + "\n"


def quiet() -> None:
    """Keeps transformers' reports of random models out of the output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Tries every architecture, and writes the table."""
    quiet()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcomes = {}
    for model_type in model_types():
        folder = Path(tempfile.mkdtemp())
        try:
            outcomes[model_type] = attempt(model_type, folder / "checkpoint")
        finally:
            shutil.rmtree(folder)
        print(model_type, outcomes[model_type], flush=True)
    TABLE.write_text(table(outcomes))


if __name__ == "__main__":
    main()
