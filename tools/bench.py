"""Compares this project with the usual way, in one run: `make bench`, or `python tools/bench.py --help`.

On random weights of flan-t5-large's shape, it compares `from_pretrained` and `torch.save` with this project's
conversion, and Beam's stock PyTorch handler with this project's, on the same state dict. It also compares the
packaged model asked one prompt at a time in float32 with the same model asked in batches, and it measures a
whole stream on the local cloud: Pub/Sub, a job with the packaged model, Pub/Sub. The last line printed is the
whole result as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from bench_engines import mixed_prompts

from helpers.measuring.process_memory import high_water_mark, memory_of
from helpers.models.dtypes import dtype_name

RESPONSE_TOKENS = 16
PROMPT_TOKENS = 32
CHILD_SECONDS = 600
ROUNDS = 3
MEASURED = ("load_seconds", "tokens_per_second", "peak_bytes", "rest_bytes")


def load_stock(state_dict_path: str, cache: str):
    """Beam's handler, as the published sample configures it: a function that loads the model, and returns how
    it answers a prompt of token ids, and what it computes in."""
    import torch

    from helpers.measuring.published_sample import handler

    stock = handler(state_dict_path, Path(state_dict_path).with_suffix(""))

    def load():
        model = stock.load_model()

        def answer(tokens: list[int]) -> None:
            with torch.inference_mode():
                model.generate(
                    torch.tensor([tokens]),
                    min_new_tokens=RESPONSE_TOKENS,
                    max_new_tokens=RESPONSE_TOKENS,
                    do_sample=False,
                )

        return answer, f"torch, {dtype_name(model.dtype)}"

    return load


def load_ours(state_dict_path: str, cache: str):
    """This project's handler: as `load_stock`."""
    import transformers.models.t5.modeling_t5  # noqa: F401 - the stock handler's side has it imported too

    from helpers.model_handler import AnsweringOptions, LanguageModelHandler

    handler = LanguageModelHandler(state_dict_path, cache_dir=cache)
    options = AnsweringOptions(max_response_tokens=RESPONSE_TOKENS)

    def load():
        engine = handler.load_model().engine

        def answer(tokens: list[int]) -> None:
            [response] = engine.generate([tokens], options)
            if len(response.tokens) != RESPONSE_TOKENS:  # random weights hardly ever say that they have ended
                raise RuntimeError(f"a response of {len(response.tokens)} tokens has no rate to compare")

        return answer, f"{engine.name}, {engine.dtype}"

    return load


def serve(which: str, state_dict_path: str, cache: str) -> None:
    """A worker's side: loads, answers, reports how long each took, and stays until it is stopped."""
    # A worker has no notebook packages, which Beam's BigQuery client would import for its progress bars.
    sys.modules.update({"IPython": None, "ipywidgets": None})
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = {"stock": load_stock, "ours": load_ours}[which](state_dict_path, cache)
    started = time.perf_counter()
    answer, computed_by = load()
    loaded = time.perf_counter() - started
    tokens = torch.linspace(3, 32_000, PROMPT_TOKENS).long().tolist()

    def rate() -> float:
        begun = time.perf_counter()
        answer(tokens)
        return RESPONSE_TOKENS / (time.perf_counter() - begun)

    rate()  # the first one prepares kernels and reads the weights
    report = {
        "load_seconds": loaded,
        "tokens_per_second": statistics.median(rate() for _ in range(5)),
        "computed_by": computed_by,
    }
    print(json.dumps(report), flush=True)
    sys.stdin.read()


def run_workers(which: str, state_dict_path: str, cache: str, count: int = 1) -> list[dict]:
    """Starts workers together, and lets each wait until all have answered; returns their reports."""
    command = [sys.executable, __file__, "--serve", which, state_dict_path, cache]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
    deadline = time.monotonic() + CHILD_SECONDS
    watchdog = threading.Timer(CHILD_SECONDS, lambda: [worker.kill() for worker in workers])
    watchdog.start()
    try:
        reports = [json.loads(worker.stdout.readline() or "null") for worker in workers]
        if None in reports:
            late = time.monotonic() > deadline
            raise RuntimeError(f"a {which} worker {'took too long' if late else 'failed: see above'}")
        # Only now: reading this for a large process holds it up, and would spoil the timings.
        for worker, report in zip(workers, reports, strict=True):
            report["rest_bytes"] = memory_of(worker.pid).proportional
            report["peak_bytes"] = high_water_mark(worker.pid)
        return reports
    finally:
        watchdog.cancel()
        for worker in workers:
            worker.kill()
            worker.communicate()


