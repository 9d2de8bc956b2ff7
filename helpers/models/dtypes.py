"""The floating-point dtypes that weights are stored and computed in, by name.

Needs no torch until a `torch.dtype` is asked for, so that command lines answer `--help` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of one number, by the dtype's name."""

DTYPES = tuple(DTYPE_BYTES)


def torch_dtype(name: str) -> torch.dtype:
    """The `torch.dtype` of a name in `DTYPES`."""
    import torch

    return getattr(torch, name)


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a `torch.dtype`: `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
