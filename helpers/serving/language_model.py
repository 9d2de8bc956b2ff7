"""A language model that answers prompts: loaded from a state dict, asked in batches.

Both kinds of model are served: encoder-decoder models (flan-t5, flan-ul2) and causal ones (Llama-like), the
latter with their chat template if they have one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# A tokenizer without a limit names a number that is larger than this.
NO_LIMIT = 10**6


@dataclass(frozen=True)
class Generation:
    """How responses are generated. The defaults are greedy: the same prompt gives the same response.

    Attributes:
        max_response_tokens: a response ends here, unless the model ends it before.
        max_prompt_tokens: longer prompts fail, or lose their end with ``truncate``; None means the model's
            own limit.
        truncate: whether a prompt that is too long is cut rather than refused.
        temperature: 0 is greedy; above 0 the response is sampled.
        top_p: sample from the most probable tokens that together have this probability.
        seed: makes the sampling of the same batch repeatable; None draws anew each time.
    """

    max_response_tokens: int = 256
    max_prompt_tokens: int | None = None
    truncate: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens is {self.max_response_tokens}: it must be 1 or more.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens is {self.max_prompt_tokens}: it must be 1 or more.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be 0 or more, and top_p above 0 and at most 1.")


@dataclass(frozen=True)
class Response:
    """A model's answer to one prompt, with the tokens of both."""

    text: str
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Batch:
    """What one batch was.

    Attributes:
        size: prompts.
        prompt_tokens: without padding.
        padding_tokens: that the prompts were padded with, to the longest.
        response_tokens: generated and used.
        seconds: that it took.
    """

    size: int
    prompt_tokens: int
    padding_tokens: int
    response_tokens: int
    seconds: float

    @classmethod
    def of(cls, prompts: Sequence[list[int]], responses: Sequence[Response], seconds: float) -> Batch:
        """Sums up a batch of encoded prompts and their responses."""
        tokens = sum(map(len, prompts))
        padding = len(prompts) * max(map(len, prompts)) - tokens
        return cls(len(prompts), tokens, padding, sum(r.response_tokens for r in responses), seconds)


@dataclass(frozen=True)
class Failure:
    """Why a prompt has no response."""

    error: str


class PromptError(ValueError):
    """A prompt that cannot be asked."""


class OtherModelError(ValueError):
    """A model that cannot take another's place while it serves."""


