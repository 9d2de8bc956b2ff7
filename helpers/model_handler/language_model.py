"""A language model that answers prompts: loaded from a state dict, asked in batches.

Both kinds of model are served: encoder-decoder models (flan-t5, flan-ul2) and causal ones (Llama-like), the
latter with their chat template if they have one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler import engine_thread
from helpers.model_handler.answer_schema import InvalidAnswerError, answer_schema
from helpers.model_handler.answers import Batch, Failure, Response
from helpers.model_handler.encoding import Encoder, panics_as_errors
from helpers.model_handler.engines.engine import TIME, Engine, Generated, shapes_of
from helpers.model_handler.engines.neighbours import Company
from helpers.model_handler.options import AnsweringOptions
from helpers.model_handler.prompts import Prompt, PromptError, StoppedPromptError
from helpers.model_handler.reasoning import PUBLISHED, Thinking, divide, named_marks, parse_marks
from helpers.model_handler.scheduler import Scheduler, describe
from helpers.models.architecture import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# To find out what a model's answers depend on: any tokenizer makes several tokens of each.
SAMPLE_PROMPTS = (
    "Write one long sentence about the deep blue sea, and a short one about its ships, please.",
    "Is it true that 17 is a prime number? Explain the answer to a child of seven.",
)


WISH = "That is not what was asked for. Answer again, with the right JSON and nothing else. What was wrong:"
"""What the model is told when its answer does not fit the schema; the reason follows."""


class OtherModelError(ValueError):
    """A model that cannot take another's place while it serves."""


