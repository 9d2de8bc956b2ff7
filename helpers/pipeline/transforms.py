"""The language model as Beam transforms: prompts to responses, and Pub/Sub messages to messages.

A message is UTF-8 text in `data`: a prompt, or, as the option `prompt_format` or an attribute of that name
says, a record or a conversation in JSON. Its response is the model's text, or with `answer_format` a record
of it (`helpers.pipeline.answer_record`), with all of the message's own attributes and these:

* `prompt_message_id`: the message's id, given by Pub/Sub;
* `model_name`: the model that answered;
* `finish_reason`: `stop` where the model ended its answer, `length` where the answer was cut at the most
  tokens;
* `prompt_tokens` and `response_tokens`: how many the prompt and the answer have;
* `reasoning_tokens`: how many a reasoning model has thought before its answer, if it has;
* `ordering_key`: the message's, if it has one. Dataflow's sink publishes without ordering keys.

A message without a response goes to the dead-letter topic as it came, with the same bytes and attributes, and
with `prompt_message_id`, `model_name`, `ordering_key` and

* `error`: the reason;
* `answer`: the first kB of what the model said, if that did not fit the schema;
* `finish_reason`: `time`, if the response was not complete in time; else, if there is one, why it ends.

Pub/Sub allows a message 100 attributes and 10 MB. Attributes that no longer fit are left out, the last by
name first, and so are those that begin with `goog`, which are Pub/Sub's own; `attributes_left_out` says
how many. A dead letter within a few kB of 10 MB loses the end of its data; `data_bytes_cut` says how much.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.utils.windowed_value import WindowedValue

from helpers.model_handler import NAMESPACE, AnsweringOptions, Failure, LanguageModelHandler, Response
from helpers.model_handler.handler import WholeResponseHandler
from helpers.model_handler.options import answering_options, takes_options
from helpers.model_handler.prompts import PromptError, parse_prompt
from helpers.pipeline.answer_record import answer_record

log = logging.getLogger(__name__)

# https://cloud.google.com/pubsub/quotas#resource_limits
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1024
MAX_MESSAGE_BYTES = 10_000_000 - 4096  # less the request's overhead


class FailedPromptError(RuntimeError):
    """A prompt failed, and failures have no output of their own: see `AskModel.with_exception_handling`."""


class FailedPrompt(NamedTuple):
    """A prompt without a response, and why.

    Attributes:
        prompt: what was asked; `(key, prompt)` where the prompts had keys.
        error: the reason; the whole `Failure` if whole responses were asked for.
    """

    prompt: Any
    error: "str | Failure"


@takes_options
class AskModel(beam.PTransform):
    """Asks a language model: prompts in, its responses out.

        responses = prompts | AskModel("google/flan-t5-xl", "gs://BUCKET/flan-t5-xl.pt")

    The prompts are `str`, records (`dict`) or conversations (`list`), see `helpers.model_handler.prompts`, or
    `(key, prompt)` pairs if `keyed`; the responses are `str`, or pairs. Windows and timestamps are kept.

    By default, a prompt that fails raises an error, which stops a batch job and which a streaming job retries
    for ever. `with_exception_handling` gives such prompts an output of their own.

    Args:
        model_name: the model that the state dict must have been made from; None takes any.
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        keyed: whether the prompts are `(key, prompt)` pairs.
        whole: whether the responses are `helpers.model_handler.Response`s (text, tokens, why it ends) rather
            than texts, and the errors `Failure`s.
        {options}

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        model_name: str | None,
        state_dict_path: str,
        max_response_tokens: int = AnsweringOptions.max_response_tokens,
        *,
        keyed: bool = False,
        whole: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        handler = WholeResponseHandler if whole else LanguageModelHandler
        self._handler = handler(
            state_dict_path, model_name, max_response_tokens=max_response_tokens, **options
        )
        self._keyed, self._whole = keyed, whole
        self._catch = False

    def with_exception_handling(self) -> "AskModel":
        """Makes the output a pair: the responses, and the `FailedPrompt`s."""
        self._catch = True
        return self

    # No return type: Beam takes it for the element type and warns about a union.
    def expand(self, prompts: PCollection):
        results = (
            prompts
            | "Note time" >> beam.ParDo(_note_place, self._keyed)
            | "Run inference" >> RunInference(KeyedModelHandler(self._handler))
        )
        if not self._catch:
            return results | "Get responses" >> beam.ParDo(_response_or_raise, self._keyed)
        outputs = results | "Split" >> beam.ParDo(_split, self._keyed, self._whole).with_outputs(
            "failed", main="answered"
        )
        return outputs.answered, outputs.failed


def _note_place(
    element: Any,
    keyed: bool,
    timestamp: Any = beam.DoFn.TimestampParam,
    window: Any = beam.DoFn.WindowParam,
) -> Iterator[Any]:
    """RunInference's batches are stamped with the end of their window: a prompt's own place goes in its
    key."""
    key, prompt = element if keyed else (None, element)
    yield (timestamp, window, key), prompt


def _in_place(value: Any, place: tuple) -> WindowedValue:
    """A value at the time and in the window of its prompt. Given a time alone, Beam would assign windows
    anew: an element of one of two sliding windows would come out in both."""
    timestamp, window, _ = place
    return WindowedValue(value, timestamp, (window,))


def _split(element: Any, keyed: bool, whole: bool) -> Iterator[Any]:
    place, result = element
    key, answer = place[2], result.inference
    if isinstance(answer, Failure):
        prompt = (key, result.example) if keyed else result.example
        failed = FailedPrompt(prompt, answer if whole else answer.error)
        yield TaggedOutput("failed", _in_place(failed, place))
    else:
        yield _in_place((key, answer) if keyed else answer, place)


