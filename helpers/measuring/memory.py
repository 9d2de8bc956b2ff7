"""Peak memory of converting and serving, measured in child processes and compared with what sizing predicts.

    python -m helpers.measuring google/flan-t5-small google/flan-t5-base
    python -m helpers.measuring --overhead

Random weights of the models' real shapes are enough: for the bundled configs nothing is downloaded.

What counts as needed:

* Serving: anonymous and file-backed memory. Mapped weights are read for every token, so a machine that cannot
  keep them reads them from its disk again and again.
* Converting: anonymous memory, and the pages of libraries. A checkpoint's pages are read once, and the system
  may drop them at any time.
* Of libraries, as many pages as `helpers.sizing.sizes.LIBRARY_BYTES` has them: how many are resident differs
  from one installation to the next, whatever the model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.measuring.cpu import vendor
from helpers.measuring.process_memory import MeasureError, Peak, run_and_measure
from helpers.measuring.random_checkpoint import write_random_checkpoint
from helpers.model_handler.hardware import choose_dtype
from helpers.models import load_config
from helpers.models.dtypes import dtype_name
from helpers.sizing import sizes
from helpers.sizing.this_machine import machine_memory_bytes

METHODS = ("sample", "project")
ENGINE_METHODS = {"ctranslate2-float32": "float32", "ctranslate2-int8": "int8"}
"""The project's method with CTranslate2, by the dtype that it computes in: only to serve."""
PHASES = ("convert", "serve")

# The share of this machine's memory that a measured process may take: beyond it, the figures would be those
# of swapping.
_USABLE = 0.85


@dataclass(frozen=True)
class Measurement:
    """Predicted and measured memory, for one model, method and phase. Sizes are in bytes.

    Attributes:
        predicted: `helpers.sizing.Phase.peak_bytes`.
        measured: what was needed at the peak, as the module's docstring says; where the system does not
            report anonymous memory separately, the resident set.
        anonymous, file_backed, proportional: see `.process_memory.Memory`. The proportional set size
            depends on other processes: libraries count less while others use them too.
        seconds: how long the work took, without imports.
        source: `smaps_rollup`, or `rss` where only the resident set is known.
    """

    model_name: str
    method: str
    phase: str
    predicted: int
    measured: int
    anonymous: int | None
    file_backed: int | None
    proportional: int | None
    seconds: float
    source: str

    @property
    def error(self) -> float:
        """The prediction's excess as a share of what was measured; negative if it is too low."""
        return self.predicted / self.measured - 1


def measure_model(
    model_name: str,
    *,
    methods: Sequence[str] = METHODS,
    phases: Sequence[str] = PHASES,
    batch_size: int = 1,
    prompt_tokens: int = 64,
    response_tokens: int = 16,
    folder: str | Path | None = None,
    timeout: float = 600,
) -> list[Measurement]:
    """Converts and serves random weights of a model's shape by each method, and compares with the prediction.

    It takes up to 8 bytes of disk per parameter while it runs, and leaves nothing behind.

    Args:
        model_name: see `helpers.models.load_config`.
        methods: of `METHODS` and `ENGINE_METHODS`.
        phases: the rows wanted: `convert`, `serve` or both. Serving converts first, because it needs the
            file.
        batch_size, prompt_tokens, response_tokens: the size of the batch that is served.
        folder: where the temporary files go; by default the system's temporary folder.
        timeout: in seconds, for each of the processes.

    Raises:
        ModelError, SizingError: see `helpers.sizing.size_model`.
        MeasureError: this machine has too little memory, or a process failed.
        OSError: the disk has no room.
    """
    workload = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    dtypes = {"sample": "float16", "project": _serving_dtype()}
    sizings = {
        method: sizes.size_model(model_name, **_sizing_of(method, dtypes), **workload) for method in methods
    }
    _check_memory(model_name, sizings.values())
    measurements = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="measure-memory-") as temporary:
        checkpoint = write_random_checkpoint(load_config(model_name), Path(temporary) / "checkpoint")
        for method in methods:
            state_dict = Path(temporary) / f"{method}.pt"
            engine_dtype = ENGINE_METHODS.get(method)
            settings = workload | {
                "checkpoint": str(checkpoint),
                "state_dict": str(state_dict),
                "dtype": engine_dtype or dtypes[method],
                "stored": "float16" if engine_dtype else dtypes[method],
                "engine_file": str(Path(temporary) / "engine"),
            }
            runs = {"convert": f"convert_{method}", "serve": f"serve_{method}"}
            if engine_dtype:
                runs = {
                    "convert": "convert_project",
                    "make": "make_ctranslate2",
                    "serve": "serve_ctranslate2",
                }
            wanted = [one for one in phases if one == "serve" or not engine_dtype]
            for phase, run in runs.items() if "serve" in phases else [("convert", runs["convert"])]:
                peak, output = run_and_measure(
                    "helpers.measuring.memory_workloads", [run, json.dumps(settings)], timeout
                )
                if phase in wanted:
                    found = _compare(sizings[method], phase, peak, json.loads(output.splitlines()[-1]))
                    measurements.append(replace(found, method=method))
            state_dict.unlink()
    return measurements


