"""Measures this project beside the usual way, in one run: `python tools/bench.py [--out FILE] [--quick]`.

Compared, on random weights of flan-t5-large's shape: `from_pretrained` with `torch.save`, and this project's
conversion; Beam's stock PyTorch handler, and this project's, on the same state dict. And the packaged model
asked one prompt at a time in float32, and in batches. The last line printed is the whole result as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESPONSE_TOKENS = 16
PROMPT_TOKENS = 32
SAMPLE_SECONDS = 0.05
CHILD_SECONDS = 600


def load_stock(state_dict_path: str, cache: str):
    """Beam's handler, as the published sample configures it."""
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
    from transformers import AutoConfig, T5ForConditionalGeneration

    handler = PytorchModelHandlerTensor(
        state_dict_path=state_dict_path,
        model_class=T5ForConditionalGeneration,
        model_params={"config": AutoConfig.from_pretrained(Path(state_dict_path).with_suffix(""))},
        device="cpu",
    )
    return handler.load_model


def load_ours(state_dict_path: str, cache: str):
    """This project's handler."""
    from helpers.model_handler import LanguageModelHandler

    handler = LanguageModelHandler(state_dict_path, cache_dir=cache)
    return lambda: handler.load_model().model


def serve(which: str, state_dict_path: str, cache: str) -> None:
    """A worker's side: loads, answers, tells how long each took, and stays until its input ends."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = {"stock": load_stock, "ours": load_ours}[which](state_dict_path, cache)
    started = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - started
    tokens = torch.linspace(3, 32_000, PROMPT_TOKENS).long().reshape(1, -1)

    def answer() -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                tokens, min_new_tokens=RESPONSE_TOKENS, max_new_tokens=RESPONSE_TOKENS, do_sample=False
            )
        return RESPONSE_TOKENS / (time.perf_counter() - begun)

    rates = sorted(answer() for _ in range(4))
    dtype = str(model.dtype).removeprefix("torch.")
    print(json.dumps({"load_seconds": loaded, "tokens_per_second": rates[-2], "dtype": dtype}), flush=True)
    sys.stdin.read()


def run_workers(which: str, state_dict_path: str, cache: str, count: int = 1) -> dict:
    """Starts workers together; their reports, and the memory of all of them at its highest and at rest."""
    from helpers.process_memory import memory_of

    command = [sys.executable, __file__, "--serve", which, state_dict_path, cache]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
    peak, deadline = 0, time.monotonic() + CHILD_SECONDS
    try:
        for worker in workers:
            os.set_blocking(worker.stdout.fileno(), False)
        lines: dict[int, str] = {}
        while len(lines) < count:
            if time.monotonic() > deadline or any(worker.poll() is not None for worker in workers):
                raise RuntimeError(f"a {which} worker did not report")
            peak = max(peak, sum(memory_of(worker.pid).proportional or 0 for worker in workers))
            for worker in workers:
                if worker.pid not in lines and (line := worker.stdout.readline()):
                    lines[worker.pid] = line
            time.sleep(SAMPLE_SECONDS)
        at_rest = sum(memory_of(worker.pid).proportional or 0 for worker in workers)
        reports = [json.loads(line) for line in lines.values()]
    finally:
        for worker in workers:
            worker.stdin.close()
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
    return {**reports[0], "peak_bytes": peak, "rest_bytes": at_rest}


def bench_serving(model_name: str, folder: Path) -> dict:
    """Load time, memory and rate of one worker each, and the memory of two of this project's."""
    from helpers.load_state_dict import convert
    from helpers.models import load_config
    from helpers.random_checkpoint import write_random_checkpoint

    checkpoint = write_random_checkpoint(load_config(model_name), folder / "checkpoint")
    path, cache = str(folder / "model.pt"), str(folder / "cache")
    convert(str(checkpoint), path, "float16", progress=False)
    first = run_workers("ours", path, cache)["load_seconds"]
    rounds = {which: [run_workers(which, path, cache) for _ in range(2)] for which in ("stock", "ours")}
    stock, ours = (min(rounds[which], key=lambda r: r["load_seconds"]) for which in ("stock", "ours"))
    two = run_workers("ours", path, cache, count=2)
    return {
        "model_name": model_name,
        "stock": stock,
        "ours": ours,
        "ours_first_on_a_machine_load_seconds": first,
        "two_of_ours_rest_bytes": two["rest_bytes"],
        "load_ratio": stock["load_seconds"] / ours["load_seconds"],
        "peak_memory_ratio": ours["peak_bytes"] / stock["peak_bytes"],
        "two_processes_ratio": two["rest_bytes"] / ours["rest_bytes"],
        "rate_ratio": ours["tokens_per_second"] / stock["tokens_per_second"],
    }


