"""Measures how many tokens a second a model generates on this machine, by batch size and dtype."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from helpers.model_handler import AnsweringOptions, Failure
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.served_model import ModelSource
from helpers.models.dtypes import dtype_name

# Prompts of different lengths, like real messages.
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List the planets of the solar system.",
    "Explain to a child how a bicycle stays upright, and why it is hard to ride one very slowly.",
)


@dataclass(frozen=True)
class Throughput:
    """A measured rate: tokens generated a second, the median of several runs."""

    dtype: str
    batch_size: int
    tokens_per_second: float


def measure_throughput(
    state_dict_path: str,
    *,
    batch_sizes: Sequence[int] = (1, 4, 16),
    dtypes: Sequence[str | None] = (None,),
    response_tokens: int = 16,
    repeats: int = 3,
    device: str | None = None,
    cache_dir: str | None = None,
) -> list[Throughput]:
    """Measures a model's rate for each dtype and batch size.

    The runs alternate between the dtypes, so that other load on the machine affects them all alike.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        batch_sizes: how many prompts are answered at once.
        dtypes: the dtypes to compute in; None is one that is fast on the device. Duplicates are measured
            once.
        response_tokens: the most tokens in a response.
        repeats: the number of runs, of which the median is taken.
        device: see `LanguageModelHandler`.
        cache_dir: see `LanguageModelHandler`.

    Raises:
        LoadError: the state dict or the device cannot be used.
        RuntimeError: a prompt failed, perhaps for lack of memory.
    """
    loaded = [
        ModelSource(state_dict_path, device=device, dtype=dtype, cache_dir=cache_dir).load()[0]
        for dtype in dtypes
    ]
    by_dtype = {dtype_name(model.model.dtype): model for model in loaded}
    options = AnsweringOptions(
        max_response_tokens=response_tokens, max_batch_size=max(batch_sizes, default=1)
    )
    for model in by_dtype.values():
        model.ask(PROMPTS[:1], AnsweringOptions(max_response_tokens=2))  # the first call prepares kernels
    rates: dict[tuple[str, int], list[float]] = {}
    runs = [(size, dtype) for size in batch_sizes for _ in range(repeats) for dtype in by_dtype]
    for size, dtype in tqdm(runs, desc="runs", leave=False):
        prompts = [PROMPTS[n % len(PROMPTS)] for n in range(size)]
        tokens, seconds = timed_ask(by_dtype[dtype], prompts, options)
        rates.setdefault((dtype, size), []).append(tokens / seconds)
    return [Throughput(dtype, size, statistics.median(runs)) for (dtype, size), runs in rates.items()]


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