def _response_or_raise(element: Any, keyed: bool) -> Iterator[Any]:
    place, result = element
    if isinstance(result.inference, Failure):
        raise FailedPromptError(f"{result.inference.error}: {str(result.example)[:100]!r}")
    yield _in_place((place[2], result.inference) if keyed else result.inference, place)


@takes_options
class AskMessages(beam.PTransform):
    """Answers Pub/Sub messages: `PubsubMessage`s in, and two collections of `PubsubMessage`s out.

        responses, dead_letters = messages | AskMessages("google/flan-t5-xl", "gs://BUCKET/flan-t5-xl.pt")

    Args:
        model_name: the model that the state dict was made from; the responses carry its name.
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        {options}

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of its range.
    """

    def __init__(self, model_name: str, state_dict_path: str, **options: Any) -> None:
        super().__init__()
        self._model_name = model_name
        chosen = answering_options(options)
        self._reading = chosen.prompt_format, chosen.template
        self._answer_format = chosen.answer_format
        ask = AskModel(model_name, state_dict_path, keyed=True, whole=True, **options)
        self._ask = ask.with_exception_handling()

    # No return type, as above.
    def expand(self, messages: PCollection):
        read = messages | "Read prompts" >> beam.ParDo(_read_prompt, *self._reading).with_outputs(
            "unreadable", main="prompts"
        )
        answered, failed = read.prompts | "Ask model" >> self._ask
        responses = answered | "To responses" >> beam.Map(
            to_response, model_name=self._model_name, answer_format=self._answer_format
        )
        failures = (read.unreadable, failed) | "All failures" >> beam.Flatten()
        return responses, failures | "To dead letters" >> beam.Map(
            to_dead_letter, model_name=self._model_name
        )


def _read_prompt(message: PubsubMessage, prompt_format: str, template: str | None) -> Iterator[Any]:
    prompt_format = (message.attributes or {}).get("prompt_format", prompt_format)
    # The whole message is the key, so that it comes out beside its response.
    try:
        yield message, parse_prompt(message.data.decode(), prompt_format, template)
    except UnicodeDecodeError as error:
        yield TaggedOutput("unreadable", FailedPrompt((message, ""), f"the message is not UTF-8: {error}"))
    except PromptError as error:
        yield TaggedOutput("unreadable", FailedPrompt((message, ""), str(error)))


def to_response(
    answered: tuple[PubsubMessage, Response], model_name: str, answer_format: str
) -> PubsubMessage:
    """A message's response, for the responses topic."""
    message, response = answered
    more = {
        "model_name": model_name,
        "finish_reason": response.finish_reason,
        "prompt_tokens": str(response.prompt_tokens),
        "response_tokens": str(response.response_tokens),
    }
    if response.reasoning_tokens:
        more["reasoning_tokens"] = str(response.reasoning_tokens)
    text = answer_record(message, response, model_name) if answer_format == "record" else response.text
    data = text.encode(errors="replace")
    return PubsubMessage(data, _attributes(message, data, **more))


def to_dead_letter(failed: FailedPrompt, model_name: str) -> PubsubMessage:
    """A message without a response, as it came and with the reason, for the dead-letter topic."""
    message, _ = failed.prompt
    failure = failed.error if isinstance(failed.error, Failure) else Failure(failed.error)
    Metrics.counter(NAMESPACE, "dead_letters").inc()
    log.warning("Message %s has no response: %s", message.message_id, failure.error)
    # Leaves room for what is added, even if the message is as large as Pub/Sub allows.
    data = message.data[: MAX_MESSAGE_BYTES - 6 * MAX_ATTRIBUTE_BYTES]
    more = {"data_bytes_cut": str(len(message.data) - len(data))} if len(data) < len(message.data) else {}
    if failure.finish_reason:
        more["finish_reason"] = failure.finish_reason
    if failure.answer is not None:
        more["answer"] = failure.answer
    attributes = _attributes(message, data, model_name=model_name, error=failure.error, **more)
    return PubsubMessage(data, attributes)


def _bytes_of(attribute: tuple[str, str]) -> int:
    name, value = attribute
    return len(name.encode()) + len(value.encode()) + 16  # the request's overhead


def _attributes(message: PubsubMessage, data: bytes, **more: str) -> dict[str, str]:
    """The message's own attributes and more, within Pub/Sub's limits, or publishing would fail for ever."""
    if not message.message_id:  # its reader has only an attribute of its own to match it by
        Metrics.counter(NAMESPACE, "without_message_id").inc()
    more = {"prompt_message_id": message.message_id or "", **more}
    if message.ordering_key:
        more["ordering_key"] = message.ordering_key
    more = {
        name: value.encode(errors="replace")[:MAX_ATTRIBUTE_BYTES].decode(errors="ignore")
        for name, value in more.items()
    }
    own = {name: value for name, value in (message.attributes or {}).items() if name not in more}
    # Pub/Sub adds attributes of its own on delivery, and refuses them when published again.
    kept = dict(sorted(item for item in own.items() if not item[0].lower().startswith("goog")))
    kept = dict(list(kept.items())[: MAX_ATTRIBUTES - len(more) - 1])
    size = len(data) + sum(map(_bytes_of, (kept | more).items()))
    while kept and size > MAX_MESSAGE_BYTES:
        size -= _bytes_of(kept.popitem())  # the last by name
    if len(kept) < len(own):
        more["attributes_left_out"] = str(len(own) - len(kept))
    return {**kept, **more}
