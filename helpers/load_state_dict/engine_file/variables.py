"""Weights on their way into CTranslate2's file, one at a time: what is written next is made when it is.

CTranslate2's own converter joins, widens and quantizes all weights first and writes them then, which takes
several times the memory of the model. Here every weight stays in the mapped state dict until its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ctranslate2.specs import common_spec, model_spec
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

BLOCK_NUMBERS = 2**22
"""How many numbers are quantized at once."""


class _Joined(torch.Tensor):
    """Tensors one below the other, put together only when somebody computes with them."""

    @staticmethod
    def __new__(cls, parts: list[torch.Tensor]) -> _Joined:
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype)

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(one: Any) -> Any:
            return torch.cat(one.parts) if isinstance(one, cls) else one

        return function(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


class JoiningLater(TorchFunctionMode):
    """Within it, joining matrices that have their numbers in memory or a file only notes which."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.cat and len(args) == 1 and not kwargs:
            parts = [part.detach() for part in args[0]]
            if all(part.dim() == 2 and part.dtype == parts[0].dtype for part in parts):
                return _Joined(parts)
        return function(*args, **(kwargs or {}))


class _Later(model_spec.Variable):
    """A weight that is made when it is written.

    Args:
        tensors: what it is made of, one below the other.
        dtype: in which it is written, as CTranslate2 names it.
        drop: called with each tensor that was written.
        quantization: for a weight of 8-bit integers, CTranslate2's name for how it is made.
        scale: whether this is a quantized weight's scale, one number for each row, rather than the weight.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        dtype: str,
        drop: Callable[[torch.Tensor], None],
        quantization: str = "",
        scale: bool = False,
    ) -> None:
        self._tensors, self._dtype, self._drop = tensors, dtype, drop
        self._quantization, self._scale = quantization, scale

    @property
    def shape(self) -> list[int]:
        rows = sum(len(tensor) for tensor in self._tensors)
        return [rows] if self._scale else [rows, *self._tensors[0].shape[1:]]

    @property
    def dtype(self) -> str:
        return self._dtype

    def num_bytes(self) -> int:
        size = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}[self._dtype]
        return size * int(np.prod(self.shape))

    def to_bytes(self) -> memoryview:
        whole = torch.empty(self.shape, dtype=getattr(torch, self._dtype))
        done = 0
        for tensor in self._tensors:
            for block in _blocks(tensor):
                whole[done : done + len(block)] = self._quantized(block) if self._quantization else block
                done += len(block)
            self._drop(tensor)
        return memoryview(whole.view(torch.uint8).reshape(-1).numpy())

    def _quantized(self, block: torch.Tensor) -> torch.Tensor:
        """CTranslate2's own quantization, which looks at each row for itself."""
        layer = common_spec.LinearSpec()
        layer.weight = block.contiguous()
        layer.validate()
        layer.optimize(self._quantization)
        return torch.from_numpy((layer.weight_scale if self._scale else layer.weight).numpy())

    def numpy(self) -> np.ndarray:
        raise NotImplementedError  # only what writes a file uses these

    def _to(self, dtype: str) -> model_spec.Variable:
        raise NotImplementedError

    def _equal(self, other: model_spec.Variable) -> bool:
        raise NotImplementedError


def write_later(spec: model_spec.ModelSpec, dtype: str, drop: Callable[[torch.Tensor], None]) -> None:
    """Makes a specification's weights such that saving it makes them one after the other.

    Args:
        spec: whose weights are those of a model; changed in place.
        dtype: what the engine will compute in: float32, bfloat16 or int8.
        drop: called with each tensor that was written.
    """
    spec.validate()
    others = "float32" if dtype == "int8" else dtype
    nodes: dict[str, tuple[Any, str]] = {}

    def note(node: Any, name: str, value: Any) -> None:
        nodes[name] = node, name.rpartition("/")[2]

    model_spec.visit_spec(spec, note)
    first: dict[tuple, str] = {}  # where each tensor comes first
    for name, variable in spec.variables(ordered=True):
        tensors = _tensors_of(variable)
        if not tensors:
            continue
        node, attribute = nodes[name]
        key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        if key in first:
            setattr(node, attribute, first[key])  # its scale goes along
            continue
        first[key] = name
        if dtype == "int8" and hasattr(node, f"{attribute}_scale") and tensors[0].dim() == 2:
            setattr(node, attribute, _Later(tensors, "int8", drop, "int8_float32"))
            setattr(node, f"{attribute}_scale", _Later(tensors, "float32", drop, "int8_float32", True))
        else:
            setattr(node, attribute, _Later(tensors, others, drop))


def _tensors_of(variable: Any) -> list[torch.Tensor]:
    """What a variable of floating-point numbers is made of; nothing for single numbers and integers."""
    tensor = getattr(variable, "tensor", None)
    if isinstance(tensor, _Joined):
        return tensor.parts
    if isinstance(variable, model_spec.NumpyVariable) and variable.array.ndim:
        tensor = torch.from_numpy(variable.array)
    return [tensor] if tensor is not None and tensor.dim() and tensor.is_floating_point() else []


def _blocks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.split(max(1, BLOCK_NUMBERS // max(1, tensor[0].numel())))
