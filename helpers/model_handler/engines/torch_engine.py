"""The engine that computes every model there is: transformers on torch, on the CPU or a GPU.

On a CPU its weights stay mapped from the state dict, so that the processes of a machine share them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from helpers.model_handler.engines import generation_settings
from helpers.model_handler.engines.deadline import Deadline
from helpers.model_handler.engines.engine import STOP, Generated, as_set, generated
from helpers.model_handler.engines.neighbours import (
    HALF_PRECISION_TOLERANCE,
    TOLERANCE,
    Company,
    Memory,
    Mixing,
    establish,
    mixing,
)
from helpers.model_handler.engines.single_row import is_worthwhile, speed_up_single_rows
from helpers.model_handler.options import AnsweringOptions
from helpers.models.architecture import response_positions_of
from helpers.models.dtypes import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


class TorchEngine:
    """Generates with a transformers model; see `Engine`.

    Args:
        model: on its device. Of its generation config, only the settings that hold here are left.
        tokenizer: the model's, for settings that are texts.
        name: `torch`, or `torch_packed` if the model's weights are packed.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "torch"
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.config = model.config
        self.dtype = dtype_name(model.dtype)
        self.device = str(model.device)
        self._tokenizer = tokenizer
        self.rows = model.get_input_embeddings().weight.shape[0]
        self.generation_config = model.generation_config = generation_settings.held(model.generation_config)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._pad_token_id = self._choose_pad_token()
        self._mixing = mixing(self.config, self.generation_config)
        self._memory = Memory(model)
        self._prefix = _Prefix(model)
        if name == "torch" and is_worthwhile(model.device, model.dtype):
            speed_up_single_rows(model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        options: AnsweringOptions,
        prefix_tokens: int = 0,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> list[Generated]:
        """See `Engine.generate`."""
        deadline = Deadline(options.max_response_seconds)
        self._memory.forget()
        if not all(self._mixing.allows(len(one), options.max_response_tokens) for one in prompts):
            prefix_tokens = 0  # a longer prompt may need another state after the same tokens
        kept = self._prefix.state(prompts, prefix_tokens) if prefix_tokens else None
        batch = self._padded(prompts, prefix_tokens if kept is not None else 0)
        if options.is_sampled and options.seed is not None:
            torch.manual_seed(options.seed)
        settings = generation_settings.for_answering(self.generation_config, options, self._pad_token_id)
        # A decoder with learned positions has no more tokens to give than positions.
        most = response_positions_of(self.config)
        settings.max_new_tokens = min(options.max_response_tokens, most - 1 if most else math.inf)
        # Text to stop at can only be found with the tokenizer.
        more: dict[str, Any] = {"tokenizer": self._tokenizer} if settings.stop_strings else {}
        if kept is not None:
            more["past_key_values"] = kept
        more["stopping_criteria"] = [
            lambda ids, scores, **_: torch.full(
                (len(ids),), deadline.passes() or is_abandoned(), device=ids.device
            )
        ]
        output = self.model.generate(**batch, generation_config=settings, **more)
        # Of an encoder-decoder model the first token is the decoder's start, which is not generated.
        start = 1 if self._is_encoder_decoder else batch["input_ids"].shape[1]
        # Without what follows the end: padding need not be a token that decoding leaves out.
        ends = as_set(self.generation_config.eos_token_id)
        forced = as_set(self.generation_config.forced_eos_token_id)
        responses = [_until_end(ids, ends) for ids in output[:, start:].tolist()]
        return [
            self._ended_by_text(prompt, ids)
            or generated(ids, ends, settings.max_new_tokens, deadline.has_passed, forced)
            for prompt, ids in zip(prompts, responses, strict=True)
        ]

    def _ended_by_text(self, prompt: list[int], ids: list[int]) -> Generated | None:
        """A response that one of the publisher's texts has ended, without the padding after it. Such a text
        may have begun in the prompt, if the response continues it."""
        texts = self.generation_config.stop_strings
        if not texts or (ids and ids[-1] in as_set(self.generation_config.eos_token_id)):
            return None
        texts = [texts] if isinstance(texts, str) else texts
        end = len(ids)
        while end > 1 and ids[end - 1] == self._pad_token_id:
            end -= 1
        said, before = self._tokenizer.decode(ids[:end]), ""
        if not self._is_encoder_decoder:
            before = self._tokenizer.decode(prompt[-max(map(len, texts)) :])
        is_ended = any(text in before[max(0, len(before) - len(text) + 1) :] + said for text in texts)
        return Generated(ids[:end], STOP) if is_ended else None

    def company(self, samples: Sequence[list[int]]) -> Company:
        """See `Engine.company`; the model is asked."""
        return establish(self._next_logits, samples, self.model.dtype)

    def mixing(self) -> Mixing:
        """See `Engine.mixing`."""
        return self._mixing

    def why_not(self, options: AnsweringOptions) -> str:
        """See `Engine.why_not`: every option is understood."""
        return ""

    def _choose_pad_token(self) -> int:
        """A token to pad with: the tokenizer's own, or any that the model has a row for, since it is masked.

        Some tokenizers have none, and some name one that is not in the model's vocabulary.
        """
        ends = as_set(self.generation_config.eos_token_id)
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, *sorted(ends), 0):
            if token is not None and 0 <= token < self.rows:
                return token
        return 0

    def _padded(self, prompts: Sequence[list[int]], prefix_tokens: int = 0) -> dict[str, torch.Tensor]:
        """A batch of encoded prompts, padded to the longest, with the mask that says what is padding.

        Each is padded with its own first token: settings that look at which tokens a row has, such as a
        repetition penalty, find none that the prompt has not.
        """
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt[0] for prompt in prompts])[:, None].repeat(1, longest)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            # A causal model continues after the last position, which must hold the prompt's last token. An
            # encoder reads the whole, and counts its positions from the start. What all have in common
            # stands at the start of each.
            cut = 0 if self._is_encoder_decoder else prefix_tokens
            end = len(prompt) if self._is_encoder_decoder else longest
            for part, place in (
                (prompt[:cut], slice(0, cut)),
                (prompt[cut:], slice(end - len(prompt) + cut, end)),
            ):
                tokens[row, place] = torch.tensor(part, dtype=torch.long)
                mask[row, place] = 1
        device = self.model.device
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}

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


