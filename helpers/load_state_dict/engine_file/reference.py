"""What transformers itself makes of a sample, in float32 and in little memory: an engine is checked against
it, for an engine's converter may pass over a setting that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from helpers.load_state_dict.engine_file.description import Reference
from helpers.models.architecture import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS, RESPONSE_TOKENS = 140, 12
"""Of the sample; T5 tells distances apart up to 128. Fewer where a model has not as many positions."""

PART_BYTES = 150_000_000
"""The most that is widened to float32 at once, unless one weight is larger."""


@torch.inference_mode()
def reference_of(model: PreTrainedModel, start: int, drop: Callable[[torch.Tensor], None]) -> Reference:
    """The log-probabilities of a sample's response.

    Args:
        model: in any dtype, on the CPU.
        start: the token that an encoder-decoder model's response begins after.
        drop: called with each weight that was used.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    # From all over the vocabulary, in no order that a position could stand for.
    room = (positions_of(model.config) or PROMPT_TOKENS + RESPONSE_TOKENS) - RESPONSE_TOKENS
    length = max(1, min(PROMPT_TOKENS, room))
    tokens = [(7919 * n + 13) % rows for n in range(length + RESPONSE_TOKENS)]
    prompt, response = tokens[:length], tokens[length:]
    with _in_float32(model, drop):
        if model.config.is_encoder_decoder:
            logits = model(
                input_ids=torch.tensor([prompt]),
                decoder_input_ids=torch.tensor([[start, *response[:-1]]]),
                use_cache=False,
            ).logits[0]
        else:
            logits = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
            logits = logits[-RESPONSE_TOKENS:]
    chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
    return Reference(prompt, response, chosen[:, 0].tolist())


@contextmanager
def _in_float32(model: PreTrainedModel, drop: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Lets a model compute in float32: each part of it is widened while it computes, and no longer."""
    hooks, narrow = [], {}

    def widen(module: torch.nn.Module, *_: object) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                narrow.setdefault(id(tensor), tensor.data)
                tensor.data = tensor.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) in narrow:
                tensor.data = narrow.pop(id(tensor))
                drop(tensor.data)

    try:
        for part in _parts(model):
            hooks.append(part.register_forward_pre_hook(widen))
            hooks.append(part.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts that are widened at once: as large as they may be."""
    numbers = sum(parameter.numel() for parameter in module.parameters())
    children = list(module.children())
    # A list of layers is never called itself. A block of layers looks at their dtypes, so these are widened
    # together.
    is_list = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
    if not is_list and (numbers * 4 <= PART_BYTES or not any(list(child.children()) for child in children)):
        yield module
        return
    for child in children:
        yield from _parts(child)
