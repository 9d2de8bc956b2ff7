"""The published sample's way to convert and to load a model, for comparison with this project's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from helpers.models.architecture import architecture_of, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def convert(checkpoint: str | Path, state_dict_path: str | Path) -> None:
    """Loads the model in float32, makes it half, and saves its state dict: as the sample's text has it."""
    architecture = architecture_of(read_config(checkpoint))
    model = architecture.model_class.from_pretrained(checkpoint, dtype=torch.float32)
    torch.save(model.half().state_dict(), state_dict_path)


def convert_in_dtype(checkpoint: str | Path, state_dict_path: str | Path, dtype: str) -> None:
    """Loads the model in the dtype wanted, and saves its state dict: the usual way today."""
    architecture = architecture_of(read_config(checkpoint))
    model = architecture.model_class.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    torch.save(model.state_dict(), state_dict_path)


def handler(state_dict_path: str | Path, config_folder: str | Path) -> Any:
    """Beam's own handler for PyTorch, configured as the sample does it.

    Its `load_model` gives a `PreTrainedModel` in float32.
    """
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    return PytorchModelHandlerTensor(
        state_dict_path=str(state_dict_path),
        model_class=_from_config,
        model_params={"folder": str(config_folder)},
        device="cpu",
    )


def _from_config(folder: str) -> PreTrainedModel:
    architecture = architecture_of(read_config(folder))
    return architecture.model_class(architecture.config)
