"""A checkpoint of a model's real shape with random weights: for measuring, where the values do not matter."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.models.architecture import architecture_of, head_is_separate
from helpers.sizing.model_memory import parameter_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A prime, so that no two tensors of a model start at the same place in the block and come out equal.
_BLOCK = 4_194_301
_SPARE_DISK = 2**28


def write_random_checkpoint(config: PretrainedConfig, folder: str | Path) -> Path:
    """Writes an ordinary float32 checkpoint: one safetensors file, config, generation config, and a
    tokenizer.

    It needs constant memory and runs at the disk's speed: one block of random numbers fills the whole file.

    Args:
        config: the config of a causal or encoder-decoder language model.
        folder: where to write it; created if need be.

    Raises:
        ModelError: not a model that generates text.
        OSError: the disk has no room: 4 bytes a parameter are needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = parameter_count(config).checkpoint * 4
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE_DISK:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free and {size / 1e9:.1f} GB are needed: free some.")

    values = config.to_dict()
    # transformers 5 keeps this flag of a T5 under another name, and would read its own config back wrongly.
    if config.is_encoder_decoder and hasattr(config, "scale_decoder_outputs"):
        values["tie_word_embeddings"] = config.scale_decoder_outputs
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    _write_companions(config, folder)
    _write_weights(_shapes(config), folder / "model.safetensors")
    return folder


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    model = architecture_of(config).empty_model()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if "lm_head.weight" not in shapes and head_is_separate(config):
        shapes["lm_head.weight"] = torch.Size((config.vocab_size, config.d_model))
    return shapes


def _write_weights(shapes: dict[str, torch.Size], path: Path) -> None:
    """The safetensors format: the header's length, the header as JSON, the tensors end to end."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview((torch.randn(_BLOCK) * 0.02).numpy()).cast("B")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for written in range(0, end, len(block)):
            file.write(block[: end - written])


def _write_companions(config: PretrainedConfig, folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