def mixed_prompts(count: int) -> list[str]:
    """Prompts of many lengths, the same each time."""
    words = [
        "Tell",
        "me",
        "about",
        "the",
        "sea",
        "and",
        "the",
        "ships",
        "that",
        "cross",
        "it",
        "in",
        "every",
        "season",
        "of",
        "the",
        "year",
    ]
    return [f"{n}: " + " ".join(words[: 2 + (n * 7) % (len(words) - 2)]) + "?" for n in range(count)]


def bench_batches(prompts: int, folder: Path) -> dict:
    """Tokens a second of the packaged model: alone in float32, in batches, and through a pipeline."""
    import apache_beam as beam

    from helpers.language_model import Generation
    from helpers.load_state_dict import convert
    from helpers.model_handler import LanguageModelHandler
    from helpers.models import DEFAULT_MODEL
    from helpers.pipeline import AskModel
    from helpers.served_model import ModelSource

    path, cache = str(folder / "packaged.pt"), str(folder / "cache")
    convert(DEFAULT_MODEL, path, progress=False)
    asked, generation = mixed_prompts(prompts), Generation(max_response_tokens=32)

    def rate(model, questions, **options) -> tuple[float, float]:
        tokens = 0

        def count(batch) -> None:
            nonlocal tokens
            tokens += batch.response_tokens

        started = time.perf_counter()
        model.ask(questions, generation, on_batch=count, **options)
        seconds = time.perf_counter() - started
        return tokens / seconds, seconds

    alone, _ = ModelSource(path, dtype="float32", cache_dir=cache).load()
    batched = LanguageModelHandler(
        path, max_response_tokens=32, max_batch_size=64, cache_dir=cache
    ).load_model()
    for model in (alone, batched):
        rate(model, asked[:2])
    one_by_one, _ = rate(alone, asked[: max(8, prompts // 10)], max_batch_size=1)
    together, generate_seconds = rate(batched, asked, max_batch_size=64)
    pipeline = beam.Pipeline(runner="FnApiRunner")
    options = {"max_batch_size": 64, "cache_dir": cache}
    pipeline | beam.Create(asked) | AskModel(DEFAULT_MODEL, path, 32, **options)
    started = time.perf_counter()
    pipeline.run().wait_until_finish()
    pipeline_seconds = time.perf_counter() - started
    return {
        "prompts": prompts,
        "one_at_a_time_float32_tokens_per_second": one_by_one,
        "batched_tokens_per_second": together,
        "batched_dtype": str(batched.model.dtype).removeprefix("torch."),
        "rate_ratio": together / one_by_one,
        "pipeline_seconds": pipeline_seconds,
        "generate_seconds": generate_seconds,
        "pipeline_overhead": pipeline_seconds / generate_seconds - 1,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures this project beside the usual way.")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer prompts: a smoke test")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    import bench_convert

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        model_name = "google/flan-t5-small" if arguments.quick else "google/flan-t5-large"
        result = {
            "conversion": bench_convert.bench(model_name, "float16", 3),
            "serving": bench_serving(model_name, folder),
            "batches": bench_batches(16 if arguments.quick else 200, folder),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