class LanguageModel:
    """A model and its tokenizer, ready to answer.

    Attributes:
        engine: what computes; see `helpers.model_handler.engines.engine.Engine`.
        tokenizer: the model's.
        model_name: the name that it answers under.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, model_name: str = ""):
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.is_encoder_decoder = bool(engine.config.is_encoder_decoder)
        # For those who pad batches of their own.
        tokenizer.padding_side = "right" if self.is_encoder_decoder else "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._encoder = Encoder(tokenizer, engine.config, self.is_encoder_decoder)
        self._named_marks = named_marks(tokenizer)
        self._checked_options: set[AnsweringOptions] = set()
        self._company: Company | None = None  # established when prompts first share a batch
        self._scheduler = Scheduler(self.generate, self._bears, lambda: self.engine.mixing())

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, in evaluation mode on its device. Of its generation config, only the
        settings that hold here are left. With engine torch_packed it cannot be copied or trained."""
        return self.engine.model

    def take_over(self, other: LanguageModel) -> None:
        """Answers with another model's weights from the next batch on.

        Raises:
            OtherModelError: the other model has another architecture or vocabulary, or cannot be asked as
                this one is.
        """
        if shapes_of(self.engine.config) != shapes_of(other.engine.config):
            raise OtherModelError("the new state dict has another architecture")
        # Prompts waiting for their batch have been tokenized already.
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise OtherModelError("the new state dict's tokenizer has another vocabulary")
        for options in tuple(self._checked_options):
            try:
                other.check(options)
            except LoadError as error:
                if isinstance(error.__cause__, StoppedPromptError):
                    raise  # the next look may have the time
                raise OtherModelError(f"it cannot be asked as this one is: {error}") from error

        def swap() -> None:
            self.engine, self.tokenizer, self._encoder = other.engine, other.tokenizer, other._encoder
            self.model_name, self._company = other.model_name, other._company
            self._named_marks = other._named_marks

        engine_thread.run(swap)  # between two batches

    def check(self, options: AnsweringOptions) -> None:
        """Checks that the model can answer with these options at all.

        Raises:
            LoadError: the responses asked for leave no room for a prompt, nor does the system prompt, or the
                engine cannot do as asked.
        """
        if reason := self.engine.why_not(options):
            raise LoadError(f"{reason}: leave that out, or use engine torch.")
        positions = None if self.is_encoder_decoder else positions_of(self.engine.config)
        wanted = options.max_response_tokens
        if positions and wanted >= positions:
            raise LoadError(
                f"max_response_tokens is {wanted}, but {self.model_name} has {positions} positions for "
                "prompt and response together: ask for shorter responses."
            )
        try:
            self._encoder.check(options)
        except PromptError as error:
            raise LoadError(str(error)) from error
        self._checked_options.add(options)

    def encode(self, prompt: Prompt, options: AnsweringOptions | None = None) -> list[int]:
        """A prompt's token ids: see `helpers.model_handler.encoding.Encoder.encode`."""
        return self._checked(self._encoder.encode(prompt, options or AnsweringOptions()))

    def _checked(self, ids: list[int]) -> list[int]:
        rows = self.engine.rows
        if max(ids, default=0) >= rows:  # on a GPU, it would cost the process rather than the prompt
            raise PromptError(f"the tokenizer has the token {max(ids)}, but the model only {rows} tokens")
        return ids

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: AnsweringOptions | None = None,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> list[Response | Failure]:
        """Answers encoded prompts, all in one batch.

        Args:
            prompts: token ids, as `encode` gives them; they need not be of the same length.
            options: how to answer.
            is_abandoned: asked after each step; true ends it, as if the time were up.

        Returns:
            A response for each prompt, in the same order, or a failure where it was not complete in time.
        """
        options = options or AnsweringOptions()

        def compute() -> list[Response | Failure]:
            prefix_tokens = 0 if options.recompute else self._encoder.prefix_tokens(prompts, options)
            responses = self.engine.generate(prompts, options, prefix_tokens, is_abandoned)
            return [self._answer_of(*pair, options) for pair in zip(prompts, responses, strict=True)]

        return engine_thread.run(compute)

    def _answer_of(
        self, prompt: list[int], found: Generated, options: AnsweringOptions
    ) -> Response | Failure:
        """What an engine has generated, as an answer."""
        tokens = found.tokens
        if found.finish_reason == TIME:
            return Failure(
                f"the response was not complete after {options.max_response_seconds:g} s "
                f"(max_response_seconds): it had {len(tokens)} tokens",
                TIME,
            )
        with panics_as_errors():
            thinking = None if options.keep_reasoning else self._thinking(tokens, options)
            if thinking is None:
                text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                return Response(text, len(prompt), len(tokens), found.finish_reason)
        return Response(
            thinking.answer or "",
            len(prompt),
            len(tokens) - thinking.tokens,
            found.finish_reason,
            reasoning_tokens=thinking.tokens,
        )

    def _thinking(self, tokens: list[int], options: AnsweringOptions) -> Thinking | None:
        """What a response thinks before its answer; None where that is nothing."""
        given = options.reasoning_marks
        named = self._named_marks if given is None else parse_marks(given)
        if named:
            is_open = self._encoder.opens(named)
            return divide(self.tokenizer, tokens, named, is_named=True, is_open=is_open)
        if given is None and options.answer_schema is not None:  # JSON of the thinking could fit, too
            for marks in PUBLISHED:
                if found := divide(self.tokenizer, tokens, marks, is_named=False, is_open=False):
                    return found
        return None

    def _bears(self) -> Company:
        """Which company the model's answers bear, established once."""
        if self._company is not None:
            return self._company
        try:
            options = AnsweringOptions(truncate=True, max_response_tokens=2)
            found = self.engine.company([self.encode(prompt, options) for prompt in SAMPLE_PROMPTS])
        except torch.OutOfMemoryError as error:  # another time there may be enough
            log.warning("It could not be established what answers depend on: %s", describe(error))
            return Company.NONE
        except Exception as error:  # whatever it is, answering one by one may still work
            log.warning("It could not be established what answers depend on: %s", describe(error))
            found = Company.NONE
        if found is not Company.ANY:
            name = self.engine.config.model_type
            log.warning("Answers of %s depend on the prompts in a batch, so %s", name, found.value)
        self._company = found
        return found

    def ask(
        self,
        prompts: Sequence[Prompt],
        options: AnsweringOptions | None = None,
        *,
        on_batch: Callable[[Batch], object] = lambda batch: None,
    ) -> list[Response | Failure]:
        """Answers prompts of any length; one that fails does not affect the others.

        Prompts of similar length share a batch, so that little is padded; with them those that other threads
        ask at the same time, with the same options. A batch that fails, for lack of memory for instance, is
        halved until the prompts that fail stand alone.

        Args:
            prompts: texts, records or conversations; see `helpers.model_handler.prompts`.
            options: how to answer. With an `answer_schema`, a response's text is the JSON alone, and what
                does not fit is a failure that holds the answer.
            on_batch: called with batches that were answered; each batch is told to one of those who asked.

        Returns:
            A response, or the reason why there is none, for each prompt in order.
        """
        options = options or AnsweringOptions()
        results: list[Response | Failure] = [Failure("not asked")] * len(prompts)
        encoded: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            try:
                ids = self.encode(prompt, options)
                if len(ids) + options.max_response_tokens > options.max_batch_tokens:
                    raise PromptError(
                        f"the prompt has {len(ids)} tokens, which with its response is over the "
                        f"{options.max_batch_tokens} that a batch may have (max_batch_tokens)"
                    )
                encoded[index] = ids
            except PromptError as error:
                results[index] = Failure(str(error))
            except Exception as error:  # a tokenizer's own errors fail this prompt, not its batch
                results[index] = Failure(describe(error))
        self._answer(encoded, options, on_batch, results)
        if options.answer_schema is not None:
            self._validate(prompts, list(encoded), options, on_batch, results)
        return results

    def _validate(
        self,
        prompts: Sequence[Prompt],
        indices: list[int],
        options: AnsweringOptions,
        on_batch: Callable[[Batch], object],
        results: list[Response | Failure],
    ) -> None:
        """Makes the answers the JSON that they hold, and failures of those that do not fit the schema; these
        are first asked for once more, if the options say so."""
        first, encoded = {}, {}
        for index in indices:
            results[index] = fitting = _fitting(results[index], options)
            if not options.ask_again or isinstance(fitting, Response) or fitting.answer is None:
                continue
            try:
                wish = f"{WISH} {fitting.error}"
                again = self._encoder.encode_again(prompts[index], options, fitting.answer, wish)
                first[index], encoded[index] = fitting, self._checked(again)
            except Exception as error:  # such a prompt keeps its first answer
                log.info("A prompt is not asked again: %s", describe(error))
        self._answer(encoded, options, on_batch, results)
        for index in encoded:
            second = _fitting(results[index], options)
            if isinstance(second, Failure) and second.answer is None:  # late, for instance
                second = replace(
                    second,
                    error=f"{first[index].error}; asked again: {second.error}",
                    answer=first[index].answer,
                )
            results[index] = replace(second, was_asked_again=True)

    def _answer(
        self,
        encoded: dict[int, list[int]],
        options: AnsweringOptions,
        on_batch: Callable[[Batch], object],
        results: list[Response | Failure],
    ) -> None:
        """Puts the answers to encoded prompts into `results`, by their indices."""
        answers = self._scheduler.answer(list(encoded.values()), options, on_batch)
        for index, answer in zip(encoded, answers, strict=True):
            results[index] = answer


def _fitting(answer: Response | Failure, options: AnsweringOptions) -> Response | Failure:
    """An answer as the JSON that it holds, or the failure that it is if it does not fit the schema."""
    if isinstance(answer, Failure):
        return answer
    if not answer.has_begun:
        return Failure(
            f"the answer has not begun: the model has been thinking for {answer.reasoning_tokens} tokens",
            answer.finish_reason,
        )
    try:
        return replace(answer, text=answer_schema(options.answer_schema).read(answer.text))
    except InvalidAnswerError as error:
        reason = f"the answer does not fit the schema: {error}"
        return Failure(reason, answer.finish_reason, answer.text)
