"""Sizings as a table for a terminal, and the prices that the user gives on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers import machine_types
from helpers.machine_types import MachineType, MachineTypeError
from helpers.memory.model_memory import SizingError

if TYPE_CHECKING:
    from helpers.sizing import Sizing


def table(sizings: Sequence[Sizing]) -> str:
    """A plain-text table of sizings, for a terminal."""
    header = [
        "model",
        "parameters",
        "weights",
        "convert: memory",
        "machine",
        "disk",
        "serve: memory",
        "machine",
    ]
    priced = any(sizing.cost_per_hour is not None for sizing in sizings)
    rows = [header + ["cost/hour"] * priced]
    for sizing in sizings:
        row = [
            sizing.model_name,
            f"{sizing.parameters:,}",
            f"{_gb(sizing.weights_bytes[sizing.dtype])} {sizing.dtype}",
            _gb(sizing.convert.memory_bytes),
            _machine(sizing.convert.machine),
            f"{sizing.convert.disk_gb} GB",
            _gb(sizing.serve.memory_bytes),
            _machine(sizing.serve.machine),
        ]
        cost = "-" if sizing.cost_per_hour is None else f"{sizing.cost_per_hour:.4g}"
        rows.append(row + [cost] * priced)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def _machine(machine: MachineType) -> str:
    gpu = f" + {machine.gpu_count} {machine.gpu} {machine.gpu_memory_gb} GB" if machine.gpu else ""
    return f"{machine.name} ({machine.memory_gb} GB{gpu})"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def parse_prices(prices: Sequence[str] | None) -> float | dict[str, float] | None:
    """Prices per hour, each ``PRICE`` or ``TYPE=PRICE``: one number, or a number for each machine type.

    Raises:
        MachineTypeError: no such machine type.
        SizingError: not a price.
    """
    if not prices:
        return None
    by_type = {}
    for text in prices:
        name, _, number = text.rpartition("=")
        try:
            by_type[machine_types.get(name).name if name else ""] = machine_types.cost(float(number))
        except MachineTypeError:
            raise
        except ValueError:
            raise SizingError(
                f"--price-per-hour {text}: give a number of at least 0, as 0.1 or TYPE=0.1."
            ) from None
    if "" in by_type and len(prices) > 1:
        raise SizingError("--price-per-hour: give one price, or TYPE=PRICE for each machine type.")
    return by_type.get("", by_type)