def prepare(model_name: str, folder: Path) -> None:
    """Writes a float16 state dict of random weights in the model's shape: model.pt in the folder."""
    from helpers.load_state_dict import convert
    from helpers.measuring.random_checkpoint import write_random_checkpoint
    from helpers.models import load_config

    checkpoint = write_random_checkpoint(load_config(model_name), folder / "checkpoint")
    convert(str(checkpoint), folder / "model.pt", "float16", progress=False)


def bench_serving(model_name: str, folder: Path) -> dict:
    """Load time, memory and rate of one worker of each kind, and the memory of two of this project's."""
    # In a process of its own: if this one had torch's libraries in memory, the workers would share them.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(prepare, model_name, folder).result()
    path, cache = str(folder / "model.pt"), str(folder / "cache")
    [first] = run_workers("ours", path, cache)
    rounds: dict[str, list[dict]] = {"stock": [], "ours": []}
    for _ in range(ROUNDS):
        for which, reports in rounds.items():
            reports += run_workers(which, path, cache)
    stock, ours = (
        {name: statistics.median(report[name] for report in rounds[which]) for name in MEASURED}
        for which in ("stock", "ours")
    )
    two = sum(report["rest_bytes"] for report in run_workers("ours", path, cache, count=2))
    return {
        "model_name": model_name,
        "rounds": ROUNDS,
        "stock": stock | {"computed_by": rounds["stock"][0]["computed_by"]},
        "ours": ours | {"computed_by": rounds["ours"][0]["computed_by"]},
        "ours_first_on_a_machine_load_seconds": first["load_seconds"],
        "two_of_ours_rest_bytes": two,
        "load_ratio": stock["load_seconds"] / ours["load_seconds"],
        "peak_memory_ratio": ours["peak_bytes"] / stock["peak_bytes"],
        "two_processes_ratio": two / ours["rest_bytes"],
        "rate_ratio": ours["tokens_per_second"] / stock["tokens_per_second"],
    }


def bench_conversion(model_name: str) -> dict:
    """What `tools/bench_convert.py` measures."""
    import bench_convert

    return bench_convert.bench(model_name, "float16", ROUNDS)


def packaged_state_dict(folder: Path) -> tuple[str, str]:
    """The packaged model's state dict, made once in a folder, and the folder for what is made of it."""
    from helpers.load_state_dict import convert
    from helpers.models import DEFAULT_MODEL

    path = folder / "packaged.pt"
    if not path.exists():
        convert(DEFAULT_MODEL, path, progress=False)
    return str(path), str(folder / "cache")


