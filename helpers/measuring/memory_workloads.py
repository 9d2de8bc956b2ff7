"""What `measure_memory` measures: converting and serving, each method in a process of its own.

Run as `python -m helpers.measuring.memory_workloads WORKLOAD SETTINGS`. Its last line of output is JSON:
`library_bytes`, the file-backed memory once everything is imported and before a model is loaded, and
`seconds`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def convert_project(settings: dict[str, Any]) -> Callable[[], None]:
    """Converts tensor by tensor, as `python -m helpers.load_state_dict local` does."""
    from helpers.load_state_dict.conversion import convert

    _import_transformers()  # before the work starts, so that its pages count as library pages

    return lambda: convert(
        settings["checkpoint"], settings["state_dict"], dtype=settings["stored"], progress=False
    )


def convert_sample(settings: dict[str, Any]) -> Callable[[], None]:
    """Converts as the published sample's text says: load in float32, make it half, save the state dict."""
    from helpers.measuring.published_sample import convert

    _import_transformers()
    return lambda: convert(settings["checkpoint"], settings["state_dict"])


def serve_project(settings: dict[str, Any]) -> Callable[[], None]:
    """Loads a mapped state dict as the handler of this package does, and answers a batch."""
    _import_worker()
    import torch

    from helpers.load_state_dict.mapped_model import load_model

    def work() -> None:
        path = Path(settings["state_dict"])
        model, _ = load_model(path, path.with_suffix(""), dtype=getattr(torch, settings["dtype"]))
        _answer(model.eval(), settings)

    return work


def make_ctranslate2(settings: dict[str, Any]) -> Callable[[], None]:
    """Makes CTranslate2's file from a state dict."""
    _import_worker()
    from helpers.load_state_dict.engine_file import make

    path = Path(settings["state_dict"])
    return lambda: make(path, path.with_suffix(""), "", settings["engine_file"], settings["dtype"])


def serve_ctranslate2(settings: dict[str, Any]) -> Callable[[], None]:
    """Loads CTranslate2's file as the handler does, and answers a batch."""
    _import_worker()
    import torch

    from helpers.load_state_dict.engine_file.description import DESCRIPTION, parse
    from helpers.load_state_dict.mapped_model import read_generation_config
    from helpers.model_handler import AnsweringOptions
    from helpers.model_handler.engines.ctranslate2_engine import CTranslate2Engine
    from helpers.models.architecture import architecture_of, read_config

    folder, companions = Path(settings["engine_file"]), Path(settings["state_dict"]).with_suffix("")

    def work() -> None:
        config = architecture_of(read_config(companions)).config
        generation_config = read_generation_config(companions, config)
        generation_config.min_new_tokens = settings["response_tokens"]
        engine = CTranslate2Engine(
            folder,
            parse((folder / DESCRIPTION).read_bytes(), folder),
            config,
            generation_config,
            torch.device("cpu"),
            torch.get_num_threads(),
            lambda: None,
        )
        shape = settings["batch_size"], settings["prompt_tokens"]
        tokens = torch.linspace(3, config.vocab_size - 1, shape[0] * shape[1]).long().reshape(shape)
        engine.generate(tokens.tolist(), AnsweringOptions(max_response_tokens=settings["response_tokens"]))

    return work


def serve_sample(settings: dict[str, Any]) -> Callable[[], None]:
    """Loads with Beam's own handler, as the published sample does, and answers a batch."""
    _import_worker()
    from helpers.measuring.published_sample import handler

    stock = handler(settings["state_dict"], settings["checkpoint"])
    return lambda: _answer(stock.load_model(), settings)


WORKLOADS = {
    "convert_project": convert_project,
    "convert_sample": convert_sample,
    "serve_project": serve_project,
    "serve_sample": serve_sample,
    "make_ctranslate2": make_ctranslate2,
    "serve_ctranslate2": serve_ctranslate2,
}


def _import_worker() -> None:
    """Imports what a Beam worker has imported by the time it loads a model."""
    for name in (
        "apache_beam.io.gcp.pubsub",
        "apache_beam.ml.inference.pytorch_inference",
        "apache_beam.runners.worker.sdk_worker_main",
        "helpers.load_state_dict.mapped_model",
    ):
        importlib.import_module(name)
    _import_transformers()


def _import_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: F401


def _answer(model: Any, settings: dict[str, Any]) -> None:
    import torch

    shape = settings["batch_size"], settings["prompt_tokens"]
    # Tokens from all over the vocabulary: a long stream of prompts eventually touches the whole embedding.
    tokens = torch.linspace(3, model.config.vocab_size - 1, shape[0] * shape[1]).long().reshape(shape)
    length = settings["response_tokens"]
    with torch.inference_mode():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )


def main() -> None:
    from helpers.measuring.process_memory import memory_of

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    work = WORKLOADS[name](settings)
    library_bytes = memory_of().file_backed
    started = time.monotonic()
    work()
    print(json.dumps({"library_bytes": library_bytes, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
