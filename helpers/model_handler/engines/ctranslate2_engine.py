"""CTranslate2 as the engine: faster than torch on GPUs and on CPUs without bfloat16, and in 8-bit integers on
all.

Its file is read into this process's own memory, or the GPU's: unlike torch's mapped weights, processes do not
share it. On a GPU it computes with CUDA 12's cuBLAS, which is a package of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from helpers.load_state_dict.engine_file import EngineFile
from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler.engines import generation_settings
from helpers.model_handler.engines.deadline import Deadline
from helpers.model_handler.engines.engine import Generated, as_set, generated
from helpers.model_handler.engines.neighbours import Company, Mixing
from helpers.models.architecture import response_positions_of
from helpers.models.error_text import first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from helpers.model_handler.options import AnsweringOptions

COMPUTE_TYPES = {
    "cpu": {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"},
    "cuda": {"float32": "float32", "bfloat16": "bfloat16"},
}
"""CTranslate2's names for the dtypes, by the kind of device. Where weights are 8-bit integers, all else is
float32. Not on GPUs: there it is no faster than bfloat16 (measured on an H100), and its log-probabilities for
tiny models were far off."""

# How far the log-probabilities of a sample's tokens may be from transformers', in their standard deviations.
# Measured: 3e-5 and less in float32 (SmolLM2-135M, shapes of flan-t5, tiny models of each kind); 0.2 in int8
# (SmolLM2-135M; 0.23 on an EPYC with AVX2 only), and 0.16 in bfloat16 on a GPU (random weights of
# SmolLM2-1.7B's shape). What has nothing to do with the model is 1.1 away.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.3, "int8": 0.6}
LEAST_DEVIATION = 0.1
"""Random weights find all tokens alike: of those, less than this is no difference."""

STEP_ROWS = {"cpu": 16, "cuda": 4096}
"""What a step costs besides its rows, in rows. Measured with SmolLM2-135M in float32 on two cores with
AVX512-BF16: some 8 on an idle machine, and up to 38 on a busy one. On an H100 and an H200, a step of 128 rows
takes 1.2 to 1.5 times as long as one of a single row: prompts of 20 to 59 tokens take longer when divided."""

MOST_UNTIMED_STEPS = 16
"""The most steps in which a group's longer prompts are read while there is a limit of time: CTranslate2 asks
for the time after each token that it generates, and not in these."""

CUBLAS = "libcublas.so.12"

# Settings of the publisher's that mean the same here as in transformers. Others may, which nobody has shown.
_UNDERSTOOD = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "suppress_tokens",
        "min_new_tokens",
        "use_cache",
    }
)


def not_understood(held: GenerationConfig) -> list[str]:
    """Those of the publisher's settings that this engine would not honour as transformers does."""
    values = held.to_dict()
    unset: dict[str, tuple] = {"repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,)}
    return sorted(
        name
        for name in generation_settings.HELD
        if name not in _UNDERSTOOD and values.get(name) not in (None, False, 0, [], *unset.get(name, ()))
    )


class DisagreementError(LoadError):
    """What CTranslate2 computes is not what transformers does."""


class CTranslate2Engine:
    """Generates with CTranslate2; see `Engine`.

    Args:
        folder: the engine's file; see `helpers.load_state_dict.engine_file`.
        file: its description.
        config: the model's.
        generation_config: the publisher's settings that hold.
        device: a CPU or an NVIDIA GPU.
        threads: to compute with, on a CPU.
        load_model: loads the transformers model of the same state dict.

    Raises:
        DisagreementError: what it computes is not what transformers does.
        LoadError: it cannot read the file, or take the publisher's settings.
    """

    name = "ctranslate2"

    def __init__(
        self,
        folder: Path,
        file: EngineFile,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        device: torch.device,
        threads: int,
        load_model: Callable[[], PreTrainedModel],
    ) -> None:
        import ctranslate2

        self.dtype = file.dtype
        self.device = str(device)
        self._step_rows = STEP_ROWS[device.type]
        self.config = config
        self.generation_config = generation_config
        self._load_model = load_model
        self._model: PreTrainedModel | None = None
        self._is_encoder_decoder = bool(config.is_encoder_decoder)
        if others := not_understood(generation_config):
            raise LoadError(
                f"ctranslate2 does not honour the publisher's {', '.join(others)} as transformers does: use "
                "engine torch."
            )
        if not as_set(generation_config.eos_token_id):
            raise LoadError(
                "ctranslate2 needs a token that ends responses, and the model has none: use engine torch."
            )
        kind = ctranslate2.Translator if self._is_encoder_decoder else ctranslate2.Generator
        try:
            self._engine = kind(
                str(folder),
                device=device.type,
                device_index=device.index or 0,
                compute_type=COMPUTE_TYPES[device.type][file.dtype],
                intra_threads=threads,
            )
            _give_back_freed_memory()
            self.rows = len(json.loads(next(folder.glob("*vocabulary.json")).read_text()))
            difference = self._difference_from(file)
        except (RuntimeError, ValueError, OSError, StopIteration) as error:
            raise LoadError(
                f"ctranslate2 cannot use {folder} ({error}): delete that folder, and it is made again."
            ) from error
        if not difference <= TOLERANCE[file.dtype]:
            raise DisagreementError(
                f"ctranslate2 in {file.dtype} does not compute what transformers does with this model: its "
                f"log-probabilities are {difference:.2g} standard deviations away, and the limit is "
                f"{TOLERANCE[file.dtype]}. Use engine torch."
            )

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model of the same weights, for those who ask for it; answers come without it."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: AnsweringOptions,
        prefix_tokens: int = 0,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> list[Generated]:
        """See `Engine.generate`; what has begun is finished, or its time is up.

        Raises:
            ValueError: it cannot answer with these options as they are meant.
        """
        if reason := why_not(options):
            raise ValueError(reason)
        most = response_positions_of(self.config)
        longest = int(min(options.max_response_tokens, most - 1 if most else math.inf))
        ends = as_set(self.generation_config.eos_token_id)
        shared: dict[str, Any] = {
            "end_token": sorted(ends),
            "return_end_token": True,
            "beam_size": 1,
        }
        if unwanted := self.generation_config.suppress_tokens:
            shared["suppress_sequences"] = [[str(token)] for token in unwanted]
        if options.is_sampled:
            shared |= {
                "sampling_temperature": options.temperature,
                "sampling_topk": 0,  # of all tokens
                "sampling_topp": options.top_p,
            }
        least = self.generation_config.min_new_tokens or 0
        is_timed = options.max_response_seconds is not None
        texts = [_as_texts(prompt) for prompt in prompts]
        if self._is_encoder_decoder:
            deadline = Deadline(options.max_response_seconds)
            results = self._engine.translate_batch(
                texts,
                max_input_length=0,  # the prompt's limit has been checked already
                max_decoding_length=longest,
                min_decoding_length=least,
                callback=_asking(deadline) if is_timed else None,
                **shared,
            )
            responses = [[int(token) for token in result.hypotheses[0]] for result in results]
            return [generated(tokens, ends, longest, deadline.has_passed) for tokens in responses]
        found: dict[int, Generated] = {}
        lengths = [len(prompt) - prefix_tokens for prompt in prompts]
        for rows in self._groups(lengths, longest, MOST_UNTIMED_STEPS if is_timed else None):
            deadline = Deadline(options.max_response_seconds)
            results = self._engine.generate_batch(
                [texts[row][prefix_tokens:] for row in rows],
                max_length=longest,
                min_length=least,
                include_prompt_in_result=False,
                static_prompt=texts[0][:prefix_tokens] or None,
                cache_static_prompt=True,
                callback=_asking(deadline) if is_timed else None,
                **shared,
            )
            found |= {
                row: generated(result.sequences_ids[0], ends, longest, deadline.has_passed)
                for row, result in zip(rows, results, strict=True)
            }
        return [found[row] for row in range(len(prompts))]

    def _groups(self, lengths: Sequence[int], longest: int, most_spread: int | None) -> Iterator[list[int]]:
        """The prompts that are computed together, by what is left of them after a prefix.

        Prompts of one token are computed apart from longer ones: beside them CTranslate2 4.8.5 takes all but
        the first token of a longer prompt for the beginning of its response.
        """
        for is_single in (False, True):
            rows = [row for row, length in enumerate(lengths) if (length == 1) == is_single]
            for group in groups_by_length(
                [lengths[row] for row in rows], longest, self._step_rows, most_spread
            ):
                yield [rows[place] for place in group]

    def company(self, samples: Sequence[list[int]]) -> Company:
        """See `Engine.company`: it computes without padding, or masks it."""
        return Company.ANY

    def mixing(self) -> Mixing:
        """See `Engine.mixing`: the models and settings that it takes depend on no length."""
        return Mixing()

    def why_not(self, options: AnsweringOptions) -> str:
        """See `Engine.why_not`."""
        return why_not(options)

    def _difference_from(self, file: EngineFile) -> float:
        """How far the log-probabilities of the sample are from transformers', in standard deviations."""
        sample = file.reference
        prompt, response = _as_texts(sample.prompt), _as_texts(sample.response)
        if self._is_encoder_decoder:
            [scored] = self._engine.score_batch([prompt], [response], max_input_length=0)
            ours = scored.log_probs[: len(response)]
        else:
            [scored] = self._engine.score_batch([prompt + response])
            ours = scored.log_probs[-len(response) :]
        theirs = torch.tensor(sample.log_probabilities)
        deviation = max(float(theirs.std()), LEAST_DEVIATION)
        return float((torch.tensor(ours) - theirs).abs().mean()) / deviation


def _give_back_freed_memory() -> None:
    """Returns what was freed to the system. On Intel's processors CTranslate2 packs all weights while it
    loads, and frees the first copy, which glibc would keep: as much as the weights themselves."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _asking(deadline: Deadline) -> Callable[[Any], bool]:
    """What CTranslate2 calls after each token; true ends the response."""
    return lambda step: deadline.passes()


def groups_by_length(
    lengths: Sequence[int], response_tokens: int, step_rows: int, most_spread: int | None = None
) -> list[list[int]]:
    """Which prompts of a batch are best computed together.

    CTranslate2 reads prompts together only up to the end of the shortest, and the rest of the longer ones a
    token a step, as if it generated them. So a group takes as many steps as its lengths differ by, and those
    of a response. A step's time is that of so many rows, and of `step_rows` more: the weights are read
    whatever the number of rows.

    Args:
        lengths: the tokens of each prompt.
        response_tokens: the most in a response.
        step_rows: see `STEP_ROWS`.
        most_spread: the most tokens that the lengths of a group may differ by; None for any number.

    Returns:
        The indices of each group's prompts: the division that takes the least time.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # for the first so many: the time, and where the last one begins
    for end in range(1, len(order) + 1):
        best.append(
            min(
                (
                    best[start][0]
                    + (lengths[order[end - 1]] - lengths[order[start]] + response_tokens)
                    * (end - start + step_rows),
                    start,
                )
                for start in range(end)
                if most_spread is None or lengths[order[end - 1]] - lengths[order[start]] <= most_spread
            )
        )
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups


def computes_in(dtype: str, device: str) -> bool:
    """Whether CTranslate2 computes in a dtype on this machine's CPU, or its GPU (`cuda`)."""
    try:
        import ctranslate2
    except Exception as error:  # a build for another CPU or Python fails in ways of its own
        raise LoadError(
            f"ctranslate2 cannot be imported ({first_line(error)}): install it again, or use engine torch."
        ) from error
    return COMPUTE_TYPES[device].get(dtype) in ctranslate2.get_supported_compute_types(device)


@functools.cache
def why_not_on_gpu() -> str:
    """Why CTranslate2 cannot compute on this machine's GPUs; empty if it can.

    It looks for cuBLAS by the name of the library alone. The packages of CUDA are in no folder that would be
    searched, so that the library is loaded here first.
    """
    try:
        import ctranslate2

        if not ctranslate2.get_cuda_device_count():
            return "this build of ctranslate2 finds no GPU: use engine torch."
    except Exception as error:  # a build for another CPU, or a driver that is too old
        return f"ctranslate2 finds no GPU that it can use ({first_line(error)}): use engine torch."
    try:
        ctypes.CDLL(CUBLAS)
    except OSError:
        try:
            folder = next(iter(importlib.util.find_spec("nvidia.cublas").submodule_search_locations))
            for name in ("libcublasLt.so.12", CUBLAS):
                ctypes.CDLL(str(Path(folder, "lib", name)), mode=ctypes.RTLD_GLOBAL)
        except (AttributeError, ImportError, OSError, StopIteration):
            return (
                "ctranslate2 needs CUDA 12's cuBLAS on a GPU, which is not here: `pip install "
                "nvidia-cublas-cu12` (600 MB, NVIDIA's own licence), or use engine torch."
            )
    return ""


def why_not(options: AnsweringOptions) -> str:
    """Why CTranslate2 cannot answer with these options as they are meant; empty if it can."""
    if options.is_sampled and options.seed is not None:
        return "ctranslate2 cannot repeat what it has sampled (seed)"
    return ""


def _as_texts(tokens: Sequence[int]) -> list[str]:
    """Token ids as the engine's own vocabulary has them."""
    return [str(token) for token in tokens]
