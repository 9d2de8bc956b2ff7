"""Which engine computes, and in what: what was asked for, or what was measured to be faster.

The rule of `auto`: a GPU that computes in bfloat16 uses CTranslate2 where its libraries are there, and a CPU
that does uses torch; an x86 CPU that does not, or is to compute in float32, uses CTranslate2. Models that
CTranslate2 does not take use torch. The tables that this rests on are in `docs/engines.md`, measured with
`make bench-engines` and, on an H100 and an H200, with `tools/bench_gpu.py`. Nothing was measured on CPUs with
AMX, on those with AVX512 and no bfloat16, on ARM or on other GPUs: there, the rule is only carried over.
`torch_packed` is never chosen unasked: where torch computes in bfloat16 it gains little and gives up that
processes share their weights, and in float32 CTranslate2 is faster for a lone prompt, and with AVX2 alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers.load_state_dict.engine_file import ENGINE_DTYPES
from helpers.load_state_dict.engine_file.description import engine_version
from helpers.load_state_dict.mapped_model import LoadError
from helpers.model_handler.engines.ctranslate2_engine import COMPUTE_TYPES, computes_in, why_not_on_gpu
from helpers.model_handler.engines.packed_weights import ENGINE as PACKED
from helpers.model_handler.engines.packed_weights import why_not_packed
from helpers.model_handler.hardware import choose_device, choose_dtype, is_x86
from helpers.models.dtypes import DTYPES, dtype_name


@dataclass(frozen=True)
class Choice:
    """What a model is computed by.

    Attributes:
        engine: `torch`, `torch_packed` or `ctranslate2`.
        device: where.
        dtype: in what; for torch, the name of a `torch.dtype`.
        reason: why, for the log.
        is_asked_for: whether no other engine will do.
    """

    engine: str
    device: torch.device
    dtype: str
    reason: str
    is_asked_for: bool = False

    def instead(self) -> Choice:
        """Torch in this one's place."""
        dtype, reason = choose_dtype(self.device, "float32" if self.dtype == "int8" else self.dtype)
        return Choice("torch", self.device, dtype_name(dtype), reason)


def choose(
    engine: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Choice:
    """The engine, device and dtype for this machine. Whether an engine takes the model is seen later.

    Args:
        engine, device, dtype: what was asked for; None or `auto` leaves it open.

    Raises:
        LoadError: what was asked for is not here, or does not go together.
    """
    engine, dtype = engine or "auto", dtype or "auto"
    if dtype == "int8" and engine in ("torch", PACKED):
        raise LoadError(f"{engine} does not compute in int8 here: use engine ctranslate2, or another dtype.")
    place = choose_device(device)
    why_open = _why_not_ctranslate2(place)
    if engine == "ctranslate2" or dtype == "int8":
        if why_open:
            raise LoadError(f"{'int8' if dtype == 'int8' else 'ctranslate2'} was asked for, but {why_open}")
        if dtype not in ("auto", *ENGINE_DTYPES):
            raise LoadError(f"ctranslate2 does not compute in {dtype} here: use {', '.join(ENGINE_DTYPES)}.")
        if dtype == "auto":
            on_gpu = place.type == "cuda" and computes_in("bfloat16", "cuda")
            return Choice("ctranslate2", place, "bfloat16" if on_gpu else "float32", "asked for", True)
        if not computes_in(dtype, place.type):  # before its file is made
            others = [name for name in COMPUTE_TYPES[place.type] if computes_in(name, place.type)]
            raise LoadError(
                f"ctranslate2 does not compute in {dtype} on this {place.type}: use {' or '.join(others)}"
                f"{', or device cpu' if place.type == 'cuda' else ''}."
            )
        return Choice("ctranslate2", place, dtype, "asked for", True)
    if dtype not in ("auto", *DTYPES):
        raise LoadError(f"dtype {dtype!r} is not supported: use auto, {', '.join(DTYPES)}, int8.")
    chosen, reason = choose_dtype(place, dtype)
    name = dtype_name(chosen)
    if engine == PACKED:
        if why_not := why_not_packed(place, chosen):
            raise LoadError(why_not)
        return Choice(PACKED, place, name, "asked for", True)
    if engine == "auto" and _is_faster_with_ctranslate2(place, name):
        if not why_open:
            return Choice("ctranslate2", place, name, f"{reason}, and ctranslate2 is faster in {name} there")
        reason = f"{reason}; {why_open}"
    return Choice("torch", place, name, reason)


def _is_faster_with_ctranslate2(device: torch.device, dtype: str) -> bool:
    return dtype == "bfloat16" if device.type == "cuda" else dtype == "float32" and is_x86()


def _why_not_ctranslate2(device: torch.device) -> str:
    if engine_version() is None:
        return "ctranslate2 is not installed: `pip install ctranslate2`, or use engine torch."
    if device.type not in COMPUTE_TYPES:
        return f"ctranslate2 computes on CPUs and NVIDIA GPUs, not on {device}: use engine torch."
    return why_not_on_gpu() if device.type == "cuda" else ""
