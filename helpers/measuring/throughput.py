"""Measures how many tokens a second a model generates on this machine, by batch size, engine and dtype.

Each engine and dtype is measured in a process of its own. In one process they would share the cores' caches
and, worse, their libraries' threads would wait for work on the same cores: CTranslate2 was measured to be
half as fast beside a torch that had just computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from helpers.measuring.process_memory import MeasureError
from helpers.model_handler import AnsweringOptions, Failure
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.served_model import ModelSource

# Prompts of different lengths, like real messages.
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List the planets of the solar system.",
    "Explain to a child how a bicycle stays upright, and why it is hard to ride one very slowly.",
)

REQUEST_SECONDS = 600
"""How long a process may take to load the model, or for one run."""


@dataclass(frozen=True)
class Throughput:
    """A measured rate: tokens generated a second, the median of several runs."""

    engine: str
    dtype: str
    batch_size: int
    tokens_per_second: float


def measure_throughput(
    state_dict_path: str,
    *,
    batch_sizes: Sequence[int] = (1, 4, 16),
    computing: Sequence[tuple[str | None, str | None]] = ((None, None),),
    response_tokens: int = 16,
    repeats: int = 3,
    device: str | None = None,
    cache_dir: str | None = None,
) -> list[Throughput]:
    """Measures a model's rate for each engine and dtype, and each batch size.

    The runs alternate, so that other load on the machine affects them all alike.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        batch_sizes: how many prompts are answered at once.
        computing: pairs of engine and dtype, as `LanguageModelHandler` takes them; None is what it would
            choose. Duplicates are measured once.
        response_tokens: the most tokens in a response.
        repeats: the number of runs, of which the median is taken.
        device: see `LanguageModelHandler`.
        cache_dir: see `LanguageModelHandler`.

    Raises:
        MeasureError: the model cannot be loaded in any of these ways, or a prompt failed.
    """
    workers: dict[tuple[str, str], _Worker] = {}
    with contextlib.ExitStack() as stack:
        source = {"state_dict_path": state_dict_path, "device": device, "cache_dir": cache_dir}
        started = [
            stack.enter_context(_Worker(source | {"engine": engine, "dtype": dtype}))
            for engine, dtype in computing
        ]
        for worker in started:
            try:
                workers.setdefault(worker.wait(), worker)
            except MeasureError as error:
                if len(started) == 1:
                    raise
                print(f"Not measured: {error}")
        if not workers:
            raise MeasureError("the model could not be loaded in any of these ways: see above")
        rates: dict[tuple[tuple[str, str], int], list[float]] = {}
        runs = [(size, key) for size in batch_sizes for _ in range(repeats) for key in workers]
        for size, key in tqdm(runs, desc="runs", leave=False):
            rates.setdefault((key, size), []).append(workers[key].rate(size, response_tokens))
    return [Throughput(*key, size, statistics.median(found)) for (key, size), found in rates.items()]


def timed_ask(model: LanguageModel, prompts: Sequence[str], options: AnsweringOptions) -> tuple[int, float]:
    """Asks the prompts; returns the tokens generated and the seconds taken.

    Raises:
        RuntimeError: a prompt failed, so that there is no rate.
    """
    tokens = 0

    def count(batch) -> None:
        nonlocal tokens
        tokens += batch.response_tokens

    started = time.perf_counter()
    answers = model.ask(prompts, options, on_batch=count)
    seconds = time.perf_counter() - started
    if failed := [answer.error for answer in answers if isinstance(answer, Failure)]:
        raise RuntimeError(
            f"{len(failed)} of {len(prompts)} prompts failed, so there is no rate: {failed[0]}"
        )
    return tokens, seconds


class _Worker:
    """A process that has loaded a model; a context manager.

    Args:
        source: the arguments of `ModelSource`.
    """

    def __init__(self, source: dict[str, str | None]) -> None:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.measuring.throughput"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._send(source)

    def wait(self) -> tuple[str, str]:
        """The engine and the dtype that it computes with, once the model is loaded."""
        loaded = self._answer()
        return loaded["engine"], loaded["dtype"]

    def rate(self, size: int, response_tokens: int) -> float:
        """Tokens a second for so many prompts at once."""
        self._send({"size": size, "response_tokens": response_tokens})
        return self._answer()["rate"]

    def _send(self, request: dict) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict:
        watchdog = threading.Timer(REQUEST_SECONDS, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise MeasureError("the process that measures has ended, perhaps for lack of memory")
        answer = json.loads(line)
        if "error" in answer:
            raise MeasureError(answer["error"])
        return answer

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _different(count: int) -> list[str]:
    """Prompts of which no two are equal, which would be computed once."""
    return [f"{PROMPTS[n % len(PROMPTS)]} ({n + 1})" for n in range(count)]


def _serve() -> None:
    """The process's side: loads what its first line says, and measures what each further one does."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(values: dict) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    try:
        model, _ = ModelSource(**json.loads(sys.stdin.readline())).load()
        timed_ask(model, _different(1), AnsweringOptions(max_response_tokens=2))  # prepares kernels
        say({"engine": model.engine.name, "dtype": model.engine.dtype})
        for line in sys.stdin:
            request = json.loads(line)
            options = AnsweringOptions(
                max_response_tokens=request["response_tokens"], max_batch_size=request["size"]
            )
            tokens, seconds = timed_ask(model, _different(request["size"]), options)
            say({"rate": tokens / seconds})
    except (OSError, RuntimeError, ValueError) as error:
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    _serve()
