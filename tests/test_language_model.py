"""A model's answers are those of plain transformers, by whatever engine and however they are batched."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, save_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from helpers.load_state_dict import convert
from helpers.load_state_dict.mapped_model import LoadError, load_model
from helpers.model_handler import AnsweringOptions, Failure, Response
from helpers.model_handler.answers import batches_by_length
from helpers.model_handler.engines.packed_weights import why_not_packed
from helpers.model_handler.hardware import choose_device, choose_dtype
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.served_model import ModelSource

PROMPTS = ["Hi", "What is the capital of France?", "é", "Write one sentence about the sea.", "a b"]
OPTIONS = AnsweringOptions(max_response_tokens=12)


@pytest.fixture(scope="module")
def state_dicts(tmp_path_factory):
    """A float32 state dict of each kind of model, by kind."""
    paths = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        save_checkpoint(kind, folder / "checkpoint")
        paths[kind] = folder / "model.pt"
        convert(str(folder / "checkpoint"), paths[kind], "float32", progress=False)
    return paths


@pytest.fixture(params=["torch", "torch_packed", "ctranslate2"])
def load(request):
    """Loads a state dict; each test of what all engines must do runs on each."""
    if request.param == "torch_packed" and (reason := why_not_packed(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    return functools.partial(load_with, request.param)


def load_with(engine, path, cache=None) -> LanguageModel:
    return ModelSource(str(path), dtype="float32", cache_dir=cache, engine=engine).load()[0]


def plain_transformers(checkpoint, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.chat_template:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
        inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    if tokenizer.chat_template:
        output = output[inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_length_are_answered_as_plain_transformers_answers_each(kind, state_dicts, load):
    model = load(state_dicts[kind])
    expected = [plain_transformers(state_dicts[kind].parent / "checkpoint", prompt) for prompt in PROMPTS]
    together = [answer.text for answer in model.ask(PROMPTS, OPTIONS)]
    alone = [model.ask([prompt], OPTIONS)[0].text for prompt in PROMPTS]
    assert together == alone == expected
    assert len(set(expected)) > 1, "the model says the same to every prompt: this test would not see a mix-up"


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_are_answered_so_too(kind, state_dicts, load):
    """T5 tells distances apart up to 128 tokens."""
    prompt = "Tell me more about the ships that cross the deep blue sea in every season of the year. " * 4
    expected = plain_transformers(state_dicts[kind].parent / "checkpoint", prompt)
    assert [answer.text for answer in load(state_dicts[kind]).ask(["Hi", prompt], OPTIONS)][1] == expected


def test_a_distinct_output_layer_survives_loading(state_dicts, load):
    """transformers 5 ties it when a T5 is built from its config: then the logits are another model's."""
    checkpoint = state_dicts["t5_distinct"].parent / "checkpoint"
    reference = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    loaded = load(state_dicts["t5_distinct"]).model
    assert not torch.equal(reference.lm_head.weight, reference.shared.weight)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    with torch.no_grad():
        # Another order of additions moves the last digits.
        torch.testing.assert_close(loaded(**inputs).logits, reference(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped where")
def test_weights_stay_mapped_from_the_file(state_dicts, load):
    model = load(state_dicts["llama"]).model
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        range(*(int(end, 16) for end in line[0].split("-")))
        for line in mapped
        if line[-1] == str(state_dicts["llama"])
    ]
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in part for part in ranges), f"{name} was copied"


def test_responses_count_their_tokens(state_dicts, load):
    model = load(state_dicts["llama"])
    [answer] = model.ask(["Hi"], AnsweringOptions(max_response_tokens=5))
    assert answer.prompt_tokens == len(model.encode("Hi"))
    assert 1 <= answer.response_tokens <= 5


def test_sampling_with_a_seed_is_repeatable_or_refused(state_dicts, load):
    model = load(state_dicts["llama"])
    sampled = AnsweringOptions(max_response_tokens=12, temperature=1.5, seed=7)
    if model.engine.name == "ctranslate2":
        with pytest.raises(LoadError, match="cannot repeat what it has sampled"):
            model.check(sampled)
        assert all(isinstance(answer, Failure) for answer in model.ask(PROMPTS, sampled))
        return
    assert model.ask(PROMPTS, sampled) == model.ask(PROMPTS, sampled)
    assert model.ask(PROMPTS, sampled) != model.ask(PROMPTS, OPTIONS)


@pytest.mark.parametrize("prompt", ["", "  \n", 5, None, "\ud800", "x" * 600])
def test_a_prompt_that_cannot_be_asked_fails_alone(prompt, state_dicts, load):
    answers = load(state_dicts["llama"]).ask(["Hi", prompt, "a b"], OPTIONS)
    assert [type(answer) for answer in answers] == [Response, Failure, Response]


