"""What goes into a state dict's companion folder beside the manifest: configs and the tokenizer's files."""

import shutil
from pathlib import Path

# What tokenizers and configs are stored as: https://huggingface.co/docs/transformers/main_classes/tokenizer
SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
GENERATION_CONFIG = "generation_config.json"


def write_companion_files(checkpoint_folder: str | Path, target: str | Path) -> list[str]:
    """Copies what a worker needs beside the weights, and makes a generation config where there is none.

    Args:
        checkpoint_folder: an ordinary checkpoint.
        target: the folder to write to; it is created, and may be the checkpoint's own.

    Returns:
        The files' names, relative to `target`.
    """
    folder, target = Path(checkpoint_folder), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]):
        is_index = file.name.endswith(".index.json") or file.name == "manifest.json"
        if file.is_file() and file.suffix in SUFFIXES and not is_index:
            names.append(str(file.relative_to(folder)))
            copy = target / names[-1]
            copy.parent.mkdir(exist_ok=True)
            if not (copy.exists() and copy.samefile(file)):
                shutil.copyfile(file, copy)
    if GENERATION_CONFIG not in names:
        _generation_config(folder).save_pretrained(target)
        names.append(GENERATION_CONFIG)
    return names


def has_tokenizer(names: list[str]) -> bool:
    """Whether the files named include a tokenizer's."""
    return any(
        Path(name).stem in ("tokenizer", "tokenizer_config", "vocab", "spiece") or name.endswith(".model")
        for name in names
    )


def _generation_config(folder: Path) -> "GenerationConfig":  # noqa: F821 - imported where it is used
    from transformers import AutoConfig, GenerationConfig

    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
