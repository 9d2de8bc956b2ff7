"""The models that this process serves: each loaded once, and replaced while it serves if asked for.

Beam itself holds a model by a weak reference: on some runners it is loaded again for every bundle, and on
Dataflow after a while without messages. What is loaded here stays.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from helpers.serving.language_model import LanguageModel, OtherModelError
from helpers.serving.local_state_dict import drop_older_copies, fetch
from helpers.serving.model_loading import LoadError, choose_device, choose_dtype, load_model
from helpers.state_dicts.manifest import read_manifest

log = logging.getLogger(__name__)

_served: dict[ModelSource, _Served] = {}
_lock = threading.Lock()
_loads = 0
_count_lock = threading.Lock()


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and where and how it computes; see ``LanguageModelHandler``."""

    state_dict_path: str
    model_name: str | None = None
    device: str | None = None
    dtype: str | None = None
    cache_dir: str | None = None

    def load(self) -> tuple[LanguageModel, str]:
        """Loads the model; returns it, and the checksum of the state dict that it was loaded from.

        Raises:
            FileNotFoundError, PermissionError: the state dict cannot be read.
            LoadError: it is damaged or another model's, or the device asked for is not there.
        """
        device = choose_device(self.device)
        dtype, reason = choose_dtype(device, self.dtype)
        log.info("Computing on %s in %s: %s", device, str(dtype).removeprefix("torch."), reason)
        state_dict = fetch(self.state_dict_path, dtype, self.cache_dir)
        made_from = state_dict.manifest.model_name
        if self.model_name and self.model_name != made_from:
            raise LoadError(
                f"{self.state_dict_path} was made from {made_from!r}, not from {self.model_name!r}: give "
                "that name, or the path of the other model's state dict."
            )
        started = time.monotonic()
        model, tokenizer = load_model(state_dict.file, state_dict.folder, device=device, dtype=dtype)
        log.info("Loaded %s in %.2f s", made_from, time.monotonic() - started)
        return LanguageModel(model, tokenizer, made_from), state_dict.manifest.crc32c


@dataclass
class _Served:
    """A model in use.

    Attributes:
        checksum: of the state dict that it was loaded from.
        is_watched: whether a thread looks for a new one.
    """

    language_model: LanguageModel
    checksum: str
    is_watched: bool = False


def serve(source: ModelSource, reload_seconds: float | None = None) -> LanguageModel:
    """The model from ``source``, loaded if this process has not done so yet, or if its state dict is new.

    Args:
        source: where it comes from.
        reload_seconds: how often to look for a new state dict at the same path from now on. None looks only
            when this function is called: who converts again in a notebook gets the new weights. The old one
            serves until the new one is ready, and goes on if the new one cannot be used.

    Raises:
        FileNotFoundError, PermissionError, LoadError: as ``ModelSource.load``, if nothing is served yet.
    """
    with _lock:
        if source not in _served:
            _served[source] = _Served(*source.load())
            _count_load()
        elif not _served[source].is_watched:
            _take_up_new(source, _served[source], may_differ=True)
        served = _served[source]
        if reload_seconds is not None and not served.is_watched:
            served.is_watched = True
            watch = threading.Thread(
                target=_watch, args=(source, served, reload_seconds), name="state dict watch", daemon=True
            )
            watch.start()
        return served.language_model


def forget(source: ModelSource) -> None:
    """Stops serving a model: its memory is free when nobody uses it any more."""
    with _lock:
        _served.pop(source, None)


def count_loads() -> int:
    """How many models were loaded since the last call: Beam drops what is counted while a DoFn is set up."""
    global _loads
    with _count_lock:
        loads, _loads = _loads, 0
    return loads


def _count_load() -> None:
    global _loads
    with _count_lock:
        _loads += 1


def _watch(source: ModelSource, served: _Served, seconds: float) -> None:
    while _served.get(source) is served:
        time.sleep(seconds)
        if _served.get(source) is served:
            _take_up_new(source, served)


def _take_up_new(source: ModelSource, served: _Served, may_differ: bool = False) -> None:
    """Looks at the state dict's manifest, and replaces the model that serves if there is another one.

    Args:
        source: of the model.
        served: what serves.
        may_differ: whether a model of another architecture may take its place: for who asks from now on.
    """
    try:
        if read_manifest(source.state_dict_path).crc32c == served.checksum:
            return
        new, checksum = source.load()
        try:
            served.language_model.take_over(new)
            served.checksum = checksum
        except OtherModelError:
            if not may_differ:
                raise
            _served[source] = _Served(new, checksum)
        _count_load()
        drop_older_copies(source.state_dict_path, checksum, source.cache_dir)
        log.info("Took up the new state dict at %s", source.state_dict_path)
    except Exception as error:  # the old one serves on; the next look may find a whole one
        log.error("The state dict at %s is not taken up: %s", source.state_dict_path, error)
