"""Peak memory of converting and serving, measured in child processes and held against what sizing predicts.

    python -m helpers.memory.measure_memory google/flan-t5-small google/flan-t5-base
    python -m helpers.memory.measure_memory --overhead

Random weights of the models' real shapes are enough: for the bundled configs nothing is downloaded.

What counts as needed:

* Serving: anonymous and file-backed memory. Mapped weights are read for every token, so a machine that cannot
  keep them reads them from its disk again and again.
* Converting: anonymous memory, and the pages of libraries. A checkpoint's pages are read once, and the system
  may drop them at any time.
* Of libraries, as many pages as :data:`helpers.sizing.LIBRARY_BYTES` has them: how many are resident differs
  from one installation to the next, whatever the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers import sizing
from helpers.memory.process_memory import MeasureError, Peak, machine_memory_bytes, run_and_measure

METHODS = ("sample", "project")
PHASES = ("convert", "serve")

# Of this machine's memory, what a measured process may take: beyond it the figures would be those of
# swapping.
_USABLE = 0.85


@dataclass(frozen=True)
class Measurement:
    """Predicted against measured, for one model, method and phase. Sizes are in bytes.

    Attributes:
        predicted: :attr:`helpers.sizing.Phase.peak_bytes`.
        measured: what was needed at the peak, as the module's docstring says; where the system does not tell
            anonymous memory apart, the resident set.
        anonymous, file_backed, proportional: see :class:`.process_memory.Memory`. The proportional set size
            depends on the neighbours: libraries count less while others use them too.
        seconds: of the work, without imports.
        source: ``smaps_rollup``, or ``rss`` where only the resident set is known.
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
        """The prediction's excess as a share of what was measured; below 0 where it is too low."""
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

    It takes up to 8 bytes a parameter of disk while it runs, and leaves nothing.

    Args:
        model_name: see :func:`helpers.models.load_config`.
        methods: ``sample``, ``project`` or both.
        phases: the rows wanted: ``convert``, ``serve`` or both. Serving converts first, because it needs the
            file.
        batch_size, prompt_tokens, response_tokens: of the batch that is served.
        folder: for the temporary files; by default the system's temporary folder.
        timeout: seconds, for each of the processes.

    Raises:
        ModelError, SizingError: see :func:`helpers.sizing.size_model`.
        MeasureError: this machine has not the memory, or a process failed.
        OSError: the disk has no room.
    """
    from helpers.memory.random_checkpoint import write_random_checkpoint
    from helpers.models import load_config

    workload = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    dtypes = {"sample": "float16", "project": _serving_dtype()}
    sizings = {
        method: sizing.size_model(model_name, method=method, dtype=dtypes[method], **workload)
        for method in methods
    }
    _check_memory(model_name, sizings.values())
    measurements = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="measure-memory-") as temporary:
        checkpoint = write_random_checkpoint(load_config(model_name), Path(temporary) / "checkpoint")
        for method in methods:
            state_dict = Path(temporary) / f"{method}.pt"
            settings = workload | {
                "checkpoint": str(checkpoint),
                "state_dict": str(state_dict),
                "dtype": dtypes[method],
            }
            for phase in PHASES if "serve" in phases else ("convert",):
                arguments = [f"{phase}_{method}", json.dumps(settings)]
                peak, output = run_and_measure("helpers.memory.memory_workloads", arguments, timeout)
                if phase in phases:
                    measurements.append(
                        _compare(sizings[method], phase, peak, json.loads(output.splitlines()[-1]))
                    )
            state_dict.unlink()
    return measurements


def measure_models(model_names: Sequence[str], **options: Any) -> list[Measurement]:
    """:func:`measure_model` for one model after the other, with a progress bar."""
    from tqdm.auto import tqdm

    return [row for name in tqdm(model_names, unit="model") for row in measure_model(name, **options)]


def measure_overhead() -> dict[str, int]:
    """Measures the constants of :mod:`helpers.sizing` on this machine: what is left when a small model is
    taken off.

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
        name: getattr(sizing, name) + rows[key].measured - rows[key].predicted for key, name in names.items()
    }


def _compare(sized: sizing.Sizing, phase: str, peak: Peak, report: dict[str, Any]) -> Measurement:
    measured = peak.resident
    if peak.anonymous is not None:
        needed = peak.anonymous if phase == "convert" else peak.resident - report["library_bytes"]
        measured = needed + sizing.LIBRARY_BYTES[phase]
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
    """What this machine computes in: the state dict is written in it, and so mapped as it is."""
    import torch

    from helpers.serving.model_loading import choose_dtype

    dtype, _ = choose_dtype(torch.device("cpu"))
    return str(dtype).removeprefix("torch.")


def _check_memory(model_name: str, sizings: Iterable[sizing.Sizing]) -> None:
    needed = max(max(sized.convert.peak_bytes, sized.serve.peak_bytes) for sized in sizings)
    memory = machine_memory_bytes()
    if needed > _USABLE * memory:
        raise MeasureError(
            f"Measuring {model_name} needs {needed / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f}: "
            "measure a smaller model, or the project's method only."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a line for each measurement, and all of them as JSON in the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.memory.measure_memory", description="Predicted against measured memory."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a hub name or a folder")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: both")
    parser.add_argument("--overhead", action="store_true", help="measure the constants of helpers.sizing")
    options = parser.parse_args(arguments)
    if options.overhead == bool(options.models):
        parser.error("give models, or --overhead")
    try:
        if options.overhead:
            print(json.dumps(measure_overhead()))
            return 0
        rows = measure_models(options.models, methods=options.method or METHODS)
    except (MeasureError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(
            f"{row.model_name:22} {row.method:8} {row.phase:8} predicted {row.predicted / 1e6:8,.0f} MB  "
            f"measured {row.measured / 1e6:8,.0f} MB  {row.error:+6.1%}  {row.seconds:6.1f} s"
        )
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
