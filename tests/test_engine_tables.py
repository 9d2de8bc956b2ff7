"""The page of engines shows what was measured, and `auto` chooses what its tables say."""

import json
import sys
from pathlib import Path

import pytest
import torch

from helpers.model_handler.engines import choice

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import engine_tables  # noqa: E402

FILES = {file.stem: json.loads(file.read_text()) for file in engine_tables.RESULTS.glob("*.json")}
RESULTS = {name: result for name, result in FILES.items() if "threads" in result}
ON_GPUS = [
    (name, section)
    for name in FILES.keys() - RESULTS.keys()
    for section, values in FILES[name].items()
    if section.startswith("gpu") and "this project, ctranslate2 bfloat16" in values["contestants"]
]
CAPABILITIES = {"AVX512-BF16": {"avx512_bf16": True}, "AVX2": {"avx2": True}, "held-to-AVX2": {"avx2": True}}


def test_the_page_shows_the_committed_results():
    assert engine_tables.page() == engine_tables.PAGE.read_text(), "run: python tools/engine_tables.py"
    assert "AVX512-BF16" in RESULTS


@pytest.mark.parametrize("section", ["causal", "t5"])
@pytest.mark.parametrize("kind", RESULTS)
def test_auto_is_the_engine_that_was_measured_to_be_faster_for_full_batches(kind, section, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CAPABILITIES[kind])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choice, "is_x86", lambda: True)
    chosen = choice.choose()
    measured = {
        tuple(name.removeprefix("this project, ").split()): values["tokens_per_second"]["32"]
        for name, values in RESULTS[kind][section]["contestants"].items()
        if name.startswith("this project")
    }
    # Neither int8 nor torch_packed is chosen unasked: answers change, or processes share less.
    lossless = {way: rate for way, rate in measured.items() if way[1] != "int8" and way[0] != "torch_packed"}
    best = max(lossless, key=lossless.get)
    assert (chosen.engine, chosen.dtype) == best
    in_float32 = choice.choose(dtype="float32")
    slower = "torch" if in_float32.engine == "ctranslate2" else "ctranslate2"
    assert lossless[in_float32.engine, "float32"] > lossless[slower, "float32"]


@pytest.mark.parametrize(("kind", "section"), sorted(ON_GPUS))
def test_auto_is_the_engine_that_was_measured_to_be_faster_on_a_gpu(kind, section, monkeypatch):
    monkeypatch.setattr(choice, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(choice, "why_not_on_gpu", lambda: "")
    chosen = choice.choose()
    contestants = {
        name: values
        for name, values in FILES[kind][section]["contestants"].items()
        if name.startswith("this project")
    }
    for workload in ("one", "32", "128"):
        best = max(contestants, key=lambda name: contestants[name]["tokens_per_second"][workload])
        assert best == f"this project, {chosen.engine} {chosen.dtype}"
    monkeypatch.setattr(choice, "why_not_on_gpu", lambda: "cuBLAS is not here")
    without = choice.choose()
    assert (without.engine, without.dtype) == ("torch", "bfloat16")
    assert "cuBLAS is not here" in without.reason


@pytest.mark.parametrize("kind", RESULTS)
def test_both_engines_gave_the_same_tokens_in_float32(kind):
    for section in ("causal", "t5"):
        contestants = RESULTS[kind][section]["contestants"]
        equal = contestants["this project, ctranslate2 float32"]["equal_tokens"]
        assert min(equal.values()) >= 0.99, equal
