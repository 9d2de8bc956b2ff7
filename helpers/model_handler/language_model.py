"""A language model that answers prompts: loaded from a state dict, asked in batches.

Both kinds of model are served: encoder-decoder models (flan-t5, flan-ul2) and causal ones (Llama-like), the
latter with their chat template if they have one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from helpers.model_handler.answers import Batch, Failure, Response, batches_by_length
from helpers.model_handler.model_loading import LoadError
from helpers.model_handler.options import AnsweringOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# A tokenizer without a limit reports a number larger than this.
NO_LIMIT = 10**6


class PromptError(ValueError):
    """A prompt that cannot be asked."""


class OtherModelError(ValueError):
    """A model that cannot take another's place while it serves."""


class LanguageModel:
    """A model and its tokenizer, ready to answer.

    Attributes:
        model: the transformers model, in evaluation mode on its device.
        tokenizer: pads on the side that the kind of model needs.
        model_name: the name that it answers under.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_name: str = ""):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # A causal model goes on from the last position, so that must be the prompt's last token, not padding.
        # An encoder reads the whole, and counts its positions from the start.
        tokenizer.padding_side = "right" if self.is_encoder_decoder else "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
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
            self.model, self.tokenizer = other.model, other.tokenizer
            self.model_name = other.model_name
            self.end_token_ids = other.end_token_ids

    def check(self, options: AnsweringOptions) -> None:
        """Checks that the model can answer with these options at all.

        Raises:
            LoadError: the responses asked for leave no room for a prompt.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        wanted = options.max_response_tokens
        if positions and not self.is_encoder_decoder and wanted >= positions:
            raise LoadError(
                f"max_response_tokens is {wanted}, but {self.model_name} has {positions} positions for "
                "prompt and response together: ask for shorter responses."
            )

    def encode(self, prompt: str, options: AnsweringOptions | None = None) -> list[int]:
        """A prompt's token ids, with the chat template around it where the model has one.

        Raises:
            PromptError: the prompt is empty, is not text, or is longer than allowed.
        """
        options = options or AnsweringOptions()
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is {type(prompt).__name__}, not text")
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from error
        limit = self.max_prompt_tokens(options)
        ids = self._tokenize(prompt)
        if limit is None or len(ids) <= limit:
            return ids
        if not options.truncate:
            raise PromptError(f"the prompt has {len(ids)} tokens, but the limit is {limit}")
        # Only the prompt's own text is cut: what surrounds it (template, end token) must stay whole.
        room = limit - len(self._tokenize(""))
        if room < 1:
            raise PromptError(f"max_prompt_tokens {limit} leaves no room beside the chat template")
        plain = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        while room > 0:
            ids = self._tokenize(self.tokenizer.decode(plain[:room]))
            if len(ids) <= limit:
                return ids
            room -= len(ids) - limit  # text cut in the middle of a word may have more tokens than before
        raise PromptError(f"the prompt cannot be cut to {limit} tokens")

    def max_prompt_tokens(self, options: AnsweringOptions) -> int | None:
        """The most tokens in a prompt, as asked for and as the model allows; None if unbounded."""
        if self.is_encoder_decoder:
            # T5 has no limit of its own, but its memory grows with the square of a prompt's length: unless a
            # limit is asked for, it is the length that the tokenizer names, 512 for flan-t5.
            named = self.tokenizer.model_max_length
            return options.max_prompt_tokens or (named if named < NO_LIMIT else None)
        limits = [options.max_prompt_tokens]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits.append(max(1, positions - options.max_response_tokens) if positions else None)
        known = [limit for limit in limits if limit]
        return min(known) if known else None

    def _tokenize(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template and not self.is_encoder_decoder:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        return self.tokenizer(prompt, verbose=False)["input_ids"]

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
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        if options.temperature > 0 and options.seed is not None:
            torch.manual_seed(options.seed)
        output = self.model.generate(**batch, generation_config=self._generation_config(options))
        responses = output if self.is_encoder_decoder else output[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Response(text.strip(), len(prompt), self._count(ids))
            for text, prompt, ids in zip(texts, prompts, responses.tolist(), strict=True)
        ]

    def _generation_config(self, options: AnsweringOptions):
        sampled = options.temperature > 0
        values = self.model.generation_config.to_dict() | {
            "max_new_tokens": options.max_response_tokens,
            "max_length": None,
            "min_length": 0,
            "do_sample": sampled,
            "num_beams": 1,
            # Unset rather than left as the checkpoint has them: greedy search warns about each.
            "temperature": options.temperature if sampled else None,
            "top_p": options.top_p if sampled else None,
            "top_k": 0 if sampled else None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        return type(self.model.generation_config)(**values)

    def _count(self, ids: list[int]) -> int:
        """Counts the tokens of a response, including its end token but not the padding after it."""
        start = 1 if self.is_encoder_decoder else 0  # the decoder's start token is not generated
        for position, token in enumerate(ids[start:], start=1):
            if token in self.end_token_ids:
                return position
        return len(ids) - start

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
        room = options.max_batch_size, options.max_batch_tokens, options.max_response_tokens
        for batch in batches_by_length(lengths, *room):
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


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
