"""The models that this process serves: each loaded once, and replaced while it serves if asked to.

Beam itself holds only a weak reference to a model: some runners load it again for every bundle, and Dataflow
after a while without messages. What is loaded here stays loaded.

New weights arrive in one way: somebody looks at the path's manifest (`_Served.look`), either a caller of
`serve` or, with `reload_seconds`, a thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from helpers.load_state_dict.engine_file import EngineError
from helpers.load_state_dict.manifest import Manifest, read_manifest
from helpers.load_state_dict.mapped_model import (
    LoadError,
    load_model,
    page_dropper,
    read_generation_config,
)
from helpers.model_handler import engine_thread
from helpers.model_handler.engines.choice import Choice, choose
from helpers.model_handler.engines.generation_settings import held, not_honoured
from helpers.model_handler.engines.packed_weights import ENGINE as PACKED
from helpers.model_handler.engines.packed_weights import pack_weights
from helpers.model_handler.engines.torch_engine import TorchEngine
from helpers.model_handler.hardware import describe_machine
from helpers.model_handler.language_model import LanguageModel, OtherModelError
from helpers.model_handler.local_engine_file import fetch_engine_file
from helpers.model_handler.local_state_dict import drop_older_copies, fetch
from helpers.models.architecture import architecture_of, read_config, read_tokenizer
from helpers.models.dtypes import torch_dtype

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

log = logging.getLogger(__name__)

_served: dict[ModelSource, _Served] = {}
_lock = threading.Lock()
_counts: Counter[str] = Counter()
_count_lock = threading.Lock()


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and where, by what and in what it is computed; see `LanguageModelHandler`."""

    state_dict_path: str
    model_name: str | None = None
    device: str | None = None
    dtype: str | None = None
    cache_dir: str | None = None
    engine: str | None = None

    def load(self) -> tuple[LanguageModel, Manifest]:
        """Loads the model, in a thread that ends with it; returns it, and the manifest of the state dict that
        it was loaded from.

        Raises:
            FileNotFoundError, PermissionError: the state dict cannot be read.
            WrongModelError: it was made from another model.
            CacheError, CompanionError, EngineError, LoadError, ModelError: it is damaged, its model is of no
                use here, or the device or the engine is not there or cannot take the model.
        """
        return engine_thread.run_apart(self._load)

    def _load(self) -> tuple[LanguageModel, Manifest]:
        choice = choose(self.engine, self.device, self.dtype)
        # Before anything is fetched: another model's weights are of no use.
        read_manifest(self.state_dict_path).check_model(self.state_dict_path, self.model_name)
        started = time.monotonic()
        if choice.engine == "ctranslate2":
            try:
                found = self._load_ctranslate2(choice)
            except (EngineError, LoadError, MemoryError, OSError) as error:
                if choice.is_asked_for:
                    raise
                log.warning("Computing with torch: %s", error)
                choice = choice.instead()
        if choice.engine != "ctranslate2":
            found = self._load_torch(choice)
        model, manifest = found
        log.info("This machine: %s", describe_machine())
        log.info(
            "Loaded %s in %.2f s, to compute with %s in %s on %s: %s",
            *(manifest.model_name, time.monotonic() - started),
            *(choice.engine, choice.dtype, choice.device, choice.reason),
        )
        return model, manifest

    def _load_torch(self, choice: Choice) -> tuple[LanguageModel, Manifest]:
        dtype = torch_dtype(choice.dtype)
        while True:
            with _timed("fetch_milliseconds"):
                state_dict = fetch(self.state_dict_path, dtype, self.cache_dir)
            try:
                model, tokenizer = load_model(
                    state_dict.file, state_dict.folder, device=choice.device, dtype=dtype
                )
            except Exception:
                if state_dict.is_there():
                    raise
                continue  # the file was replaced, or dropped, while it was being loaded
            if state_dict.is_there():
                break
            del model  # the weights of another version, with this one's tokenizer
        _tell_what_does_not_hold(model.generation_config)
        if choice.engine == PACKED:
            pack_weights(model, page_dropper(state_dict.file))
        engine = TorchEngine(model, tokenizer, name=choice.engine)
        return LanguageModel(engine, tokenizer, state_dict.manifest.model_name), state_dict.manifest

    def _load_ctranslate2(self, choice: Choice) -> tuple[LanguageModel, Manifest]:
        # An import of its own: the engine is not installed everywhere.
        from helpers.model_handler.engines.ctranslate2_engine import CTranslate2Engine, DisagreementError

        with _timed("fetch_milliseconds"):
            local = fetch_engine_file(self.state_dict_path, choice.dtype, self.cache_dir)
        config = architecture_of(read_config(local.companions)).config
        settings = read_generation_config(local.companions, config)
        try:
            engine = CTranslate2Engine(
                local.folder,
                local.file,
                config,
                held(settings),
                choice.device,
                torch.get_num_threads(),
                lambda: self._transformers_model(choice, local.manifest),
            )
        except DisagreementError as error:
            local.refuse(str(error))
            raise
        _tell_what_does_not_hold(settings)
        tokenizer = read_tokenizer(local.companions)
        return LanguageModel(engine, tokenizer, local.manifest.model_name), local.manifest

    def _transformers_model(self, choice: Choice, manifest: Manifest) -> PreTrainedModel:
        loaded, found = self._load_torch(choice.instead())
        if found.version != manifest.version:
            raise LoadError(f"{self.state_dict_path} was replaced since it was loaded: load it again.")
        return loaded.model


