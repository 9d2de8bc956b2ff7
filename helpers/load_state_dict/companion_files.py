"""What goes into a state dict's companion folder besides the manifest: configs and the tokenizer's files."""

import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.load_state_dict.checkpoint import CheckpointError
from helpers.models.architecture import read_tokenizer
from helpers.models.checkpoint_files import companion_files
from helpers.models.error_text import first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def files_to_copy(checkpoint_folder: str | Path) -> list[str]:
    """The names, relative to a checkpoint's folder, of what a worker needs besides the weights: by their
    endings, and by the names that the class of its tokenizer reads.

    Raises:
        CheckpointError: one of them is a link that leads out of the folder.
    """
    folder = Path(checkpoint_folder)
    names = sorted({*companion_files(folder), *_tokenizer_files(folder)})
    for name in names:
        _check_place(folder, name)
    return names


def _check_place(folder: Path, name: str) -> None:
    """Refuses a link that leads out of the checkpoint: what it leads to would be copied, and uploaded."""
    root, file = folder.resolve(), (folder / name).resolve()
    # The hub's cache has links from snapshots/REVISION/NAME to blobs/HASH.
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(file.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{folder / name} is a link to {file}, outside of the checkpoint: put a copy of the file there"
        )


def write_companion_files(
    checkpoint_folder: str | Path, names: Sequence[str], target: str | Path
) -> list[str]:
    """Copies what a worker needs besides the weights, and makes a generation config where there is none.

    Args:
        checkpoint_folder: an ordinary checkpoint.
        names: what `files_to_copy` says of it.
        target: the folder to write to; it is created.

    Returns:
        The files' names, relative to `target`.
    """
    folder, target = Path(checkpoint_folder), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, copy)
    if GENERATION_CONFIG not in names:
        _generation_config(folder).save_pretrained(target)
        return [*names, GENERATION_CONFIG]
    return list(names)


def _tokenizer_files(folder: Path) -> set[str]:
    """The files of a checkpoint's tokenizer, by the names that its class reads; none where it has no
    tokenizer."""
    try:
        tokenizer = read_tokenizer(folder)
    except Exception:  # whatever is missing or wrong, the copy is loaded too, and tells
        return set()
    return {name for name in tokenizer.vocab_files_names.values() if (folder / name).is_file()}


def check_tokenizer(checkpoint_folder: str | Path, names: Sequence[str]) -> bool:
    """Loads the tokenizer from a copy of what a worker will have of it.

    Args:
        checkpoint_folder: an ordinary checkpoint.
        names: what `files_to_copy` says of it.

    Returns:
        Whether there is a tokenizer.

    Raises:
        CheckpointError: there is one that cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as copy:
        write_companion_files(checkpoint_folder, names, copy)
        try:
            tokenizer = read_tokenizer(copy)
        except Exception as error:  # tokenizers' own libraries raise every kind
            if not any(_is_tokenizers(name) for name in names):
                return False
            raise CheckpointError(
                f"The tokenizer of {checkpoint_folder} cannot be loaded "
                f"({first_line(error)}): download its files again, or install what it needs"
            ) from error
    # Without their files, transformers makes empty tokenizers of some kinds, and says nothing. Others need no
    # file: ByT5's tokens are bytes.
    return any(_is_tokenizers(name) for name in names) or not tokenizer.vocab_files_names


def _is_tokenizers(name: str) -> bool:
    """Whether a file of this name is a tokenizer's: what goes along by its ending may be anything."""
    return any(fnmatch(name, pattern) for pattern in _TOKENIZERS)


_TOKENIZERS = (
    *("tokenizer*", "vocab*", "merges.txt", "spiece.model", "*.model", "*.tiktoken"),
    *("*.spm", "*.codes", "*.tokenizer", "source.*", "target.*"),
)


def _generation_config(folder: Path) -> "GenerationConfig":
    """What transformers takes where there is no file: the settings that stand in config.json."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
