"""The language model as Beam transforms: prompts to responses, and Pub/Sub messages to messages.

A message is UTF-8 text in ``data``. Its response is the model's text, with all of the message's own
attributes and these:

* ``prompt_message_id``: the message's id, given by Pub/Sub;
* ``model_name``: the model that answered.

A message that cannot be answered goes to the dead-letter topic as it came: the same bytes, the same
attributes, and ``prompt_message_id``, ``model_name`` and ``error``, the reason.

Pub/Sub allows a message 100 attributes and 10 MB. What no longer fits is left out, the last attributes by
name, and so are those that begin with ``goog``, which are Pub/Sub's own; ``attributes_left_out`` tells how
many. Of the data of a dead letter within a few kB of 10 MB the end is cut; ``data_bytes_cut`` tells how much.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.transforms.window import TimestampedValue

from helpers.model_handler import NAMESPACE, LanguageModelHandler
from helpers.serving.language_model import Failure

log = logging.getLogger(__name__)

# https://cloud.google.com/pubsub/quotas#resource_limits
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 1024
MAX_MESSAGE_BYTES = 10_000_000 - 4096  # less what the request has around the message


class FailedPromptError(RuntimeError):
    """A prompt has no response, and its failure no output: see ``AskModel.with_exception_handling``."""


class FailedPrompt(NamedTuple):
    """A prompt without a response, and why; ``prompt`` is ``(key, text)`` where the prompts had keys."""

    prompt: Any
    error: str


class AskModel(beam.PTransform):
    """Asks a language model: prompts in, its responses out.

    The prompts are ``str``, or ``(key, str)`` pairs if ``keyed``; the responses are of the same form. Windows
    and timestamps are kept.

    Without more, a prompt that cannot be answered is an error, which stops a batch job and which a streaming
    job tries again for ever. ``with_exception_handling`` gives such prompts an output of their own.

    Args:
        model_name: the model that the state dict was made from; None takes the manifest's word.
        state_dict_path: ``.../NAME.pt``, local or ``gs://``.
        max_response_tokens: a response ends here, unless the model ends it before.
        keyed: whether the prompts are ``(key, str)`` pairs.
        handler_options: further arguments of ``LanguageModelHandler``.
    """

    def __init__(
        self,
        model_name: str | None,
        state_dict_path: str,
        max_response_tokens: int = 256,
        *,
        keyed: bool = False,
        **handler_options: Any,
    ) -> None:
        super().__init__()
        self._handler = LanguageModelHandler(
            state_dict_path, model_name, max_response_tokens=max_response_tokens, **handler_options
        )
        self._keyed = keyed
        self._catch = False

    def with_exception_handling(self) -> "AskModel":
        """Makes the output a pair: the responses, and the ``FailedPrompt``s."""
        self._catch = True
        return self

    # No return type: Beam takes it for the elements' and warns of a union.
    def expand(self, prompts: PCollection):
        results = (
            prompts
            | "Note time" >> beam.ParDo(_note_time, self._keyed)
            | "Run inference" >> RunInference(KeyedModelHandler(self._handler))
        )
        if not self._catch:
            return results | "Get responses" >> beam.Map(_response_or_raise, self._keyed)
        outputs = results | "Split" >> beam.ParDo(_split, self._keyed).with_outputs("failed", main="answered")
        return outputs.answered, outputs.failed


def _note_time(element: Any, keyed: bool, timestamp: Any = beam.DoFn.TimestampParam) -> Iterator[Any]:
    """RunInference's batches are of the end of their window: each prompt's own time goes along in its key."""
    key, prompt = element if keyed else (None, element)
    yield (timestamp, key), prompt


def _split(element: Any, keyed: bool) -> Iterator[Any]:
    (timestamp, key), result = element
    answer = result.inference
    if isinstance(answer, Failure):
        failed = FailedPrompt((key, result.example) if keyed else result.example, answer.error)
        yield TaggedOutput("failed", TimestampedValue(failed, timestamp))
    else:
        yield TimestampedValue((key, answer) if keyed else answer, timestamp)


def _response_or_raise(element: Any, keyed: bool) -> TimestampedValue:
    (timestamp, key), result = element
    if isinstance(result.inference, Failure):
        raise FailedPromptError(f"{result.inference.error}: {str(result.example)[:100]!r}")
    return TimestampedValue((key, result.inference) if keyed else result.inference, timestamp)


class AskMessages(beam.PTransform):
    """Answers Pub/Sub messages: ``PubsubMessage``s in, and two collections of ``PubsubMessage``s out.

    The arguments are ``AskModel``'s. The output is a pair: the responses, and the dead letters.
    """

    def __init__(self, model_name: str, state_dict_path: str, **options: Any) -> None:
        super().__init__()
        self._model_name = model_name
        self._ask = AskModel(model_name, state_dict_path, keyed=True, **options).with_exception_handling()

    def expand(self, messages: PCollection) -> tuple[PCollection, PCollection]:
        read = messages | "Read prompts" >> beam.ParDo(_read_prompt).with_outputs(
            "unreadable", main="prompts"
        )
        answered, failed = read.prompts | "Ask model" >> self._ask
        responses = answered | "To responses" >> beam.Map(to_response, model_name=self._model_name)
        failures = (read.unreadable, failed) | "All failures" >> beam.Flatten()
        return responses, failures | "To dead letters" >> beam.Map(
            to_dead_letter, model_name=self._model_name
        )


def _read_prompt(message: PubsubMessage) -> Iterator[Any]:
    # The whole message is the key, so that it comes out beside its response.
    try:
        yield message, message.data.decode()
    except UnicodeDecodeError as error:
        yield TaggedOutput("unreadable", FailedPrompt((message, ""), f"the message is not UTF-8: {error}"))


def to_response(answered: tuple[PubsubMessage, str], model_name: str) -> PubsubMessage:
    """A message's response, for the responses topic."""
    message, text = answered
    data = text.encode(errors="replace")
    return PubsubMessage(data, _attributes(message, data, model_name=model_name))


