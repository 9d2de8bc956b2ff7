"""Weights in the order in which oneDNN multiplies by them: in float32, 1.3 to 2.8 times as fast as weights in
the file's order, by model, processor and number of prompts. `docs/engines.md` has the figures.

A layer's weight is a matrix whose rows lie one after the other, and torch's product in float32 reads it as it
is. oneDNN multiplies by blocks. Here the weights are brought into that order once, when the model is loaded.
Every process then has its own copy of what it multiplies by, and two while a new state dict is taken up,
where weights that stay as they are in the file are shared by all processes of a machine. So this is speed for
memory, and must be asked for.

torch has no public function for it. These are the operations that `torch.compile` uses on CPUs when weights
are frozen, and what they compute is compared with the layer's own product for every shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler.hardware import is_x86

ENGINE = "torch_packed"

ROWS = 32
"""The number of rows that the order is chosen for. Measured with products of 1, 8, 32 and 128 rows: it is
faster than the layer's own for all."""

LEAST_SHARE = 0.5
"""Of the model's parameters, the least that must be packed: with fewer, this is not worth its name."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a product may be from the layer's own, as a share of its largest value."""


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str:
    """Why this machine cannot compute so; empty if it can."""
    if device.type != "cpu" or not is_x86():
        return f"{ENGINE} computes on x86 CPUs only: use engine torch, or device cpu where there is one."
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"{ENGINE} needs oneDNN, which this build of torch does not have: use engine torch."
    if dtype not in TOLERANCE:
        name = str(dtype).partition(".")[2]
        return f"{ENGINE} does not compute in {name}: use dtype float32, bfloat16 or auto."
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"{ENGINE} does not compute in bfloat16 on this CPU: use dtype float32."
    return ""


@torch.inference_mode()
def pack_weights(model: torch.nn.Module, drop_pages: Callable[[torch.Tensor], object]) -> None:
    """Packs the weights of all linear layers; layers of other kinds stay as they are.

    Args:
        model: on a CPU, for inference alone: it can be copied or pickled no more. Its parameters stay, and
            can be saved.
        drop_pages: called with each weight that has been packed; see `page_dropper`.

    Raises:
        LoadError: a product differs from the layer's own, or most of the model is in layers of other kinds.
    """
    packed, checked = 0, set()
    for layer in model.modules():
        # A subclass may compute something else.
        if type(layer) is not torch.nn.Linear or layer.weight.dtype not in TOLERANCE:
            continue
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        product = functools.partial(
            _product, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS), bias
        )
        kind = (weight.shape, weight.dtype, bias is None)
        if kind not in checked:
            _check(product, weight, bias)
            checked.add(kind)
        layer.forward = product
        drop_pages(weight)
        packed += weight.numel()
    every = sum(parameter.numel() for parameter in model.parameters())
    if packed < LEAST_SHARE * every:
        raise LoadError(
            f"{ENGINE} is of little use for this model, of whose parameters only {packed / every:.0%} are in "
            "linear layers: use engine torch."
        )


def _product(packed: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as Linear
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")


def _check(
    product: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, weight.shape[1], generator=generator).to(weight.dtype)
    expected = functional.linear(rows, weight, bias).float()
    difference = (product(rows).float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not difference <= TOLERANCE[weight.dtype]:
        raise LoadError(
            f"The product with packed weights of shape {tuple(weight.shape)} differs from torch's own by "
            f"{difference:.1g} of its largest value: use engine torch."
        )
