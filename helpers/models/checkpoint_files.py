"""The files of a checkpoint folder: which of them hold weights, and which a worker needs beside the
weights."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

WEIGHTS = SAFETENSORS + PICKLES
"""One of these stands in every checkpoint folder. In the order of preference: safetensors are checked more
strictly, and hold nothing but tensors."""

ADAPTER = "adapter_config.json"
"""The config of an adapter (LoRA and the like), which changes the weights of a model."""

MERGE = (
    "merge it into its model first, with the peft package: PeftModel.from_pretrained(model, ADAPTER_FOLDER)"
    ".merge_and_unload().save_pretrained(NEW_FOLDER), and give NEW_FOLDER"
)

# What configs, tokenizers and chat templates are stored as.
_COMPANIONS = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"),
    *("*.spm", "*.codes", "*.tokenizer"),  # Marian, PhoBERT and BERTweet, ProphetNet
)
_FOLDERS = ("additional_chat_templates",)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or is the index of files that do."""
    return Path(name).suffix in (".safetensors", ".bin") or name.endswith(".index.json")


def is_companion(name: str) -> bool:
    """Whether a worker may need a file of this name, relative to its checkpoint's folder, beside the
    weights."""
    folder, _, base = name.rpartition("/")
    if is_weights(base) or (folder and folder not in _FOLDERS):
        return False
    return base != "manifest.json" and any(fnmatch(base, pattern) for pattern in _COMPANIONS)


def companion_files(folder: str | Path) -> list[str]:
    """The names, relative to a checkpoint's folder, of the files that a worker needs beside the weights."""
    return [name for name in _names(Path(folder)) if is_companion(name)]


def checkpoint_files(folder: str | Path) -> list[str]:
    """The names, relative to its folder, of all the files that make up a checkpoint."""
    return [name for name in _names(Path(folder)) if is_companion(name) or is_weights(name)]


def files_to_download(names: Iterable[str]) -> list[str]:
    """Of the files of a hub's repository, those to fetch: one form of the weights, and what goes with
    them."""
    names = list(names)
    suffix = ".safetensors" if any(name in names for name in SAFETENSORS) else ".bin"
    weights = [
        name
        for name in names
        if "/" not in name
        and is_weights(name)
        and name.removesuffix(".index.json").endswith(suffix)
        # Not consolidated.safetensors, adapter_model.safetensors or training_args.bin.
        and name.startswith("model" if suffix == ".safetensors" else "pytorch_model")
    ]
    return weights + [name for name in names if is_companion(name)]


def _names(folder: Path) -> list[str]:
    files = [*folder.iterdir(), *(file for part in _FOLDERS for file in folder.glob(f"{part}/*"))]
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
