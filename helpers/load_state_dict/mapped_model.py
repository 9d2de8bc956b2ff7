"""From a state dict on this machine to a transformers model whose weights stay mapped from the file."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.models.architecture import Architecture, architecture_of, read_config, read_tokenizer
from helpers.models.error_text import some

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_loading = threading.Lock()


class LoadError(ValueError):
    """A model that cannot be loaded: a state dict that does not fit, a missing device or engine; the message
    says what to do."""


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
    as_stored: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer from a state dict on this machine and its companion folder.

    The file is mapped, not read: if it is in `dtype` and `device` is the CPU, then the weights stay
    file-backed pages, which all the processes of a machine share.

    Args:
        state_dict_file: a `.pt` file on a local disk.
        folder: the folder with config.json, generation_config.json and the tokenizer's files.
        device: where to compute; None means the CPU.
        dtype: the dtype to compute in; None means the file's own.
        as_stored: whether every weight stays mapped, those too that transformers would widen to float32 to
            compute in float16.

    Raises:
        LoadError: the keys or shapes of the state dict are not the model's, or the file is damaged.
        ModelError: the config is not that of a model that generates text.
    """
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
            model_class = _as_stored(architecture.model_class) if as_stored else architecture.model_class
            model, keys = model_class.from_pretrained(
                None, config=architecture.config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:
        raise LoadError(_misfit(state_dict_file, architecture, state_dict, str(error))) from error
    # Its report leaves out what transformers can fill by tying, such as a missing lm_head: compare names.
    if model.state_dict().keys() != state_dict.keys() or any(keys.values()):
        raise LoadError(_misfit(state_dict_file, architecture, state_dict))
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = read_generation_config(folder, architecture.config)
    return model.to(device or "cpu"), read_tokenizer(folder)


def _as_stored(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class, without its wish for some weights in float32."""
    return type(model_class.__name__, (model_class,), {"_get_dtype_plan": lambda self, dtype: {}})


def read_generation_config(folder: str | Path, config: PretrainedConfig) -> GenerationConfig:
    """The publisher's settings: a model that is built from its config alone does not know its start and end
    tokens.

    Args:
        folder: which may hold a generation_config.json.
        config: the model's, which tells where there is none.
    """
    from transformers import GenerationConfig

    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


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


def page_dropper(file: str | Path) -> Callable[[torch.Tensor], None]:
    """A function that gives back the memory of a tensor's pages, where it is mapped from this file.

    The pages are read from the file again when they are needed. Without it, a process that goes through a
    state dict comes to hold all of it, although nothing but the last tensors is in use. For any other tensor,
    and on other systems than Linux, it does nothing.

    Args:
        file: a mapped file, to which nobody writes through the mapping.
    """
    name = str(Path(file).resolve())
    try:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return lambda tensor: None
    places = [
        tuple(int(end, 16) for end in line[0].split("-"))
        for line in lines
        if len(line) == 6 and line[5] == name
    ]
    system, page = ctypes.CDLL(None), mmap.PAGESIZE

    def drop(tensor: torch.Tensor) -> None:
        start = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
        if start < end and any(first <= start and end <= last for first, last in places):
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    return drop


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
