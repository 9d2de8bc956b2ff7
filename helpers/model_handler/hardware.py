"""What this machine computes on, and in: a GPU or the CPU, and the dtype that is fast there."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import torch

from helpers.load_state_dict.mapped_model import LoadError
from helpers.models.dtypes import DTYPES


def is_x86() -> bool:
    """Whether this machine's processor is an x86-64 one."""
    return platform.machine().lower() in ("x86_64", "amd64")


def describe_machine() -> str:
    """One line for a worker's log: what this machine has, and the versions that answer on it.

    A first job on real workers tells by it what no page does: whether N4 machines have AMX, how much memory
    Dataflow's own processes leave, and how much of the disk is taken.
    """
    import transformers

    has = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16", "sve")
    parts = [
        f"processor {has.get('cpu_name') or platform.processor() or platform.machine()}",
        f"with {' '.join(name for name in wanted if has.get(name)) or 'none of ' + ' '.join(wanted)}",
        f"{os.cpu_count()} vCPUs, {torch.get_num_threads()} torch threads",
    ]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE") / 1e9
        total, free = (os.sysconf(f"SC_{name}_PAGES") * page for name in ("PHYS", "AVPHYS"))
        parts.append(f"memory {total:.1f} GB, {free:.1f} free")
    disk = shutil.disk_usage(os.path.expanduser("~"))
    parts.append(f"disk {disk.total / 1e9:.0f} GB, {disk.free / 1e9:.0f} free")
    if torch.cuda.is_available():
        parts.append(f"GPU {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    return "; ".join([*parts, f"{versions}, transformers {transformers.__version__}"])


def choose_device(device: str | None = None) -> torch.device:
    """The device asked for, or a GPU if there is one, or else the CPU.

    Raises:
        LoadError: the requested device is not available.
    """
    if device in (None, "", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(str(device).lower())
    except RuntimeError as error:
        raise LoadError(f"{device!r} is not a device: use 'cpu', 'cuda' or 'auto'.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            "A GPU was asked for, but there is none that torch can use. Check the machine type, the driver, "
            "and that torch is a CUDA build, or ask for device 'cpu'."
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"There are {torch.cuda.device_count()} GPUs here: {device!r} is not one of them.")
    return chosen


def choose_dtype(device: torch.device, dtype: str | None = None) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and the reason for it.

    bfloat16 where the hardware multiplies it natively, float32 elsewhere. Without such hardware bfloat16 is
    emulated, and float16 is a trap on a CPU: measured without AVX512-FP16, a 1024×1024 product took over 200
    times as long as in float32.

    Raises:
        LoadError: the dtype asked for is unknown, or float16 on a CPU that emulates it.
    """
    if device.type == "cuda":
        native = {"bfloat16": torch.cuda.is_bf16_supported(including_emulation=False), "float16": True}
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        native = {
            "bfloat16": any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")),
            "float16": any(has.get(name) for name in ("avx512_fp16", "amx_fp16")),
        }
    else:
        native = {"bfloat16": False, "float16": False}
    if dtype in (None, "", "auto"):
        if native["bfloat16"]:
            return torch.bfloat16, f"this {device.type} computes in bfloat16, at half the memory of float32"
        return torch.float32, f"this {device.type} has no native bfloat16"
    if dtype not in DTYPES:
        raise LoadError(f"dtype {dtype!r} is not supported: use auto, {', '.join(DTYPES)}.")
    if dtype == "float16" and device.type == "cpu" and not native["float16"]:
        raise LoadError(
            "float16 is only emulated by this CPU, at a fraction of float32's speed: use dtype 'auto'. The "
            "state dict may still be stored in float16."
        )
    return getattr(torch, dtype), "asked for"
