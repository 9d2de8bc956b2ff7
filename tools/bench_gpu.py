"""Compares dtypes and engines on a GPU: `python tools/bench_gpu.py [--only NAME...] [--out FOLDER]`.

Random weights of real shapes, converted to a float16 state dict and loaded from it; prompts of 20 to 59
tokens, and responses of 32. The contestants are processes that take turns on the GPU; figures are medians of
three rounds. The result is one JSON file for each kind of GPU, from which `tools/engine_tables.py` writes
the tables of docs/engines.md. With --ctranslate2, which needs CUDA 12's cuBLAS, that engine takes part too.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_engines import RESULTS, race

NEW_TOKENS = 32
COUNTS = (1, 32, 128)
DTYPES = ("bfloat16", "float16")


def shapes() -> dict:
    """Configs by the section of the result that they are for."""
    from transformers import LlamaConfig

    from helpers.models import load_config

    llama = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    llama.architectures = ["LlamaForCausalLM"]
    return {
        "gpu flan-t5-large": load_config("google/flan-t5-large"),
        "gpu flan-t5-xl": load_config("google/flan-t5-xl"),
        "gpu SmolLM2-1.7B": llama,
    }


def measure(config, work: Path, with_ctranslate2: bool, chosen: list[str]) -> dict:
    """What the contestants said and their rates, by name: those whose names have one of these parts."""
    from helpers.load_state_dict import convert
    from helpers.measuring.random_checkpoint import write_random_checkpoint

    path, cache = work / "model.pt", work / "cache"
    checkpoint = write_random_checkpoint(config, work / "checkpoint")
    convert(str(checkpoint), path, progress=False)
    generator = torch.Generator().manual_seed(0)
    end = [1] if config.is_encoder_decoder else []
    prompts = [
        [*torch.randint(3, 32_000, (20 + (n * 7) % 40,), generator=generator).tolist(), *end]
        for n in range(max(COUNTS))
    ]
    commands = {
        f"this project, torch {dtype}": [sys.executable, "ours.py", path, "torch", dtype, cache]
        for dtype in DTYPES
    }
    commands["transformers alone, bfloat16"] = [
        *(sys.executable, "plain_transformers.py", checkpoint, "bfloat16"),
    ]
    if with_ctranslate2:
        from helpers.model_handler.local_engine_file import fetch_engine_file

        folder = fetch_engine_file(str(path), "bfloat16", cache).folder
        commands["this project, ctranslate2 bfloat16"] = [
            *(sys.executable, "ours.py", path, "ctranslate2", "bfloat16", cache),
        ]
        for dtype in ("bfloat16", "float16", "int8_float16"):
            commands[f"CTranslate2 alone, {dtype}"] = [
                *(sys.executable, "plain_ctranslate2.py", folder, dtype, end[0] if end else 2),
            ]
    commands = {name: command for name, command in commands.items() if any(part in name for part in chosen)}
    workloads = {"one" if count == 1 else str(count): prompts[:count] for count in COUNTS}
    return race(
        commands,
        workloads,
        NEW_TOKENS,
        {"BENCH_DEVICE": "cuda" if torch.cuda.is_available() else "cpu", "BENCH_BATCH": str(max(COUNTS))},
        warm_up=str(max(COUNTS)),
    )


def main() -> None:
    """The command line."""
    known = shapes()
    parser = argparse.ArgumentParser(description="Compares dtypes and engines on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument("--ctranslate2", action="store_true", help="CTranslate2 too")
    parser.add_argument("--contestants", nargs="+", default=[""], help="parts of their names")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    file = arguments.out / f"{name.replace(' ', '-')}.json"
    result = {"kind": name, "cpu": name, "torch": torch.__version__}
    for section in arguments.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            found = measure(known[section], Path(work), arguments.ctranslate2, arguments.contestants)
        result[section] = {"date": datetime.date.today().isoformat(), "contestants": found}
        arguments.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(section, f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