def to_dead_letter(failed: FailedPrompt, model_name: str) -> PubsubMessage:
    """A message that has no response, as it came, with the reason, for the dead-letter topic."""
    message, _ = failed.prompt
    Metrics.counter(NAMESPACE, "dead_letters").inc()
    log.warning("Message %s has no response: %s", message.message_id, failed.error)
    # Room for what is added, should the message be as large as any may be.
    data = message.data[: MAX_MESSAGE_BYTES - 4 * MAX_ATTRIBUTE_BYTES]
    more = {"data_bytes_cut": str(len(message.data) - len(data))} if len(data) < len(message.data) else {}
    attributes = _attributes(message, data, model_name=model_name, error=failed.error, **more)
    return PubsubMessage(data, attributes)


def _bytes_of(attribute: tuple[str, str]) -> int:
    name, value = attribute
    return len(name.encode()) + len(value.encode()) + 16  # what the request has around them


def _attributes(message: PubsubMessage, data: bytes, **more: str) -> dict[str, str]:
    """The message's own attributes and more, within what Pub/Sub accepts: publishing would fail for ever."""
    more = {"prompt_message_id": message.message_id or "", **more}
    more = {
        name: value.encode(errors="replace")[:MAX_ATTRIBUTE_BYTES].decode(errors="ignore")
        for name, value in more.items()
    }
    own = {name: value for name, value in (message.attributes or {}).items() if name not in more}
    # Pub/Sub adds some of its own to what it delivers, and refuses to take them back.
    kept = dict(sorted(item for item in own.items() if not item[0].lower().startswith("goog")))
    kept = dict(list(kept.items())[: MAX_ATTRIBUTES - len(more) - 1])
    size = len(data) + sum(map(_bytes_of, (kept | more).items()))
    while kept and size > MAX_MESSAGE_BYTES:
        size -= _bytes_of(kept.popitem())  # the last by name
    if len(kept) < len(own):
        more["attributes_left_out"] = str(len(own) - len(kept))
    return {**kept, **more}