def bench_batches(prompts: int, folder: Path) -> dict:
    """Tokens a second of the packaged model: one at a time in float32, in batches, and through a pipeline."""
    import apache_beam as beam

    from helpers.measuring.throughput import timed_ask
    from helpers.model_handler import AnsweringOptions, LanguageModelHandler
    from helpers.model_handler.served_model import ModelSource
    from helpers.models import DEFAULT_MODEL
    from helpers.pipeline import AskModel

    path, cache = packaged_state_dict(folder)
    asked, answering = mixed_prompts(prompts), {"max_response_tokens": 32}

    alone, _ = ModelSource(path, engine="torch", dtype="float32", cache_dir=cache).load()
    options = answering | {"max_batch_size": 64, "cache_dir": cache}
    one, many = AnsweringOptions(**answering, max_batch_size=1), AnsweringOptions(**options)
    # With the options of AskModel's handler, which will find it loaded in this process.
    batched = LanguageModelHandler(path, DEFAULT_MODEL, **options).load_model()
    for model in (alone, batched):
        timed_ask(model, asked[:2], many)
    tokens, seconds = timed_ask(alone, asked[: max(8, prompts // 10)], one)
    one_by_one = tokens / seconds
    generated, piped = [], []
    for _ in range(ROUNDS):
        generated.append(timed_ask(batched, asked, many))
        pipeline = beam.Pipeline(runner="FnApiRunner")
        pipeline | beam.Create(asked) | AskModel(DEFAULT_MODEL, path, **options)
        started = time.perf_counter()
        pipeline.run().wait_until_finish()
        piped.append(time.perf_counter() - started)
    together = statistics.median(tokens / seconds for tokens, seconds in generated)
    generate_seconds = statistics.median(seconds for _, seconds in generated)
    pipeline_seconds = statistics.median(piped)
    return {
        "prompts": prompts,
        "rounds": ROUNDS,
        "one_at_a_time_float32_tokens_per_second": one_by_one,
        "batched_tokens_per_second": together,
        "batched_by": f"{batched.engine.name}, {batched.engine.dtype}",
        "rate_ratio": together / one_by_one,
        "pipeline_seconds": pipeline_seconds,
        "generate_seconds": generate_seconds,
        "pipeline_overhead": pipeline_seconds / generate_seconds - 1,
    }


def bench_bundles(prompts: int, folder: Path) -> dict:
    """The same prompts of the packaged model in bundles of one, each asked by a thread of its own or by four,
    against one large bundle, and bundles of four, asked by one thread: seconds, alternating."""
    from helpers.model_handler import AnsweringOptions, LanguageModelHandler

    path, cache = packaged_state_dict(folder)
    answering = {"max_response_tokens": RESPONSE_TOKENS, "max_batch_size": prompts, "cache_dir": cache}
    model = LanguageModelHandler(path, **answering).load_model()
    options, asked = AnsweringOptions(**answering), mixed_prompts(prompts)
    ways = {
        "one_bundle": (1, prompts),
        "bundles_of_one": (prompts, 1),
        "fours": (1, 4),
        "four_threads": (4, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    model.ask(asked[:2], options)
    for _ in range(ROUNDS):
        for name, (threads, size) in ways.items():
            bundles = [asked[start : start + size] for start in range(0, prompts, size)]
            with ThreadPoolExecutor(threads) as harness:
                started = time.perf_counter()
                list(harness.map(lambda bundle: model.ask(bundle, options), bundles))
                seconds[name].append(time.perf_counter() - started)
    medians = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    return medians | {
        "prompts": prompts,
        "computed_by": f"{model.engine.name}, {model.engine.dtype}",
        "bundles_of_one_ratio": medians["bundles_of_one_seconds"] / medians["one_bundle_seconds"],
        "four_threads_ratio": medians["four_threads_seconds"] / medians["fours_seconds"],
    }


def bench_stream(seconds: float) -> dict:
    """A job on the local cloud, whose machine also sends, stores and delivers the messages: the most that it
    answers, and its latency at half of that.

    Args:
        seconds: how long to send at each rate.
    """
    from helpers import dataflow, load_state_dict, pubsub
    from helpers.measuring import streaming
    from helpers.models import DEFAULT_MODEL
    from helpers.notebook import connect

    cloud = connect()
    path = cloud.state_dict_path(DEFAULT_MODEL)
    load_state_dict.ensure(DEFAULT_MODEL, path)
    name = dataflow.new_job_name(DEFAULT_MODEL)
    topics = [pubsub.create_topic(cloud.project, f"{name}-{what}") for what in ("messages", "responses")]
    subscriptions = [pubsub.create_subscription(topic, topic.rpartition("/")[2]) for topic in topics]
    job = dataflow.submit(
        project=cloud.project,
        location=cloud.location,
        temp_location=cloud.gs("temp"),
        job_name=name,
        model_name=DEFAULT_MODEL,
        state_dict_path=path,
        messages_subscription=subscriptions[0],
        responses_topic=topics[1],
        max_response_tokens=RESPONSE_TOKENS,
        max_run_minutes=20,
    )
    prompts = [f"In one sentence, what is the number {number} known for?" for number in range(1000)]
    load = {"topic": topics[0], "prompts": prompts, "responses": subscriptions[1]}
    try:
        job.wait_for("RUNNING", timeout=300)
        streaming.warm_up(**load)
        points = streaming.sweep_rates(job, [4, 8, 16, 32, 64, 128, 256], seconds=seconds, **load)
        most = streaming.most_rate(streaming.measured_batch_times(points))
        half = [streaming.sweep_rates(job, [most / 2], seconds=2 * seconds, **load)[0] for _ in range(ROUNDS)]
    finally:
        job.cancel()
        pubsub.delete(*subscriptions, *topics)
    return {
        "response_tokens": RESPONSE_TOKENS,
        "most_messages_per_second": most,
        "half_messages_per_second": statistics.median(point.answered for point in half),
        "half_p50_seconds": statistics.median(point.p50 for point in half),
        "half_p95_seconds": statistics.median(point.p95 for point in half),
        "half_batch_size": statistics.median(point.batch_size for point in half),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares this project with the usual way.")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer prompts: a smoke test")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("conversion", "serving", "batches", "bundles", "stream"),
        help="only these",
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    model_name = "google/flan-t5-small" if arguments.quick else "google/flan-t5-large"
    # Earlier results are kept, in case only some sections run now, or one of them fails.
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        sections = {
            "serving": lambda: bench_serving(model_name, Path(temporary)),
            "conversion": lambda: bench_conversion(model_name),
            "batches": lambda: bench_batches(16 if arguments.quick else 200, Path(temporary)),
            "bundles": lambda: bench_bundles(16 if arguments.quick else 64, Path(temporary)),
            "stream": lambda: bench_stream(3 if arguments.quick else 12),
        }
        for name in arguments.only or sections:
            started = time.monotonic()
            result[name] = sections[name]()
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
