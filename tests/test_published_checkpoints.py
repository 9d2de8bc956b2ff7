"""Checkpoints as public bug reports describe them: served as plain transformers does, or refused with why."""

import ast
import json
import logging
import re
from pathlib import Path

import architectures
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, byte_tokenizer, save_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers.load_state_dict import CheckpointError, convert
from helpers.load_state_dict.checkpoint_keys import computed_tensor
from helpers.model_handler import AnsweringOptions, Failure, LanguageModelHandler
from helpers.model_handler.engines.generation_settings import held, not_honoured
from helpers.model_handler.engines.neighbours import Company
from helpers.model_handler.language_model import LanguageModel
from helpers.models import ModelError, resolve
from helpers.models.architecture import architecture_of, read_config
from helpers.models.checkpoint_files import files_to_download, is_companion
from helpers.sizing import size_model

PROMPTS = [
    "Hi",
    "What is the capital of France?",
    "é",
    "Write one long sentence about the sea please.",
    "a b",
]
NEW_TOKENS = 12


def spread(model, std: float = 0.25):
    """Random weights that tell prompts apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def save(model, folder: Path, *, chat: bool) -> Path:
    spread(model).save_pretrained(folder)
    byte_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def converted(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}.pt"
    convert(str(folder), path, "float32", progress=False)
    return path


def language_model(folder: Path) -> LanguageModel:
    options = {"max_response_tokens": NEW_TOKENS, "device": "cpu", "dtype": "float32"}
    return LanguageModelHandler(str(converted(folder)), **options).load_model()


def answers(folder: Path, prompts=PROMPTS, **options) -> list[str]:
    options = AnsweringOptions(**({"max_response_tokens": NEW_TOKENS} | options))
    found = language_model(folder).ask(prompts, options)
    return [one.error if isinstance(one, Failure) else one.text for one in found]


def plain_answers(folder: Path, prompts=PROMPTS, **settings) -> list[str]:
    is_encoder_decoder = read_config(folder).is_encoder_decoder
    automatic = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model, tokenizer = automatic.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        if tokenizer.chat_template and not is_encoder_decoder:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1} | settings
        with torch.inference_mode():
            output = model.generate(**inputs, **greedy)
        start = 0 if is_encoder_decoder else inputs["input_ids"].shape[1]
        found.append(tokenizer.decode(output[0, start:], skip_special_tokens=True).strip())
    return found


# The order of experts


MOE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 3,
    "eos_token_id": 4,
}


@pytest.mark.parametrize("experts", [12, 130])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_keep_their_order_however_many_there_are(kind, experts, tmp_path):
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=experts))
    else:
        sizes = {"moe_intermediate_size": 16, "num_experts": experts, "num_experts_per_tok": 2, "head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE | sizes))
    folder = save(model, tmp_path / "moe", chat=True)
    assert any(".11." in name for name in load_file(folder / "model.safetensors")), "stored one by one"
    written = torch.load(converted(folder), weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor), name
    assert answers(folder) == plain_answers(folder)


# What a file holds besides weights


def test_float8_weights_whose_scales_stand_beside_them_are_refused(tmp_path):
    save_checkpoint("llama", tmp_path / "fp8")
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"scale_inv\. The weights are quantized"):
        converted(tmp_path / "fp8")


@pytest.mark.parametrize(
    "beside",
    [
        *("weight_scale", "input_scale", "qzeros", "scales", "g_idx", "SCB", "weight.absmax"),
        *("weight.quant_state.bitsandbytes__nf4", "weight_packed", "weight_zero_point"),
    ],
)
def test_whatever_stands_beside_quantized_weights_is_recognised(beside, tmp_path):
    save_checkpoint("llama", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    more = {f"model.layers.0.mlp.down_proj.{beside}": torch.ones(2)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="quantized"):
        converted(tmp_path / "q")


@pytest.mark.parametrize("name", ["vision_model.logit_scale", "model.layers.0.layer_scale", "std_scale"])
def test_other_tensors_that_scale_are_only_left_out(name, tmp_path, capsys):
    save_checkpoint("llama", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2)}, file, metadata={"format": "pt"})
    converted(tmp_path / "q")
    assert f"such as {name}" in capsys.readouterr().out


def test_whole_numbers_in_the_place_of_weights_are_refused(tmp_path):
    save_checkpoint("llama", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds int8\. The weights are quantized"):
        converted(tmp_path / "q")


def test_adapters_are_named_and_how_to_merge_them(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (tmp_path / "alone").mkdir()
    change_json(tmp_path / "alone" / "adapter_config.json", **adapter)
    with pytest.raises(ModelError, match=r"an adapter, and no model: merge it .*merge_and_unload"):
        resolve(str(tmp_path / "alone"))
    save_checkpoint("llama", tmp_path / "beside")
    change_json(tmp_path / "beside" / "adapter_config.json", **adapter)
    with pytest.raises(ModelError, match=r"an adapter beside a model: .* remove adapter_config.json"):
        converted(tmp_path / "beside")
    save_checkpoint("llama", tmp_path / "unmerged")
    file = tmp_path / "unmerged" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)
    tensors[name.replace(".weight", ".lora_A.default.weight")] = torch.ones(2, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="adapter that is not merged"):
        converted(tmp_path / "unmerged")


# What a file may lack


def marian(folder: Path) -> Path:
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "decoder_start_token_id": 0}
    config = MarianConfig(vocab_size=VOCABULARY, decoder_vocab_size=VOCABULARY, **sizes, **tokens)
    config.forced_eos_token_id = None
    return save(MarianMTModel(config), folder, chat=False)


BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}


def test_positions_that_a_model_computes_need_not_be_in_the_file(tmp_path):
    folder = marian(tmp_path / "marian")
    assert not [name for name in load_file(folder / "model.safetensors") if "embed_positions" in name]
    assert answers(folder) == plain_answers(folder)


def test_a_base_models_pickle_without_prefix_bias_and_head_is_complete(tmp_path):
    model = spread(BartForConditionalGeneration(BartConfig(**BART)))
    folder = save(model, tmp_path / "bart", chat=False)
    (folder / "model.safetensors").unlink()
    base = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    torch.save(base, folder / "pytorch_model.bin")
    assert answers(folder) == plain_answers(folder)


def test_only_what_a_model_computes_alike_each_time_may_be_missing():
    empty = architecture_of(BartConfig(**BART)).empty_model()
    bias = computed_tensor(empty, "final_logits_bias")
    assert bias.shape == (1, VOCABULARY) and not bias.any()
    assert computed_tensor(empty, "model.shared.weight") is None, "it is random"


def test_a_file_without_weights_that_the_model_needs_is_refused_still(tmp_path):
    folder = marian(tmp_path / "marian")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.encoder.layers.0.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 of the"):
        converted(folder)


# The publisher's generation settings


def test_settings_that_stand_in_config_json_alone_hold(tmp_path):
    model = BartForConditionalGeneration(BartConfig(**BART))
    folder = save(model, tmp_path / "bart", chat=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["final_logits_bias"] = torch.zeros(1, VOCABULARY)
    tensors["final_logits_bias"][0, 1] = 14.0  # it ends early, unless told not to
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()
    settings = {"min_length": 8, "forced_bos_token_id": 3, "no_repeat_ngram_size": 3, "num_beams": 4}
    change_json(folder / "config.json", **settings, early_stopping=True, length_penalty=2.0, max_length=30)
    found = answers(folder)
    assert found == plain_answers(folder)
    assert found != plain_answers(folder, min_length=0)


def test_settings_that_change_what_generate_returns_change_no_answer(tmp_path):
    for kind in ("llama", "t5_tied"):
        folder = tmp_path / kind
        save_checkpoint(kind, folder)
        expected = plain_answers(folder)
        returned = {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
        many = {"num_return_sequences": 3, "num_beams": 3, "penalty_alpha": 0.6, "max_time": 0.001}
        change_json(folder / "generation_config.json", **returned, **many)
        assert answers(folder) == expected


def test_text_to_stop_at_is_heeded(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    free = plain_answers(folder)
    stop = next(character for character in free[1] if character.isascii() and character.isprintable())
    change_json(folder / "generation_config.json", stop_strings=[stop])
    found = answers(folder)
    assert found == plain_answers(folder, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert found != free


def test_settings_that_do_not_hold_are_named_once_when_the_model_is_loaded(tmp_path, caplog):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    settings = {"temperature": 0.6, "do_sample": True, "repetition_penalty": 1.1, "min_p": 0.1}
    change_json(folder / "generation_config.json", **settings)
    with caplog.at_level(logging.WARNING, logger="helpers"):
        language_model(folder).ask(PROMPTS[:2])
    [line] = [record.message for record in caplog.records if "do not hold" in record.message]
    assert all(name in line for name in ("temperature=0.6", "do_sample=True", "min_p=0.1"))
    assert "repetition_penalty" not in line


def test_the_rule_of_settings_covers_all_that_transformers_knows():
    config = transformers.GenerationConfig(repetition_penalty=1.5, num_beams=4, output_scores=True, top_k=7)
    assert held(config).repetition_penalty == 1.5
    assert held(config).num_beams is None
    assert not_honoured(config) == {"num_beams": 4, "top_k": 7}
    assert not_honoured(transformers.GenerationConfig()) == {}


def test_text_to_stop_at_costs_no_batch(tmp_path):
    folder, batches = tmp_path / "llama", []
    save_checkpoint("llama", folder)
    change_json(folder / "generation_config.json", stop_strings=["zz"], min_length=3, forced_eos_token_id=4)
    options = AnsweringOptions(max_response_tokens=NEW_TOKENS)
    language_model(folder).ask(PROMPTS, options, on_batch=batches.append)
    assert [batch.size for batch in batches] == [len(PROMPTS)]


def test_padding_that_is_an_ordinary_token_is_no_part_of_an_answer(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    expected = plain_answers(folder)
    ends = [AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token) for token in ("<|end|>", "a")]
    for name in ("generation_config.json", "config.json"):
        change_json(folder / name, eos_token_id=ends, pad_token_id=None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            change_json(folder / name, pad_token=None, eos_token=None)
    model = language_model(folder)
    options = AnsweringOptions(max_response_tokens=NEW_TOKENS)
    alone = [model.ask([prompt], options)[0] for prompt in PROMPTS]
    assert model.ask(PROMPTS, options) == alone
    assert len(expected) == len(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model_type", "company"),
    [("recurrent_gemma", Company.SAME_LENGTH), ("rwkv", Company.NONE), ("jamba", Company.ANY)],
)
def test_which_company_answers_bear_is_found_in_any_dtype(model_type, company, dtype, tmp_path):
    config = architectures.small_config(model_type)
    folder = tmp_path / "model"
    architectures._random_model(config, architecture_of(config), folder)
    options = {"max_response_tokens": NEW_TOKENS, "device": "cpu", "dtype": dtype}
    model = LanguageModelHandler(str(converted(folder)), **options, cache_dir=str(tmp_path)).load_model()
    assert model._bears() is company


# Tokenizers


def test_other_files_are_not_taken_for_a_tokenizer(tmp_path, capsys):
    folder = tmp_path / "llama"
    spread(MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=2))).save_pretrained(folder)
    for name in ("trainer_state.json", "all_results.json", "LICENSE.txt"):
        (folder / name).write_text("{}")
    converted(folder)
    assert "No tokenizer in" in capsys.readouterr().out


def test_a_tokenizer_with_neither_a_pad_nor_an_end_token_is_enough(tmp_path):
    folder = tmp_path / "gpt1"
    config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    spread(OpenAIGPTLMHeadModel(config)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    assert answers(folder) == plain_answers(folder)


def test_a_padding_token_outside_the_vocabulary_costs_no_batch(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    expected = plain_answers(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == VOCABULARY
    batches = []
    model = language_model(folder)
    found = model.ask(
        PROMPTS,
        AnsweringOptions(max_response_tokens=NEW_TOKENS),
        on_batch=batches.append,
    )
    assert [one.text for one in found] == expected
    assert [batch.size for batch in batches] == [len(PROMPTS)], "no batch was halved"


def test_a_token_that_the_model_has_no_embedding_for_fails_its_prompt_alone(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    expected = plain_answers(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    found = answers(folder, [*PROMPTS, "a zebra"])
    assert found[:-1] == expected
    assert "the tokenizer has the token 261, but the model only 261" in found[-1]


def test_every_name_that_a_tokenizer_of_transformers_reads_goes_along():
    named = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        if match := re.search(r"^VOCAB_FILES_NAMES = (\{.*?\})", path.read_text(), re.DOTALL | re.MULTILINE):
            named |= set(ast.literal_eval(match[1]).values())
    assert {"spiece.model", "vocab.json", "source.spm", "bpe.codes", "prophetnet.tokenizer"} <= named
    assert [name for name in named if not is_companion(name)] == []
    weights = ["consolidated.safetensors", "model.safetensors", "pytorch_model.bin", "x/model.safetensors"]
    assert files_to_download([*weights, "source.spm"]) == ["model.safetensors", "source.spm"]


def test_a_tokenizer_that_cannot_be_loaded_stops_the_conversion(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be loaded"):
        converted(folder)
    assert not (tmp_path / "llama.pt").exists()


# Limits


def test_empty_tensors_and_infinite_bounds_are_no_damage(tmp_path):
    from helpers.load_state_dict.rounding import RoundingError, RoundingReport, rounded

    [empty] = rounded(torch.empty(0, 4), torch.float16, "weight", RoundingReport())
    assert (empty.numel(), empty.dtype) == (0, torch.float16)
    bounds = torch.tensor([-torch.inf, 1.0, torch.inf])
    [kept] = rounded(bounds, torch.float16, "input_max", RoundingReport(), may_be_infinite=True)
    assert torch.equal(kept.float(), bounds)
    with pytest.raises(RoundingError, match="NaN or infinity"):
        list(rounded(bounds, torch.float16, "weight", RoundingReport()))
    with pytest.raises(RoundingError, match="NaN or infinity"):
        list(rounded(bounds * torch.nan, torch.float16, "x", RoundingReport(), may_be_infinite=True))


def test_positions_of_minus_one_are_no_limit(tmp_path):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    model = language_model(folder)
    model.engine.config.max_position_embeddings = -1
    [answer] = model.ask(["a" * 600], AnsweringOptions(max_response_tokens=2))
    assert not isinstance(answer, Failure)


def test_a_prompt_beyond_an_encoders_positions_is_told(tmp_path):
    folder = save(BartForConditionalGeneration(BartConfig(**BART)), tmp_path / "bart", chat=False)
    found = answers(folder, ["x" * 200, "Hi"])
    assert found == ["the prompt has 201 tokens, but the limit is 128", plain_answers(folder, ["Hi"])[0]]


def test_a_response_ends_where_a_decoder_has_no_more_positions(tmp_path):
    folder = save(BartForConditionalGeneration(BartConfig(**BART)), tmp_path / "bart", chat=False)
    change_json(folder / "generation_config.json", eos_token_id=None, forced_eos_token_id=None)
    [answer] = language_model(folder).ask(["Hi"], AnsweringOptions(max_response_tokens=500))
    assert answer.response_tokens == 127


def test_an_encoder_without_limits_does_not_take_all_memory(tmp_path):
    save_checkpoint("t5_tied", tmp_path / "t5")
    limit = int(512 * 32**0.5)
    [answer] = answers(tmp_path / "t5", ["w" * 12_000])
    assert answer == f"the prompt has 12001 tokens, but the limit is {limit}"


def test_a_prompt_far_over_the_limit_is_refused_unread(tmp_path, monkeypatch):
    folder = tmp_path / "llama"
    save_checkpoint("llama", folder)
    model = language_model(folder)
    with monkeypatch.context() as unread:
        unread.setattr(type(model.tokenizer), "__call__", lambda *_, **__: pytest.fail("it was tokenized"))
        [answer] = model.ask(["w" * 9_900_000], AnsweringOptions(max_response_tokens=2))
    assert answer.error.startswith("the prompt has 9,900,000 characters, too many")
    cut = AnsweringOptions(max_response_tokens=2, truncate=True)
    [answer] = model.ask(["w" * 9_900_000], cut)
    assert answer.prompt_tokens == 510


# One rule for all steps


def test_a_models_own_code_is_refused_at_once_by_all_steps(tmp_path, monkeypatch):
    folder = tmp_path / "custom"
    save_checkpoint("llama", folder)
    change_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "configuration_my.X"})
    (folder / "configuration_my.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for step in (size_model, lambda name: convert(name, tmp_path / "m.pt", progress=False)):
        with pytest.raises(ModelError, match=r"whose code comes with it .* never run here"):
            step(str(folder))
