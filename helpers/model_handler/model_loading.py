"""From a state dict on this machine to a model in memory: device, dtype, and weights that stay mapped."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.model_handler.single_row import is_worthwhile, speed_up_single_rows
from helpers.models.architecture import Architecture, architecture_of, read_config, read_tokenizer
from helpers.models.dtypes import DTYPES
from helpers.models.error_text import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_loading = threading.Lock()


class LoadError(ValueError):
    """A state dict that does not fit its model, or a missing device; the message says what to do."""


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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One load at a time, and no garbage collection meanwhile.

    While it loads, transformers 5 patches its own classes and torch's, and then puts back what it found. Of
    two loads at once, the later would put back the other's patch: no model of the process would tie its
    weights any more.

    Nothing that loading makes is garbage, and its many small objects set off a search of all there is. With
    torch, transformers and Beam imported that takes 0.3 s, as long as the loading itself.
    """
    with _loading:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


@_undisturbed()
def load_model(
    state_dict_file: str | Path,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer from a state dict on this machine and its companion folder.

    The file is mapped, not read: if it is in `dtype` and `device` is the CPU, then the weights stay
    file-backed pages, which all the processes of a machine share.

    Args:
        state_dict_file: a `.pt` file on a local disk.
        folder: the folder with config.json, generation_config.json and the tokenizer's files.
        device: where to compute; None means the CPU.
        dtype: the dtype to compute in; None means the file's own.

    Raises:
        LoadError: the keys or shapes of the state dict are not the model's, or the file is damaged.
        ModelError: the config is not that of a model that generates text.
    """
    from transformers import GenerationConfig

    if not (Path(folder) / "config.json").is_file():
        raise LoadError(
            f"There is no config.json in {folder}, the folder that belongs beside a state dict: make both "
            "with `python -m helpers.load_state_dict`."
        )
    architecture = architecture_of(read_config(folder))
    state_dict = read_state_dict(state_dict_file)
    if dtype is None:
        dtype = next(t.dtype for t in state_dict.values() if t.is_floating_point())
    # The concrete class's from_pretrained, given the tensors: it keeps them mapped, and it does not tie a
    # T5's lm_head to its embeddings where the state dict has two different tensors. Building the model
    # from its config and calling load_state_dict, as is usual, does tie them under transformers 5, writes
    # both tensors into one, and reports success.
    try:
        with _quietly():
            model, keys = architecture.model_class.from_pretrained(
                None, config=architecture.config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:
        raise LoadError(_misfit(state_dict_file, architecture, state_dict, str(error))) from error
    # Its report leaves out what transformers can fill by tying, such as a missing lm_head: compare names.
    if model.state_dict().keys() != state_dict.keys() or any(keys.values()):
        raise LoadError(_misfit(state_dict_file, architecture, state_dict))
    if (Path(folder) / "generation_config.json").is_file():
        # Start and end tokens: a model that is built from its config alone does not know them.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model = model.to(device or "cpu")
    if is_worthwhile(model.device, model.dtype):
        speed_up_single_rows(model)
    return model, read_tokenizer(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hides a bar that is over at once, and a warning that a flan-t5's head is untied, as it must be."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def read_state_dict(file: str | Path) -> dict[str, torch.Tensor]:
    """Maps a state dict from a local file, without running any code that it may hold.

    Raises:
        LoadError: the file is absent, damaged, or holds something else.
    """
    if not Path(file).is_file():
        raise LoadError(f"There is no state dict {file}: make one with `python -m helpers.load_state_dict`.")
    try:
        state_dict = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise LoadError(
            f"{file} is not a state dict that torch can read, or is damaged: make it again with "
            f"`python -m helpers.load_state_dict`. ({type(error).__name__})"
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise LoadError(f"{file} does not hold a state dict: expected names and tensors, nothing else.")
    return state_dict


def _misfit(
    file: str | Path, architecture: Architecture, state_dict: dict[str, torch.Tensor], otherwise: str = ""
) -> str:
    """Which keys of a state dict are not the model's, and which of the model's are missing."""
    expected = architecture.empty_model().state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    surplus = sorted(state_dict.keys() - expected.keys())
    shapes = [
        f"{name} ({list(tensor.shape)}, the model's is {list(expected[name].shape)})"
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    parts = [
        f"{what}: {some(names, 8)}"
        for what, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if names
    ]
    return (
        f"{file} does not fit {architecture.model_class.__name__}. Keys {'; '.join(parts) or otherwise}. "
        "Give the state dict that was made from this model."
    )