class _Prefix:
    """A model's state after what all prompts begin with, computed once.

    Only for models that keep keys and values of every token, and that look at them by position: what is kept
    is then the same whatever follows. Whether a model is one is found out when there is a prefix first.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tokens: tuple[int, ...] = ()
        self._state: Any = None
        # What is kept stands before the padding of shorter prompts, so positions must be said, not counted.
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._can_be_kept = (
            not model.config.is_encoder_decoder
            and takes_positions
            and model.generation_config.use_cache is not False
        )

    def state(self, prompts: Sequence[list[int]], count: int) -> Any:
        """The state after the first tokens of the prompts, once for each; None where it cannot be kept."""
        if not self._can_be_kept:
            return None
        tokens = tuple(prompts[0][:count])
        if tokens != self._tokens:
            self._keep(tokens, prompts[0][count:])
        if self._state is None:
            return None
        state = copy.deepcopy(self._state)
        state.batch_repeat_interleave(len(prompts))
        return state

    def _keep(self, tokens: tuple[int, ...], rest: list[int]) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self._tokens, self._state = tokens, None
        device = self._model.device
        try:
            state = DynamicCache(config=self._model.config)
            output = self._model(
                input_ids=torch.tensor([tokens], device=device), past_key_values=state, use_cache=True
            )
            state = output.past_key_values
            plain = isinstance(state, DynamicCache) and all(type(one) is DynamicLayer for one in state.layers)
            if plain and state.get_seq_length() == len(tokens) and self._continues(state, tokens, rest):
                self._state = state
        except Exception as error:  # whatever it is, computing it each time may still work
            log.info("What prompts begin with is computed each time: %s", error)
        if self._state is None:
            self._can_be_kept = False

    def _continues(self, state: Any, tokens: tuple[int, ...], rest: list[int]) -> bool:
        """Whether the model goes on from the state as it does from the tokens themselves."""
        device = self._model.device
        whole = torch.tensor([[*tokens, *rest]], device=device)
        kept = self._model(input_ids=whole[:, len(tokens) :], past_key_values=copy.deepcopy(state))
        fresh = self._model(input_ids=whole, use_cache=False)
        kept, fresh = kept.logits[0, -1].float(), fresh.logits[0, -1].float()
        difference = (kept - fresh).abs().mean() / fresh.std()
        return bool(difference <= TOLERANCE.get(self._model.dtype, HALF_PRECISION_TOLERANCE))


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens of a response, its end token included and the padding after it not."""
    for position, token in enumerate(ids, start=1):
        if token in ends:
            return ids[:position]
    return ids
