"""What a sweep found, kept as JSON: to look at before the next one has run, and to compare it with."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from helpers.files import storage
from helpers.measuring.cpu import cpu_name, kind_of_cpu
from helpers.measuring.streaming.batch_times import BatchTimes
from helpers.measuring.streaming.load import Records
from helpers.measuring.streaming.sweep import Point

PACKAGED = Path(__file__).with_name("saved_result.json")
NONE = Records([], 0)


@dataclass(frozen=True)
class Result:
    """What was measured, and on what.

    Attributes:
        machine: that the workers ran on.
        model_name: the model.
        options: the answering options, where they are not the defaults.
        points: one for each rate; those that were read from a file have no records.
        times: of its batches.
    """

    machine: str
    model_name: str
    options: Mapping[str, Any]
    points: Sequence[Point]
    times: BatchTimes

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to a path, local or `gs://`, in place of what is there."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            points = [replace(point, records=NONE) for point in self.points]
            found = asdict(replace(self, points=points))
            for point in found["points"]:
                del point["records"]
                point |= {name: None for name, value in point.items() if not math.isfinite(value)}
            file.write_text(json.dumps(found, indent=1) + "\n")
            storage.upload(file, path, overwrite=True)


def read_result(path: str | os.PathLike = PACKAGED) -> Result:
    """A result from a file; by default the one that comes with the helpers.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else.
    """
    try:
        found = json.loads(storage.read_bytes(path))
        points = [
            Point(**{name: math.inf if value is None else value for name, value in one.items()}, records=NONE)
            for one in found.pop("points")
        ]
        result = Result(**found | {"points": points, "times": BatchTimes(**found["times"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(Result))
        raise ValueError(f"{path} is no result of a sweep, which has {names}: {error}") from error
    return result


def this_machine() -> str:
    """What this machine is, for a result that was measured on it."""
    return f"{os.cpu_count()} cores of an {cpu_name()} ({kind_of_cpu()})"
