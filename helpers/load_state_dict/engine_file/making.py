"""Makes an engine's file from a state dict, weight by weight."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.files import storage
from helpers.files.cache import cache_folder, private_folder
from helpers.files.transfer import crc32c_of
from helpers.files.whole_file import free_bytes, only_writer, whole_folder
from helpers.load_state_dict.engine_file.description import (
    DESCRIPTION,
    ENGINE,
    ENGINE_DTYPES,
    EngineError,
    EngineFile,
    engine_folder,
    engine_version,
    in_place,
)
from helpers.load_state_dict.manifest import Manifest, read_companion, read_manifest
from helpers.models.architecture import architecture_of, read_config
from helpers.models.dtypes import DTYPE_BYTES
from helpers.models.error_text import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

WAIT_SECONDS = 3600
"""How long to wait for another process that makes the same file."""

_making = threading.Lock()


def why_not(folder: str | Path) -> str:
    """Why CTranslate2 cannot take a model; empty if it can.

    Args:
        folder: with the model's config.json.

    Raises:
        ModelError: it is not the config of a model that generates text.
    """
    if engine_version() is None:
        return "ctranslate2 is not installed: `pip install ctranslate2`"
    try:
        loaders = importlib.import_module("ctranslate2.converters.transformers")._MODEL_LOADERS
    except Exception as error:  # a build for another CPU or Python fails in ways of its own
        return f"ctranslate2 cannot be imported ({first_line(error)}): install it again"
    architecture = architecture_of(read_config(folder))
    config, name = architecture.config, architecture.model_class.__name__
    loader = loaders.get(type(config).__name__)
    if loader is None or loader.architecture_name != name:
        return f"ctranslate2 does not know {name}"
    return _depends_on_length(config)


def _depends_on_length(config: PretrainedConfig) -> str:
    """What a model does only with long prompts, which the sample that engines are checked with is not."""
    kinds = getattr(config, "layer_types", None) or ()
    if getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in kinds):
        return "ctranslate2 computes attention windows otherwise than transformers: use engine torch"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"ctranslate2's {rope['rope_type']} positions were not shown to be right: use engine torch"
    return ""


def make(
    state_dict_file: str | Path, folder: str | Path, source: str, target: str | Path, dtype: str
) -> EngineFile:
    """Writes the engine's file of a state dict that is on this machine.

    The weights are taken from the mapped state dict one by one, so this needs memory for the largest of them
    in float32, twice, rather than for the model. (Some architectures' converters copy more: GPT-2's does.)

    Args:
        state_dict_file: the `.pt` file.
        folder: with config.json, generation_config.json and the tokenizer's files.
        source: the state dict's `Manifest.version`.
        target: the folder to write, which appears whole or not at all.
        dtype: what to compute in, of `ENGINE_DTYPES`.

    Raises:
        EngineError: the engine is not installed, or cannot take the model.
        LoadError: the state dict is damaged, or of another model.
        OSError: not enough disk space, or the folder cannot be written.
    """
    if dtype not in ENGINE_DTYPES:
        raise EngineError(f"ctranslate2 does not compute in {dtype!r}: use {', '.join(ENGINE_DTYPES)}.")
    if reason := why_not(folder):
        raise EngineError(reason)
    from helpers.load_state_dict.engine_file.reference import reference_of
    from helpers.load_state_dict.mapped_model import load_model, page_dropper

    started = time.monotonic()
    model, _ = load_model(state_dict_file, folder, as_stored=True)
    _check_room(Path(target), sum(one.numel() for one in model.parameters()), dtype)
    start = model.generation_config.decoder_start_token_id
    if model.config.is_encoder_decoder and start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    if model.config.is_encoder_decoder and not isinstance(start, int):
        raise EngineError("ctranslate2 needs the one token that responses begin after, and there is none")
    drop = page_dropper(state_dict_file)
    try:
        reference = reference_of(model.eval(), start, drop)
    except MemoryError:
        raise
    except Exception as error:  # a model that cannot be asked with tokens alone raises every kind
        raise EngineError(
            f"a sample could not be computed ({first_line(error)}): use engine torch."
        ) from error
    with _making:  # the converter is a library with state of its own
        spec = _specification(model, start)
    with whole_folder(target) as new:
        _write(spec, dtype, drop, new)
        names = sorted(file.name for file in new.iterdir())
        made = EngineFile(
            engine=ENGINE,
            engine_version=engine_version() or "",
            dtype=dtype,
            source=source,
            files={name: crc32c_of(new / name) for name in names},
            sizes={name: (new / name).stat().st_size for name in names},
            reference=reference,
        )
        (new / DESCRIPTION).write_text(made.to_json())
    log.info(
        "Made the file of %s in %s: %.2f GB in %.1f s",
        ENGINE,
        dtype,
        made.bytes / 1e9,
        time.monotonic() - started,
    )
    return made


def _write(spec: Any, dtype: str, drop: Callable[[Any], None], folder: Path) -> None:
    from helpers.load_state_dict.engine_file.variables import write_later

    try:
        write_later(spec, dtype, drop)
        spec.save(str(folder))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # weights that do not make the model that the loader thinks of
        raise EngineError(f"ctranslate2 cannot take this model ({first_line(error)})") from error


def put_beside(
    state_dict_path: str | os.PathLike,
    dtype: str,
    *,
    local: str | Path | None = None,
    progress: bool = True,
) -> EngineFile:
    """Makes the engine's file of a state dict and puts it beside it, unless it is there already.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        dtype: what to compute in, of `ENGINE_DTYPES`.
        local: a copy of a state dict in Cloud Storage, with its companion folder; None fetches one.
        progress: whether to print what was done.

    Raises:
        EngineError: the engine is not installed, or cannot take the model.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read, or the file written.
        FileBusyError: another process of this machine has been making it for an hour.
        OSError: not enough disk space.
    """
    path, target = str(state_dict_path), engine_folder(state_dict_path, dtype)
    manifest = read_manifest(path)
    if found := in_place(path, manifest, dtype):
        if progress:
            print(f"Nothing to do: {target} is in place.")
        return found
    if not storage.is_cloud(path):
        with only_writer(target, WAIT_SECONDS):
            made = in_place(path, manifest, dtype) or _make_checked(path, manifest, path, target, dtype)
    else:
        work = cache_folder("conversions") / f"{manifest.version}-{dtype}"
        with only_writer(f"{work}.engine", WAIT_SECONDS):
            made = in_place(path, manifest, dtype) or _make_and_upload(path, manifest, dtype, local, work)
    if progress:
        print(f"Wrote {target}: {made.bytes / 1e9:.2f} GB for {ENGINE} {made.engine_version}.")
    return made


def _make_and_upload(
    path: str, manifest: Manifest, dtype: str, local: str | Path | None, work: Path
) -> EngineFile:
    shutil.rmtree(work, ignore_errors=True)  # of somebody who was killed
    private_folder(work)
    try:
        file, target = Path(local) if local else _fetch(path, manifest, work), engine_folder(path, dtype)
        made = _make_checked(path, manifest, file, work / "engine", dtype)
        for name in [*made.files, DESCRIPTION]:  # the description last: with it, the file is whole
            storage.upload(work / "engine" / name, f"{target}/{name}", overwrite=True)
        return made
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_checked(
    path: str, manifest: Manifest, file: str | Path, target: str | Path, dtype: str
) -> EngineFile:
    """`make`, from a file that is what the manifest says, before and after."""

    def check(whose: Path) -> os.stat_result:
        found = os.stat(whose)
        if found.st_size != manifest.bytes:
            raise EngineError(f"{path} is not what its manifest says: convert the model again.")
        return found

    file = Path(file)
    before = check(file)
    if crc32c_of(file) != manifest.crc32c:
        raise EngineError(f"{path} is damaged: convert the model again, with --overwrite.")
    made = make(file, file.with_suffix(""), manifest.version, target, dtype)
    after = check(file)
    if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
        shutil.rmtree(target, ignore_errors=True)
        raise EngineError(f"{path} was replaced while its engine's file was made: try again.")
    return made


def _fetch(path: str, manifest: Manifest, work: Path) -> Path:
    file = work / "model.pt"
    storage.download(path, file, lambda moved: None)
    folder = file.with_suffix("")
    for name in manifest.files:
        companion = folder / name
        companion.parent.mkdir(parents=True, exist_ok=True)
        companion.write_bytes(read_companion(path, manifest, name))
    return file


def _check_room(target: Path, numbers: int, dtype: str) -> None:
    needed = numbers * DTYPE_BYTES.get(dtype, 1)
    if needed > (free := free_bytes(target)):
        raise OSError(
            f"{target} needs {needed / 1e9:.1f} GB of disk, but {free / 1e9:.1f} GB are free: free some "
            "space, or use another disk"
        )


def _specification(model: PreTrainedModel, start: int | None) -> Any:
    """CTranslate2's specification of a model, whose weights are still the model's own.

    Its vocabulary is numbers: prompts come as token ids, and a tokenizer's texts for them need not be unique.
    """
    import torch
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    from helpers.load_state_dict.engine_file.variables import JoiningLater

    loader = _MODEL_LOADERS[type(model.config).__name__]
    gc.collect()
    gc.freeze()  # loaders collect garbage after each layer, and there are many objects to look at
    try:
        with torch.no_grad(), JoiningLater():
            spec = loader.get_model_spec(model)
    except MemoryError:
        raise
    except Exception as error:  # a config that the loader does not expect raises every kind
        raise EngineError(
            f"ctranslate2 cannot take this {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        gc.unfreeze()
    rows = model.get_input_embeddings().weight.shape[0]
    loader.set_vocabulary(spec, [str(token) for token in range(rows)])
    config = spec.config
    # Ends are given with each request; the others are never looked for in a prompt of known tokens.
    config.bos_token = config.eos_token = config.unk_token = "0"
    if model.config.is_encoder_decoder:
        config.decoder_start_token = str(start)
        spec.decoder.scale_outputs = _decoder_scale(model)
    elif hasattr(model.config, "rms_norm_eps"):
        config.layer_norm_epsilon = model.config.rms_norm_eps
    return spec


def _decoder_scale(model: PreTrainedModel) -> Any:
    """What a T5's decoder output is multiplied by. CTranslate2's loader goes by a flag that transformers 5
    sets for every T5 (facts in `head_is_separate`)."""
    from ctranslate2.specs.model_spec import OPTIONAL

    config = model.config
    scales = {
        "t5": getattr(config, "scale_decoder_outputs", False),
        "mt5": False,
        "umt5": getattr(config, "tie_word_embeddings", False),
    }
    return config.d_model**-0.5 if scales.get(config.model_type) else OPTIONAL
