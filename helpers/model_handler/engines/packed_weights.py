"""Weights in the order in which oneDNN multiplies by them: more than twice as fast for several prompts.

A layer's weight is a matrix whose rows lie one after the other. oneDNN multiplies by blocks, and without
further notice it brings each weight into that order again at each step. Here this is done once, when the
model is loaded. Every process then has its own copy of what it multiplies by, where weights that stay as they
are in the file are shared by all processes of a machine: speed for memory, which is why it must be asked for.

torch has no public function for it. These are the operations that `torch.compile` uses on CPUs when weights
are frozen, and what they compute is compared with the layer's own product for every shape.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch
from torch.nn import functional

from helpers.load_state_dict.mapped_model import LoadError

ENGINE = "torch_packed"

ROWS = 32
"""The number of rows that the order is chosen for. Measured with 1, 4, 32 and 128: it is faster for all."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a product may be from the layer's own, as a share of its largest value."""


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str:
    """Why this machine cannot compute so; empty if it can."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"{ENGINE} computes on x86 CPUs only: use engine torch."
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"{ENGINE} needs oneDNN, which this build of torch does not have: use engine torch."
    if dtype not in TOLERANCE:
        return f"{ENGINE} computes in float32 and bfloat16, not in {str(dtype).partition('.')[2]}."
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"{ENGINE} does not compute in bfloat16 on this CPU: use dtype float32."
    return ""


@torch.inference_mode()
def pack_weights(model: torch.nn.Module, drop_pages: Callable[[torch.Tensor], object]) -> int:
    """Packs the weights of all linear layers; layers of other kinds stay as they are.

    Args:
        model: on a CPU, for inference alone. Its parameters stay: they are what it is saved from.
        drop_pages: called with each weight that has been packed; see `page_dropper`.

    Returns:
        How many were packed.

    Raises:
        LoadError: a product differs from the layer's own.
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
        packed += 1
    return packed


def _product(packed: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


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
