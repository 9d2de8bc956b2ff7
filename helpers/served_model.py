"""The models that this process serves: each loaded once, and replaced while it serves if asked for.

Beam itself holds a model by a weak reference: on some runners it is loaded again for every bundle, and on
Dataflow after a while without messages. What is loaded here stays.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from helpers.language_model import LanguageModel
from helpers.local_state_dict import fetch
from helpers.manifest import read_manifest
from helpers.model_loading import LoadError, choose_device, choose_dtype, load_model

log = logging.getLogger(__name__)

_served: dict[ModelSource, LanguageModel] = {}
_lock = threading.Lock()
_loads = 0


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


def serve(source: ModelSource, reload_seconds: float | None = None) -> LanguageModel:
    """The model from ``source``, loaded if this process has not done so yet.

    Args:
        source: where it comes from.
        reload_seconds: how often to look for a new state dict at the same path; None never does. The old one
            serves until the new one is ready, and goes on if the new one cannot be used.
    """
    global _loads
    with _lock:
        if source not in _served:
            language_model, checksum = source.load()
            _served[source] = language_model
            _loads += 1
            if reload_seconds is not None:
                watch = _Watch(source, language_model, checksum, reload_seconds)
                threading.Thread(target=watch.run, name="state dict watch", daemon=True).start()
        return _served[source]


def forget(source: ModelSource) -> None:
    """Stops serving a model: its memory is free when nobody uses it any more."""
    with _lock:
        _served.pop(source, None)


def count_loads() -> int:
    """How many models were loaded since the last call: Beam drops what is counted while a DoFn is set up."""
    global _loads
    with _lock:
        loads, _loads = _loads, 0
    return loads


@dataclass
class _Watch:
    """Looks at a state dict's manifest, and takes up a new one."""

    source: ModelSource
    language_model: LanguageModel
    checksum: str
    seconds: float

    def run(self) -> None:
        while _served.get(self.source) is self.language_model:
            time.sleep(self.seconds)
            try:
                self.look()
            except Exception as error:  # the old one serves on; the next look may find a whole one
                log.warning("The state dict at %s is not taken up: %s", self.source.state_dict_path, error)

    def look(self) -> None:
        global _loads
        if read_manifest(self.source.state_dict_path).crc32c == self.checksum:
            return
        new, checksum = self.source.load()
        self.language_model.take_over(new)
        self.checksum = checksum
        with _lock:
            _loads += 1
        log.info("Took up the new state dict at %s", self.source.state_dict_path)