def test_a_prompt_that_is_too_long_is_cut_if_asked_for(state_dicts, load):
    model = load(state_dicts["llama"])
    cut = AnsweringOptions(max_response_tokens=4, max_prompt_tokens=20, truncate=True)
    [answer] = model.ask(["é" * 600], cut)
    assert answer.prompt_tokens <= 20
    ids = model.encode("é" * 600, cut)
    assert model.tokenizer.decode(ids).endswith("<|end|><|start|>"), "the template must stay whole"


class FailsOn(LanguageModel):
    """Stands for a model on which certain prompts, or batches that are too large, fail."""

    def generate(self, prompts, options=None, *more):
        self.sizes.append(len(prompts))
        if len(prompts) > self.largest:
            raise torch.OutOfMemoryError("no memory")
        if any(len(prompt) == self.poison for prompt in prompts):
            raise RuntimeError("poison")
        return super().generate(prompts, options, *more)


def failing(load, path, *, poison=-1, largest=1000) -> FailsOn:
    model = load(path)
    model = FailsOn(model.engine, model.tokenizer)
    model.sizes, model.poison, model.largest = [], poison, largest
    return model


def test_a_prompt_over_the_batchs_budget_fails_rather_than_fill_the_memory(state_dicts, load):
    [answer] = load(state_dicts["t5_tied"]).ask(
        ["x" * 300], AnsweringOptions(max_response_tokens=12, max_batch_tokens=200)
    )
    assert "over the 200" in answer.error


def test_only_the_poisonous_prompt_of_a_batch_fails(state_dicts, load):
    model = failing(load, state_dicts["t5_tied"], poison=len("poison") + 1)
    answers = model.ask(["a", "bb", "poison", "dd", "e"], OPTIONS)
    assert [type(answer) for answer in answers] == [Response, Response, Failure, Response, Response]
    assert answers[2].error == "RuntimeError: poison"


def test_a_batch_without_memory_is_halved(state_dicts, load):
    model = failing(load, state_dicts["t5_tied"], largest=2)
    answers = model.ask(list("abcdefgh"), OPTIONS)
    assert all(isinstance(answer, Response) for answer in answers)
    assert model.sizes == [8, 4, 2, 2, 4, 2, 2]


@given(
    lengths=st.lists(st.integers(1, 500), max_size=60),
    size=st.integers(1, 16),
    tokens=st.integers(1, 4000),
    response=st.integers(0, 300),
)
def test_batches_hold_every_prompt_once_within_the_budget(lengths, size, tokens, response):
    batches = list(batches_by_length(dict(enumerate(lengths)), size, tokens, response))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * (longest + response) <= tokens


def damage(path, **changes) -> None:
    state_dict = torch.load(path, weights_only=True)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state_dict.pop(name) if tensor is None else state_dict.update({name: tensor})
    torch.save(state_dict, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": None}, "missing: lm_head.weight"),
        ({"extra__weight": torch.zeros(2)}, "surplus: extra.weight"),
        ({"lm_head__weight": torch.zeros(3, 4)}, r"another shape: lm_head.weight \(\[3, 4\]"),
    ],
)
def test_keys_that_do_not_match_are_listed(changes, message, state_dicts, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(state_dicts["t5_distinct"].read_bytes())
    damage(path, **changes)
    with pytest.raises(LoadError, match=message):
        load_model(path, state_dicts["t5_distinct"].with_suffix(""))


def test_another_architectures_state_dict_is_refused(state_dicts):
    with pytest.raises(LoadError, match="does not fit T5ForConditionalGeneration"):
        load_model(state_dicts["llama"], state_dicts["t5_tied"].with_suffix(""))


def test_a_file_that_is_no_state_dict_is_refused(state_dicts, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a state dict")
    with pytest.raises(LoadError, match="damaged"):
        load_model(path, state_dicts["t5_tied"].with_suffix(""))


def test_float16_is_refused_where_the_cpu_only_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_dtype(torch.device("cpu"))[0] == torch.bfloat16
    with pytest.raises(LoadError, match="emulated"):
        choose_dtype(torch.device("cpu"), "float16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_dtype(torch.device("cpu"))[0] == torch.float32


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(LoadError, match="GPU"):
        choose_device("cuda")
    with pytest.raises(LoadError, match="not a device"):
        choose_device("abacus")


def test_models_can_be_loaded_from_several_threads(state_dicts, tmp_path, load):
    """transformers patches its own classes while it loads: two at once would leave the patch in place."""
    tie_weights = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda kind: load(state_dicts[kind], tmp_path), list(KINDS) * 6))
    assert PreTrainedModel.tie_weights is tie_weights
    assert len({id(model.model) for model in models}) == len(models)
