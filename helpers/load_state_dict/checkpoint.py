"""Reading a Hugging Face checkpoint one tensor at a time, without ever holding the model.

Safetensors and PyTorch's zip files are mapped: a tensor's bytes come from disk when they are used, and the
operating system may drop them again. Nothing but tensors is unpickled (`weights_only=True`).
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from helpers.files.names import UnsafeNameError, check_plain
from helpers.models.checkpoint_files import WEIGHTS
from helpers.models.error_text import first_line


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or not safe to read."""


class Checkpoint:
    """The tensors of a checkpoint folder, by name.

    Args:
        folder: holds one of `helpers.models.checkpoint_files.WEIGHTS`.

    Raises:
        CheckpointError: there are no weights, a shard is missing or damaged, or one is a pickle that holds
            more than tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = [name for name in WEIGHTS if (self.folder / name).is_file()]
        if not found:
            raise CheckpointError(
                f"{self.folder} has no weights: expected one of {', '.join(WEIGHTS)}; download all of it"
            )
        promised = None
        if found[0].endswith(".index.json"):
            promised = _read_index(self.folder / found[0])
        self.files = [
            self.folder / name for name in sorted(set(promised.values()) if promised else found[:1])
        ]
        self._shards = {}
        self._file_of = {}
        for file in self.files:
            if not file.is_file():
                raise CheckpointError(
                    f"{found[0]} names the shard {file.name}, which {self.folder} lacks: download it again"
                )
            shard = _SafetensorsShard(file) if file.suffix == ".safetensors" else _TorchShard(file)
            self._shards[file.name] = shard
            self._file_of.update(dict.fromkeys(shard.names, file.name))
        if absent := sorted(set(promised or ()) - set(self._file_of)):
            raise CheckpointError(
                f"{found[0]} promises {len(absent)} tensors that no shard holds ({absent[0]}, ...): "
                "its files are from different checkpoints; download it again"
            )

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, shard by shard."""
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, mapped where its file allows it: use it and let it go."""
        return self._shards[self._file_of[name]].tensor(name)

    def spec(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with the shape and dtype of the named one."""
        return self._shards[self._file_of[name]].spec(name)


class _SafetensorsShard:
    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._open = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        self.names = list(self._open.keys())

    def tensor(self, name: str) -> torch.Tensor:
        return self._open.get_tensor(name)

    def spec(self, name: str) -> torch.Tensor:
        return self.tensor(name).to("meta")


class _TorchShard:
    def __init__(self, file: Path) -> None:
        self._tensors = _load_pickle(file)
        self.names = list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def spec(self, name: str) -> torch.Tensor:
        return self._tensors[name].to("meta")


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        with open(file, "rb") as data:
            is_zip = data.read(4) == b"PK\x03\x04"
        # Files from PyTorch before 1.6 are not zip files and cannot be mapped: they are read as a whole.
        tensors = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is refused: it is a pickle that would run code, or is damaged ({first_line(error)}). "
            "Ask its publisher for safetensors, or use another model"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{file} is not a dictionary of tensors: give the folder of a model's checkpoint"
        )
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(name): check_plain(shard) for name, shard in weight_map.items()}
    except UnsafeNameError as error:
        raise CheckpointError(f"{file} is refused: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or incomplete ({first_line(error)}): download it again")