def _sizing_of(method: str, dtypes: dict[str, str]) -> dict[str, str]:
    if method in ENGINE_METHODS:
        # CTranslate2 packs weights on Intel's processors: a family that has this machine's kind.
        family = "n2" if vendor() == "GenuineIntel" else "n2d"
        return {"engine": "ctranslate2", "compute_dtype": ENGINE_METHODS[method], "family": family}
    return {"method": method, "dtype": dtypes[method]}


def measure_models(model_names: Sequence[str], **options: Any) -> list[Measurement]:
    """`measure_model` for one model after the other, with a progress bar."""
    from tqdm.auto import tqdm

    return [row for name in tqdm(model_names, unit="model") for row in measure_model(name, **options)]


def measure_overhead() -> dict[str, int]:
    """Measures the constants of `helpers.sizing` on this machine: what is left when a small model is
    subtracted.

    Returns:
        The constants' names, and the values they should have here, in bytes.
    """
    names = {
        ("project", "serve"): "WORKER_BYTES",
        ("project", "convert"): "CONVERTER_BYTES",
        ("sample", "convert"): "SCRIPT_BYTES",
    }
    rows = {(row.method, row.phase): row for row in measure_model("google/flan-t5-small")}
    return {
        name: getattr(sizes, name) + rows[key].measured - rows[key].predicted for key, name in names.items()
    }


def _compare(sized: sizes.Sizing, phase: str, peak: Peak, report: dict[str, Any]) -> Measurement:
    measured = peak.resident
    if peak.anonymous is not None:
        needed = peak.anonymous if phase == "convert" else peak.resident - report["library_bytes"]
        measured = needed + sizes.LIBRARY_BYTES[phase]
    return Measurement(
        model_name=sized.model_name,
        method=sized.method,
        phase=phase,
        predicted=getattr(sized, phase).peak_bytes,
        measured=measured,
        anonymous=peak.anonymous,
        file_backed=peak.file_backed,
        proportional=peak.proportional,
        seconds=report["seconds"],
        source=peak.source,
    )


def _serving_dtype() -> str:
    """The dtype this machine computes in: a state dict written in it is mapped as it is."""
    import torch

    return dtype_name(choose_dtype(torch.device("cpu"))[0])


def _check_memory(model_name: str, sizings: Iterable[sizes.Sizing]) -> None:
    needed = max(max(sized.convert.peak_bytes, sized.serve.peak_bytes) for sized in sizings)
    memory = machine_memory_bytes()
    if needed > _USABLE * memory:
        raise MeasureError(
            f"Measuring {model_name} needs {needed / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f}: "
            "measure a smaller model, or the project's method only."
        )
