"""Sizings as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers.sizing.machine_types import MachineType

if TYPE_CHECKING:
    from helpers.sizing.sizes import Sizing


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