class LanguageModel:
    """A model and its tokenizer, ready to answer.

    Attributes:
        model: the transformers model, in evaluation mode on its device.
        tokenizer: pads on the side that the kind of model needs.
        model_name: what it answers as.
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
        # A runner may call from many threads. One batch at a time: two would only share the same cores, and
        # need the memory of both.
        self._turn = threading.Lock()
        self.end_token_ids = _as_set(model.generation_config.eos_token_id)

    def take_over(self, other: LanguageModel) -> None:
        """Answers with another model's weights from the next batch on.

        Raises:
            OtherModelError: the other model is of another architecture, or has another vocabulary.
        """
        if _shapes(self.model) != _shapes(other.model) or type(self.model) is not type(other.model):
            raise OtherModelError("the new state dict is of another architecture")
        # Prompts that wait for their batch are tokens already.
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise OtherModelError("the new state dict's tokenizer has another vocabulary")
        with self._turn:
            self.model, self.tokenizer = other.model, other.tokenizer
            self.model_name = other.model_name
            self.end_token_ids = other.end_token_ids

    def encode(self, prompt: str, generation: Generation | None = None) -> list[int]:
        """A prompt's token ids, with the chat template around it where the model has one.

        Raises:
            PromptError: the prompt is empty, is no text, or is longer than allowed.
        """
        generation = generation or Generation()
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is {type(prompt).__name__}, not text")
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from error
        limit = self.max_prompt_tokens(generation)
        ids = self._tokenize(prompt)
        if limit is None or len(ids) <= limit:
            return ids
        if not generation.truncate:
            raise PromptError(f"the prompt has {len(ids)} tokens, and the limit is {limit}")
        # Words are cut, not tokens: what surrounds the prompt (template, end token) must stay whole.
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

    def max_prompt_tokens(self, generation: Generation) -> int | None:
        """The longest prompt in tokens, as asked for and as the model can take; None if unbounded."""
        if self.is_encoder_decoder:
            # T5 has no limit of its own, but needs memory with the square of a prompt's length: without a
            # limit asked for, it is the length that the tokenizer names, 512 for flan-t5.
            named = self.tokenizer.model_max_length
            return generation.max_prompt_tokens or (named if named < NO_LIMIT else None)
        limits = [generation.max_prompt_tokens]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limits.append(max(1, positions - generation.max_response_tokens) if positions else None)
        known = [limit for limit in limits if limit]
        return min(known) if known else None

    def _tokenize(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template and not self.is_encoder_decoder:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        return self.tokenizer(prompt, verbose=False)["input_ids"]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], generation: Generation | None = None) -> list[Response]:
        """Answers encoded prompts, all in one batch.

        Args:
            prompts: token ids, as ``encode`` gives them; they need not be of the same length.
            generation: how to generate.

        Returns:
            A response for each prompt, in their order.
        """
        generation = generation or Generation()
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        if generation.temperature > 0 and generation.seed is not None:
            torch.manual_seed(generation.seed)
        output = self.model.generate(**batch, generation_config=self._generation_config(generation))
        responses = output if self.is_encoder_decoder else output[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Response(text.strip(), len(prompt), self._count(ids))
            for text, prompt, ids in zip(texts, prompts, responses.tolist(), strict=True)
        ]

    def _generation_config(self, generation: Generation):
        sampled = generation.temperature > 0
        values = self.model.generation_config.to_dict() | {
            "max_new_tokens": generation.max_response_tokens,
            "max_length": None,
            "min_length": 0,
            "do_sample": sampled,
            "num_beams": 1,
            # Unset rather than left as the checkpoint has them: greedy search warns about each.
            "temperature": generation.temperature if sampled else None,
            "top_p": generation.top_p if sampled else None,
            "top_k": 0 if sampled else None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        return type(self.model.generation_config)(**values)

    def _count(self, ids: list[int]) -> int:
        """The tokens of a response, its end token included and the padding after it not."""
        start = 1 if self.is_encoder_decoder else 0  # the decoder's start token is not generated
        for position, token in enumerate(ids[start:], start=1):
            if token in self.end_token_ids:
                return position
        return len(ids) - start

    def ask(
        self,
        prompts: Sequence[str],
        generation: Generation | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 32_768,
        on_batch: Callable[[Batch], object] = lambda batch: None,
    ) -> list[Response | Failure]:
        """Answers prompts of any length; one that cannot be answered does no harm to the others.

        Prompts of similar length share a batch, so that little is padded. A batch that fails, for want of
        memory for instance, is halved until the prompts that fail stand alone.

        Args:
            prompts: texts.
            generation: how to generate.
            max_batch_size: prompts in a batch.
            max_batch_tokens: tokens in a batch: prompts padded to the longest, and their longest responses.
            on_batch: told of each batch that was answered.

        Returns:
            A response, or the reason why there is none, for each prompt in order.
        """
        generation = generation or Generation()
        results: list[Response | Failure] = [Failure("not asked")] * len(prompts)
        encoded: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            try:
                ids = self.encode(prompt, generation)
                if len(ids) + generation.max_response_tokens > max_batch_tokens:
                    raise PromptError(
                        f"the prompt has {len(ids)} tokens, which with its response is over the "
                        f"{max_batch_tokens} that a batch may have (max_batch_tokens)"
                    )
                encoded[index] = ids
            except PromptError as error:
                results[index] = Failure(str(error))
            except Exception as error:  # a tokenizer's own errors: this prompt's, not its batch's
                results[index] = Failure(_describe(error))
        room = max_batch_tokens, generation.max_response_tokens
        for batch in batches_by_length({i: len(ids) for i, ids in encoded.items()}, max_batch_size, *room):
            with self._turn:
                for index, result in self._isolate(batch, encoded, generation, on_batch):
                    results[index] = result
        return results

    def _isolate(
        self,
        batch: list[int],
        encoded: dict[int, list[int]],
        generation: Generation,
        on_batch: Callable[[Batch], object],
    ) -> Iterator[tuple[int, Response | Failure]]:
        prompts = [encoded[index] for index in batch]
        started = time.monotonic()
        try:
            responses = self.generate(prompts, generation)
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
        yield from self._isolate(batch[:middle], encoded, generation, on_batch)
        yield from self._isolate(batch[middle:], encoded, generation, on_batch)


def batches_by_length(
    lengths: dict[int, int], max_batch_size: int, max_batch_tokens: int, response_tokens: int = 0
) -> Iterator[list[int]]:
    """Puts prompts of similar length into batches, longest first.

    Args:
        lengths: tokens of each prompt, by its index.
        max_batch_size: prompts in a batch.
        max_batch_tokens: a batch's size times the tokens of its longest prompt and response.
        response_tokens: what a response may add to each prompt.

    Yields:
        Indices; a prompt that is over the budget by itself stands alone.
    """
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else 0
        full = (
            len(batch) >= max_batch_size or (len(batch) + 1) * (longest + response_tokens) > max_batch_tokens
        )
        if batch and full:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _is_broken_device(error: Exception) -> bool:
    """Whether the accelerator has failed, rather than the prompt or for want of memory."""
    broken = getattr(torch, "AcceleratorError", ())
    return isinstance(error, broken) and not isinstance(error, torch.OutOfMemoryError)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