def _tell_what_does_not_hold(settings: GenerationConfig) -> None:
    if left := not_honoured(settings):
        log.warning(
            "Settings of the publisher's that do not hold here, where the answering options decide: %s",
            ", ".join(f"{name}={value!r}" for name, value in left.items()),
        )


class _Served:
    """A model in use, from a source."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        with _timed("load_milliseconds"):
            self.language_model, manifest = source.load()
        self._version, self._refused = manifest.version, ""
        self.is_watched = False
        _count("models_loaded", 1)

    def look(self) -> None:
        """Takes up the state dict that is at the path now, if it is another one and can be used.

        A model of another architecture takes the place of this one only for later callers of `serve`, and
        never while a thread watches: whoever asks the old one would go on with it.
        """
        path = self._source.state_dict_path
        try:
            if read_manifest(path).version in (self._version, self._refused):
                return
            with _timed("load_milliseconds"):
                new, manifest = self._source.load()
            try:
                self.language_model.take_over(new)
            except OtherModelError:
                if self.is_watched:
                    self._refused = manifest.version  # it would be loaded again at each look
                    raise
                self.language_model = new
            self._version = manifest.version
            _count("models_loaded", 1)
            drop_older_copies(path, manifest.crc32c, self._source.cache_dir)
            log.info("Took up the new state dict at %s", path)
        except Exception as error:  # the old model goes on; the next check may find a whole file
            log.error("The new state dict at %s cannot be used: %s", path, error)

    def watch(self, seconds: float) -> None:
        """Looks every so many seconds, in a thread that ends once the model is no longer served."""

        def look_again_and_again() -> None:
            while _served.get(self._source) is self:
                time.sleep(seconds)
                if _served.get(self._source) is self:
                    self.look()

        self.is_watched = True
        threading.Thread(target=look_again_and_again, name="state dict watch", daemon=True).start()


def serve(source: ModelSource, reload_seconds: float | None = None) -> LanguageModel:
    """The model from `source`, loaded if this process has not loaded it yet or its state dict is new.

    Args:
        source: where the model comes from.
        reload_seconds: how often to look for a new state dict at the same path from now on. None looks only
            when this function is called, so that converting again in a notebook is enough. The old one serves
            until the new one is ready, and goes on if the new one cannot be used.

    Raises:
        As `ModelSource.load`, if nothing is served yet.
    """
    with _lock:
        served = _served.get(source)
        if served is None:
            served = _served[source] = _Served(source)
        elif not served.is_watched:
            served.look()
        if reload_seconds is not None and not served.is_watched:
            served.watch(reload_seconds)
        return served.language_model


def forget(source: ModelSource) -> None:
    """Stops serving a model; its memory is freed once nothing uses it any more."""
    with _lock:
        _served.pop(source, None)


def take_counts() -> dict[str, int]:
    """What was counted since the last call: Beam drops counts made while a DoFn is set up.

    Returns:
        `models_loaded`; `load_milliseconds`, from reading the manifest until the model can answer, and of
        these `fetch_milliseconds`, in which its file came to this machine (and the engine's was made, if it
        was not there yet).
    """
    with _count_lock:
        taken = {name: _counts[name] for name in ("models_loaded", "load_milliseconds", "fetch_milliseconds")}
        _counts.clear()
    return taken


def _count(name: str, number: int) -> None:
    with _count_lock:
        _counts[name] += number


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        _count(name, round(1000 * (time.monotonic() - started)))
