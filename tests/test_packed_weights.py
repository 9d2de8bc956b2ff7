"""Packed weights: the same answers, and the pages of what was packed are given back."""

import gc
import platform
from pathlib import Path

import pytest
import torch
from tiny_models import KINDS, save_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.load_state_dict import convert
from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler import AnsweringOptions
from helpers.model_handler.engines import packed_weights
from helpers.model_handler.engines.choice import choose
from helpers.model_handler.engines.packed_weights import pack_weights, why_not_packed
from helpers.model_handler.served_model import ModelSource
from helpers.sizing import SizingError, size_model

PROMPTS = ["Hi", "What is the capital of France?", "é", "Write one sentence about the sea.", "a b"]
CPU = torch.device("cpu")
XL = "google/flan-t5-xl"

pytestmark = pytest.mark.skipif(bool(why_not_packed(CPU, torch.float32)), reason="no oneDNN for x86 here")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_weights_that_are_not_packed(kind, tmp_path):
    save_checkpoint(kind, tmp_path / "checkpoint")
    path = str(tmp_path / "model.pt")
    convert(str(tmp_path / "checkpoint"), path, "float32", progress=False)
    plain, packed = (
        ModelSource(path, dtype="float32", engine=engine).load()[0] for engine in ("torch", "torch_packed")
    )
    linear = [layer for layer in packed.model.modules() if type(layer) is torch.nn.Linear]
    assert linear and all("forward" in vars(layer) for layer in linear)
    assert packed.engine.name == "torch_packed"
    options = AnsweringOptions(max_response_tokens=12)
    answers = [[answer.text for answer in model.ask(PROMPTS, options)] for model in (plain, packed)]
    assert answers[0] == answers[1]
    # It can still be asked for its weights, as when it is compared or saved.
    assert all(
        torch.equal(weight, plain.model.state_dict()[name])
        for name, weight in packed.model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_the_layers_own_for_any_number_of_rows(dtype, has_bias):
    if reason := why_not_packed(CPU, dtype):
        pytest.skip(reason)
    plain = torch.nn.Linear(48, 80, bias=has_bias).to(dtype)
    layer = torch.nn.Linear(48, 80, bias=has_bias).to(dtype)
    layer.load_state_dict(plain.state_dict())
    dropped = []
    pack_weights(torch.nn.Sequential(layer), dropped.append)
    assert [weight.data_ptr() for weight in dropped] == [layer.weight.data_ptr()]
    with torch.inference_mode():
        for shape in ((48,), (1, 48), (7, 48), (2, 40, 48)):
            rows = torch.randn(shape).to(dtype)
            torch.testing.assert_close(layer(rows), plain(rows), rtol=2e-2, atol=2e-2)


def test_other_layers_stay_as_they_are_and_a_model_of_them_is_refused():
    class Doubled(torch.nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    others = [Doubled(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4).half()]
    with pytest.raises(LoadError, match="only 0% are in linear layers: use engine torch"):
        pack_weights(torch.nn.Sequential(*others), lambda weight: None)
    pack_weights(torch.nn.Sequential(*others, torch.nn.Linear(64, 64)), lambda weight: None)
    assert not any("forward" in vars(layer) for layer in others)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="/proc is Linux's")
def test_the_pages_of_what_was_packed_are_given_back(tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    save_checkpoint("llama", tmp_path / "checkpoint")  # for its tokenizer
    LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    path = str(tmp_path / "model.pt")
    convert(str(tmp_path / "checkpoint"), path, "float32", progress=False)

    def resident() -> int:
        """The bytes of the state dict's file that this process holds."""
        lines, held, is_ours = Path("/proc/self/smaps").read_text().splitlines(), 0, False
        for line in lines:
            first, *rest = line.split()
            if "-" in first and len(rest) >= 4:
                is_ours = line.endswith("model.pt")
            elif first == "Rss:" and is_ours:
                held += 1024 * int(rest[0])
        return held

    held = {}
    for engine in ("torch", "torch_packed"):
        model = ModelSource(path, dtype="float32", engine=engine).load()[0]
        model.ask(["Hi"], AnsweringOptions(max_response_tokens=4))
        held[engine] = resident()
        del model
        gc.collect()
    assert held["torch"] > 25e6
    assert held["torch_packed"] < 0.2 * held["torch"]


def test_jobs_and_options_that_go_with_a_gpu_are_refused():
    with pytest.raises(ValueError, match="CPUs only"):
        AnsweringOptions(engine="torch_packed", device="cuda")


def test_products_that_differ_are_refused(monkeypatch):
    def wrong(packed, bias, input):  # noqa: A002 - as Linear names it
        return torch.zeros(len(input), 4)

    monkeypatch.setattr(packed_weights, "_product", wrong)
    with pytest.raises(LoadError, match=r"shape \(4, 4\) differs .* use engine torch"):
        pack_weights(torch.nn.Linear(4, 4), lambda weight: None)


def test_what_cannot_be_computed_so_is_refused_before_anything_is_fetched(monkeypatch):
    assert choose("torch_packed", "cpu", "float32").engine == "torch_packed"
    for dtype in ("int8", "float16"):
        with pytest.raises(LoadError, match=dtype):
            choose("torch_packed", "cpu", dtype)
        with pytest.raises(ValueError, match=f"torch_packed does not compute in {dtype}"):
            AnsweringOptions(engine="torch_packed", dtype=dtype)
    assert "x86" in why_not_packed(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(LoadError, match="use dtype float32"):
        choose("torch_packed", "cpu", "bfloat16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(LoadError, match="oneDNN"):
        choose("torch_packed", "cpu", "float32")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(LoadError, match="x86"):
        choose("torch_packed", "cpu", "float32")


def test_sizing_counts_the_copy_of_each_process():
    shared, packed = (
        size_model(XL, engine=engine, processes=4).serve.parts["weights"]
        for engine in ("torch", "torch_packed")
    )
    assert packed == 4 * shared
    assert size_model(XL, engine="torch_packed").compute_dtype == size_model(XL).compute_dtype
    with pytest.raises(SizingError, match="CPUs only"):
        size_model(XL, engine="torch_packed", family="g2")
