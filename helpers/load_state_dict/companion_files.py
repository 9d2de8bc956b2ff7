"""What goes into a state dict's companion folder besides the manifest: configs and the tokenizer's files."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.models.architecture import read_config
from helpers.models.checkpoint_files import companion_files

if TYPE_CHECKING:
    from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def write_companion_files(checkpoint_folder: str | Path, target: str | Path) -> list[str]:
    """Copies what a worker needs besides the weights, and makes a generation config where there is none.

    Args:
        checkpoint_folder: an ordinary checkpoint.
        target: the folder to write to; it is created, and may be the checkpoint's own.

    Returns:
        The files' names, relative to `target`.
    """
    folder, target = Path(checkpoint_folder), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    names = companion_files(folder)
    for name in names:
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        if not (copy.exists() and copy.samefile(folder / name)):
            shutil.copyfile(folder / name, copy)
    if GENERATION_CONFIG not in names:
        _generation_config(folder).save_pretrained(target)
        names.append(GENERATION_CONFIG)
    return names


def has_tokenizer(names: list[str]) -> bool:
    """Whether these files include a tokenizer's."""
    return any(
        Path(name).stem in ("tokenizer", "tokenizer_config", "vocab", "spiece") or name.endswith(".model")
        for name in names
    )


def _generation_config(folder: Path) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(read_config(folder))
