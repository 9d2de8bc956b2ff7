"""A language model that answers prompts: loaded from a state dict, asked in batches.

Both kinds of model are served: encoder-decoder models (flan-t5, flan-ul2) and causal ones (Llama-like), the
latter with their chat template if they have one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from helpers.model_handler import generation_settings
from helpers.model_handler.answers import Batch, Failure, Response, batches_by_length
from helpers.model_handler.encoding import Encoder, PromptError, panics_as_errors
from helpers.model_handler.model_loading import LoadError
from helpers.model_handler.neighbours import Company, establish
from helpers.model_handler.options import AnsweringOptions
from helpers.models.architecture import positions_of, response_positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# To find out what a model's answers depend on: any tokenizer makes several tokens of each.
SAMPLE_PROMPTS = (
    "Write one long sentence about the deep blue sea, and a short one about its ships, please.",
    "Is it true that 17 is a prime number? Explain the answer to a child of seven.",
)


class OtherModelError(ValueError):
    """A model that cannot take another's place while it serves."""


class LanguageModel:
    """A model and its tokenizer, ready to answer.

    Attributes:
        model: the transformers model, in evaluation mode on its device. Of its generation config, only the
            settings that hold here are left: see `helpers.model_handler.generation_settings`.
        tokenizer: the model's.
        model_name: the name that it answers under.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_name: str = ""):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # For those who pad batches of their own; here, see _padded.
        tokenizer.padding_side = "right" if self.is_encoder_decoder else "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if left := generation_settings.not_honoured(model.generation_config):
            log.warning(
                "Settings of the publisher's that do not hold here, where the answering options decide: %s",
                ", ".join(f"{name}={value!r}" for name, value in left.items()),
            )
        model.generation_config = generation_settings.held(model.generation_config)
        self._encoder = Encoder(tokenizer, model.config, self.is_encoder_decoder)
        self._pad_token_id = self._choose_pad_token()
        self._company: Company | None = None  # established when prompts first share a batch
        # A runner may call from many threads. Batches take turns: two at once would only share the same
        # cores, and need the memory of both.
        self._turn = threading.Lock()
        self.end_token_ids = _as_set(model.generation_config.eos_token_id)

    def take_over(self, other: LanguageModel) -> None:
        """Answers with another model's weights from the next batch on.

        Raises:
            OtherModelError: the other model has another architecture or vocabulary.
        """
        if _shapes(self.model) != _shapes(other.model) or type(self.model) is not type(other.model):
            raise OtherModelError("the new state dict has another architecture")
        # Prompts waiting for their batch have been tokenized already.
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise OtherModelError("the new state dict's tokenizer has another vocabulary")
        with self._turn:
            self.model, self.tokenizer, self._encoder = other.model, other.tokenizer, other._encoder
            self.model_name = other.model_name
            self._pad_token_id = other._pad_token_id
            self.end_token_ids = other.end_token_ids

    def check(self, options: AnsweringOptions) -> None:
        """Checks that the model can answer with these options at all.

        Raises:
            LoadError: the responses asked for leave no room for a prompt.
        """
        positions = None if self.is_encoder_decoder else positions_of(self.model.config)
        wanted = options.max_response_tokens
        if positions and wanted >= positions:
            raise LoadError(
                f"max_response_tokens is {wanted}, but {self.model_name} has {positions} positions for "
                "prompt and response together: ask for shorter responses."
            )

    def encode(self, prompt: str, options: AnsweringOptions | None = None) -> list[int]:
        """A prompt's token ids: see `helpers.model_handler.encoding.Encoder.encode`."""
        ids = self._encoder.encode(prompt, options or AnsweringOptions())
        rows = _rows(self.model)
        if max(ids, default=0) >= rows:  # on a GPU, it would cost the process rather than the prompt
            raise PromptError(f"the tokenizer has the token {max(ids)}, but the model only {rows} tokens")
        return ids

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], options: AnsweringOptions | None = None
    ) -> list[Response]:
        """Answers encoded prompts, all in one batch.

        Args:
            prompts: token ids, as `encode` gives them; they need not be of the same length.
            options: how to answer.

        Returns:
            A response for each prompt, in the same order.
        """
        options = options or AnsweringOptions()
        batch = self._padded(prompts)
        if options.temperature > 0 and options.seed is not None:
            torch.manual_seed(options.seed)
        settings = generation_settings.for_answering(
            self.model.generation_config, options, self._pad_token_id
        )
        # A decoder with learned positions has no more tokens to give than positions.
        most = response_positions_of(self.model.config)
        settings.max_new_tokens = min(options.max_response_tokens, most - 1 if most else math.inf)
        # Text to stop at can only be found with the tokenizer.
        more = {"tokenizer": self.tokenizer} if settings.stop_strings else {}
        output = self.model.generate(**batch, generation_config=settings, **more)
        # Of an encoder-decoder model the first token is the decoder's start, which is not generated.
        start = 1 if self.is_encoder_decoder else batch["input_ids"].shape[1]
        # Without what follows the end: padding need not be a token that decoding leaves out.
        responses = [self._until_end(ids) for ids in output[:, start:].tolist()]
        with panics_as_errors():
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Response(text.strip(), len(prompt), len(ids))
            for text, prompt, ids in zip(texts, prompts, responses, strict=True)
        ]

    def _choose_pad_token(self) -> int:
        """A token to pad with: the tokenizer's own, or any that the model has a row for, since it is masked.

        Some tokenizers have none, and some name one that is not in the model's vocabulary.
        """
        rows = _rows(self.model)
        ends = _as_set(self.model.generation_config.eos_token_id)
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *sorted(ends), 0):
            if token is not None and 0 <= token < rows:
                return token
        return 0

    def _padded(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """A batch of encoded prompts, padded to the longest, with the mask that says what is padding."""
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), self._pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            # A causal model continues after the last position, which must hold the prompt's last token. An
            # encoder reads the whole, and counts its positions from the start.
            place = (
                slice(0, len(prompt)) if self.is_encoder_decoder else slice(longest - len(prompt), longest)
            )
            tokens[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        device = self.model.device
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}

    def _bears(self) -> Company:
        """Which company the model's answers bear, established once."""
        if self._company is not None:
            return self._company
        try:
            options = AnsweringOptions(truncate=True, max_response_tokens=2)
            samples = [self.encode(prompt, options) for prompt in SAMPLE_PROMPTS]
            found = establish(self._next_logits, samples, self.model.dtype)
        except torch.OutOfMemoryError as error:  # another time there may be enough
            log.warning("It could not be established what answers depend on: %s", _describe(error))
            return Company.NONE
        except Exception as error:  # whatever it is, answering one by one may still work
            log.warning("It could not be established what answers depend on: %s", _describe(error))
            found = Company.NONE
        if found is not Company.ANY:
            name = type(self.model).__name__
            log.warning("Answers of %s depend on the prompts in a batch, so %s", name, found.value)
        self._company = found
        return found

    @torch.inference_mode()
    def _next_logits(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """The logits of each prompt's next two tokens, the first of which is the same for all."""
        settings = generation_settings.for_answering(
            type(self.model.generation_config)(
                decoder_start_token_id=self.model.generation_config.decoder_start_token_id
            ),
            AnsweringOptions(max_response_tokens=2),
            self._pad_token_id,
        )
        settings.update(min_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        first = prompts[0][0]

        def choose_first(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            chosen = torch.full_like(scores, -1e9)
            chosen[:, first] = 0
            return chosen

        held, self.model.generation_config = self.model.generation_config, type(settings)()
        try:  # transformers would fill in the publisher's settings, of which none must act here
            output = self.model.generate(
                **self._padded(prompts), generation_config=settings, logits_processor=[choose_first]
            )
        finally:
            self.model.generation_config = held
        return torch.cat(output.logits, dim=-1)

    def _until_end(self, ids: list[int]) -> list[int]:
        """The tokens of a response, its end token included and the padding after it not."""
        for position, token in enumerate(ids, start=1):
            if token in self.end_token_ids:
                return ids[:position]
        return ids

    def ask(
        self,
        prompts: Sequence[str],
        options: AnsweringOptions | None = None,
        *,
        on_batch: Callable[[Batch], object] = lambda batch: None,
    ) -> list[Response | Failure]:
        """Answers prompts of any length; one that fails does not affect the others.

        Prompts of similar length share a batch, so that little is padded. A batch that fails, for lack of
        memory for instance, is halved until the prompts that fail stand alone.

        Args:
            prompts: the texts.
            options: how to answer.
            on_batch: called with each batch that was answered.

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
                results[index] = Failure(_describe(error))
        lengths = {index: len(ids) for index, ids in encoded.items()}
        company = Company.ANY
        if len(lengths) > 1 and options.max_batch_size > 1:
            with self._turn:
                company = self._bears()
        for batch in batches_by_length(
            lengths,
            1 if company is Company.NONE else options.max_batch_size,
            options.max_batch_tokens,
            options.max_response_tokens,
            padded=company is Company.ANY,
        ):
            with self._turn:
                for index, result in self._isolate(batch, encoded, options, on_batch):
                    results[index] = result
        return results

    def _isolate(
        self,
        batch: list[int],
        encoded: dict[int, list[int]],
        options: AnsweringOptions,
        on_batch: Callable[[Batch], object],
    ) -> Iterator[tuple[int, Response | Failure]]:
        prompts = [encoded[index] for index in batch]
        started = time.monotonic()
        try:
            responses = self.generate(prompts, options)
        except Exception as error:  # whatever it is, it must not cost the other prompts their answers
            if _is_broken_device(error):
                raise  # every prompt of this process would fail: the runner tries again elsewhere
            reason = _describe(error)
        else:
            on_batch(Batch.of(prompts, responses, time.monotonic() - started))
            yield from zip(batch, responses, strict=True)
            return
        if len(batch) == 1:
            log.warning("A prompt failed: %s", reason)
            yield batch[0], Failure(reason)
            return
        log.warning("A batch of %d prompts failed and is halved: %s", len(batch), reason)
        middle = len(batch) // 2
        yield from self._isolate(batch[:middle], encoded, options, on_batch)
        yield from self._isolate(batch[middle:], encoded, options, on_batch)


def _is_broken_device(error: Exception) -> bool:
    """Whether the accelerator itself failed, rather than the prompt, and not merely for lack of memory."""
    broken = getattr(torch, "AcceleratorError", ())
    return isinstance(error, broken) and not isinstance(error, torch.OutOfMemoryError)


def _rows(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
