"""The RunInference model handler: prompts in, a language model's responses out.

It replaces Beam's own PyTorch handler, which holds 4 bytes a parameter in every process, cannot batch prompts
of different length, fails a whole batch for one bad prompt, and, under transformers 5, answers with a flan-t5
whose output layer has been overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from helpers.serving.language_model import Batch, Failure, Generation, LanguageModel, Response
from helpers.serving.model_loading import LoadError
from helpers.serving.served_model import ModelSource, count_loads, forget, serve

NAMESPACE = "LanguageModel"


class LanguageModelHandler(ModelHandler[str, PredictionResult, LanguageModel]):
    """Answers prompts (``str``) with ``PredictionResult``s whose ``inference`` is the response's text.

    A prompt that cannot be answered gets a ``Failure`` as its ``inference``, and costs no other prompt its
    answer.

    Args:
        state_dict_path: ``.../NAME.pt`` as ``helpers.load_state_dict`` writes it, local or ``gs://``.
        model_name: if given, the state dict must have been made from the model of this name.
        max_response_tokens: a response ends here, unless the model ends it before.
        device: ``"cpu"``, ``"cuda"``, or None for a GPU if there is one.
        dtype: to compute in: ``"bfloat16"``, ``"float16"``, ``"float32"``, or None for what the device is
            fast in.
        max_batch_size: prompts that the model answers at once.
        max_batch_tokens: tokens of a batch, padding and responses included; bounds its memory.
        max_batch_seconds: how long a prompt may wait for others to share its batch. None batches only what
            arrives in one bundle, which on a busy stream is enough and keeps the pipeline free of state.
            With it, responses in windows may be late: they keep the time of their prompts.
        max_prompt_tokens: longer prompts fail, or are cut if ``truncate``.
        truncate: whether to cut prompts that are too long.
        temperature: 0 is greedy, and repeatable; above 0 the responses are sampled.
        top_p: with a temperature, sample from the most probable tokens of this total probability.
        seed: makes the sampling of the same batch repeatable; in a stream, batches differ.
        torch_threads: the threads of this process; None leaves torch's own choice, one for each core.
        reload_seconds: how often to look for a new state dict, of the same model, at the same path. The old
            one answers until the new one is ready. None looks only when Beam sets up a DoFn.
        cache_dir: where state dicts are copied to on a worker.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        state_dict_path: str,
        model_name: str | None = None,
        *,
        max_response_tokens: int = 256,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int = 32,
        max_batch_tokens: int = 32_768,
        max_batch_seconds: float | None = None,
        max_prompt_tokens: int | None = None,
        truncate: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        torch_threads: int | None = None,
        reload_seconds: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("max_batch_size", max_batch_size), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be 1 or more.")
        for name, seconds in (("max_batch_seconds", max_batch_seconds), ("reload_seconds", reload_seconds)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} is {seconds}: it must be above 0, or None.")
        if max_response_tokens >= max_batch_tokens:
            raise ValueError(
                f"max_response_tokens is {max_response_tokens}, and a batch may have {max_batch_tokens} "
                "tokens, prompts included: ask for shorter responses, or raise max_batch_tokens."
            )
        self._source = ModelSource(str(state_dict_path), model_name, device, dtype, cache_dir)
        self._replaced: ModelSource | None = None
        self._reload_seconds = reload_seconds
        self._generation = Generation(
            max_response_tokens=max_response_tokens,
            max_prompt_tokens=max_prompt_tokens,
            truncate=truncate,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        self._max_batch_size, self._max_batch_tokens = max_batch_size, max_batch_tokens
        self._max_batch_seconds = max_batch_seconds
        self._torch_threads = torch_threads

    def load_model(self) -> LanguageModel:
        """The model, loaded once in this process however often Beam asks for it.

        Raises:
            FileNotFoundError, PermissionError: the state dict cannot be read.
            LoadError: it is damaged or another model's, or the device asked for is not there.
        """
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)
        language_model = serve(self._source, self._reload_seconds)
        positions = getattr(language_model.model.config, "max_position_embeddings", None)
        wanted = self._generation.max_response_tokens
        if positions and not language_model.is_encoder_decoder and wanted >= positions:
            raise LoadError(
                f"max_response_tokens is {wanted}, and {language_model.model_name} has {positions} positions "
                "for prompt and response together: ask for shorter responses."
            )
        if self._replaced:
            forget(self._replaced)
            self._replaced = None
        return language_model

    def run_inference(
        self, batch: Sequence[str], model: LanguageModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Answers prompts; the results are in their order.

        Raises:
            ValueError: ``inference_args`` are given; the handler's own arguments say how to generate.
        """
        if inference_args:
            raise ValueError("LanguageModelHandler takes no inference_args: give its arguments instead.")
        answers = model.ask(
            batch,
            self._generation,
            max_batch_size=self._max_batch_size,
            max_batch_tokens=self._max_batch_tokens,
            on_batch=_count_batch,
        )
        Metrics.counter(NAMESPACE, "models_loaded").inc(count_loads())
        failures = sum(isinstance(answer, Failure) for answer in answers)
        Metrics.counter(NAMESPACE, "failed_prompts").inc(failures)
        for prompt, answer in zip(batch, answers, strict=True):
            inference = answer.text if isinstance(answer, Response) else answer
            yield PredictionResult(prompt, inference, model_id=self._source.state_dict_path)

    def update_model_path(self, model_path: str | None = None) -> None:
        """Serves another state dict from the next ``load_model`` on, as Beam's model updates ask for."""
        if model_path and model_path != self._source.state_dict_path:
            self._replaced = self._source
            self._source = replace(self._source, state_dict_path=str(model_path))

    def batch_elements_kwargs(self) -> dict[str, Any]:
        """How Beam forms batches: as large as may be, since the model sorts and splits them by length.

        The same least and greatest size switches off Beam's search for the best one, which starts at 1 and
        takes many bundles to find out that larger is faster.
        """
        size = 4 * self._max_batch_size
        kwargs: dict[str, Any] = {"min_batch_size": size, "max_batch_size": size}
        if self._max_batch_seconds is not None:
            kwargs["max_batch_duration_secs"] = self._max_batch_seconds
        return kwargs

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Accepts none: see ``run_inference``."""

    def get_metrics_namespace(self) -> str:
        """The namespace of RunInference's metrics, and of this handler's: see ``NAMESPACE``."""
        return NAMESPACE


def _count_batch(batch: Batch) -> None:
    for name in ("prompt_tokens", "padding_tokens", "response_tokens"):
        Metrics.counter(NAMESPACE, name).inc(getattr(batch, name))
    Metrics.distribution(NAMESPACE, "batch_size").update(batch.size)
    Metrics.distribution(NAMESPACE, "batch_milliseconds").update(round(batch.seconds * 1000))
