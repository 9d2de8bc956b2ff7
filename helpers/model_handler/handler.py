"""The RunInference model handler: prompts in, a language model's responses out.

It replaces Beam's own PyTorch handler, which holds 4 bytes a parameter in every process, cannot batch prompts
of different lengths, fails a whole batch for one bad prompt, and, under transformers 5, answers with a
flan-t5 whose output layer has been overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from helpers.load_state_dict import companion_folder
from helpers.model_handler import engine_thread
from helpers.model_handler.answers import Batch, Failure, Response
from helpers.model_handler.engines.ctranslate2_engine import why_not
from helpers.model_handler.engines.engine import TIME
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.options import AnsweringOptions, answering_options, takes_options
from helpers.model_handler.prompts import Prompt
from helpers.model_handler.served_model import ModelSource, forget, serve, take_counts

NAMESPACE = "LanguageModel"


def engine_for(options: AnsweringOptions) -> str | None:
    """The engine asked for; torch where the choice is open and the other one cannot answer as asked."""
    is_open = options.engine in (None, "auto") and options.dtype != "int8"
    return "torch" if is_open and why_not(options) else options.engine


@takes_options
class LanguageModelHandler(ModelHandler[Prompt, PredictionResult, LanguageModel]):
    """Answers prompts with `PredictionResult`s whose `inference` is the response's text. A prompt is a text,
    a record or a conversation: see `helpers.model_handler.prompts`.

    A prompt that cannot be answered gets a `Failure` as its `inference`, and costs no other prompt its
    answer.

        prompts | RunInference(LanguageModelHandler("gs://BUCKET/flan-t5-xl.pt", max_response_tokens=64))

    Args:
        state_dict_path: `.../NAME.pt` as `helpers.load_state_dict` writes it, local or `gs://`.
        model_name: the model that the state dict must have been made from; None takes any.
        {options}

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of its range, or the path is not that of a state dict.
    """

    def __init__(self, state_dict_path: str, model_name: str | None = None, **options: Any) -> None:
        super().__init__()
        companion_folder(state_dict_path)  # refuses what cannot be one, such as the model's name
        self._options = chosen = answering_options(options)
        self._source = ModelSource(
            str(state_dict_path),
            model_name,
            device=chosen.device,
            dtype=chosen.dtype,
            cache_dir=chosen.cache_dir,
            engine=engine_for(chosen),
        )
        self._replaced: ModelSource | None = None

    def load_model(self) -> LanguageModel:
        """The model, loaded once in this process however often Beam asks for it.

        Raises:
            FileNotFoundError, PermissionError: the state dict cannot be read.
            LoadError, ModelError: it is damaged, or its model is of no use here.
            WrongModelError: it was made from another model.
        """
        if self._options.torch_threads:
            threads = self._options.torch_threads
            # New threads take it over; one that has computed keeps its own.
            engine_thread.run(lambda: torch.set_num_threads(threads))
        language_model = serve(self._source, self._options.reload_seconds)
        language_model.check(self._options)
        if self._replaced:
            forget(self._replaced)
            self._replaced = None
        return language_model

    def run_inference(
        self, batch: Sequence[Prompt], model: LanguageModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Answers prompts; the results are in the same order.

        Raises:
            ValueError: `inference_args` are given; the handler's own options say how to answer.
        """
        if inference_args:
            raise ValueError("LanguageModelHandler takes no inference_args: give its options instead.")
        answers = model.ask(batch, self._options, on_batch=_count_batch)
        for name, count in take_counts().items():
            Metrics.counter(NAMESPACE, name).inc(count)
        _count_answers(answers)
        for prompt, answer in zip(batch, answers, strict=True):
            yield PredictionResult(prompt, self._inference(answer), model_id=self._source.state_dict_path)

    def _inference(self, answer: Response | Failure) -> Any:
        return answer.text if isinstance(answer, Response) else answer

    def update_model_path(self, model_path: str | None = None) -> None:
        """Serves another state dict from the next `load_model` on, as Beam's model updates require."""
        if model_path and model_path != self._source.state_dict_path:
            self._replaced = self._replaced or self._source
            self._source = replace(self._source, state_dict_path=str(model_path))

    def batch_elements_kwargs(self) -> dict[str, Any]:
        """How Beam hands prompts over: as many of a bundle at once as possible, since the model itself forms
        batches, across bundles.

        With equal limits, Beam does not search for the best size: a search that starts at 1 and takes many
        bundles to find out that larger is faster.
        """
        size = 4 * self._options.max_batch_size
        return {"min_batch_size": size, "max_batch_size": size}

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Accepts none: see `run_inference`."""

    def get_metrics_namespace(self) -> str:
        """The namespace of RunInference's metrics, and of this handler's: see `NAMESPACE`."""
        return NAMESPACE


class WholeResponseHandler(LanguageModelHandler):
    """The same, with whole `Response`s as inferences: text, tokens and why it ends."""

    def _inference(self, answer: Response | Failure) -> Response | Failure:
        return answer


def _count_answers(answers: Sequence[Response | Failure]) -> None:
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    counts = {
        "failed_prompts": len(failures),
        "late_responses": sum(failure.finish_reason == TIME for failure in failures),
        "invalid_answers": sum(failure.answer is not None for failure in failures),
        "asked_again": sum(answer.was_asked_again for answer in answers),
    }
    for name, count in counts.items():
        Metrics.counter(NAMESPACE, name).inc(count)


def _count_batch(batch: Batch) -> None:
    for name in ("prompt_tokens", "padding_tokens", "response_tokens"):
        Metrics.counter(NAMESPACE, name).inc(getattr(batch, name))
    Metrics.distribution(NAMESPACE, "batch_size").update(batch.size)
    Metrics.distribution(NAMESPACE, "batch_milliseconds").update(round(batch.seconds * 1000))
