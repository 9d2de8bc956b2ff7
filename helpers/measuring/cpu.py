"""The CPU that a figure was measured on: figures of one kind do not hold for another."""

from __future__ import annotations

import platform
from pathlib import Path


def kind_of_cpu() -> str:
    """The kind that figures are kept for, after what decides about engines and dtypes."""
    import torch

    from helpers.model_handler.hardware import is_x86

    if not is_x86():
        return "ARM"
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return "AMX"
    if has.get("avx512_bf16"):
        return "AVX512-BF16"
    return "AVX512" if has.get("avx512") or has.get("avx512_f") else "AVX2"


def vendor() -> str:
    """The maker's name as the processor gives it, such as GenuineIntel; empty where the system hides it."""
    return _first_of_cpuinfo("vendor_id")


def cpu_name() -> str:
    """As the system has it."""
    return _first_of_cpuinfo("model name") or platform.processor() or platform.machine()


def _first_of_cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""
