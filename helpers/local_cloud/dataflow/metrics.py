"""The user metrics of a Dataflow job, summed over the batches that report them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from google.cloud.dataflow_v1beta3.types import metrics as types
from google.protobuf import json_format

_Key = tuple[str, str, str]  # namespace, name, step
_Value = float | dict[str, float]  # a counter, or a distribution's count, sum, min and max


class UserMetrics:
    """Counters and distributions. Not thread-safe: the caller must lock."""

    def __init__(self) -> None:
        self._totals: dict[_Key, _Value] = {}

    def add(self, reported: Iterable[dict[str, Any]]) -> None:
        """Adds what a batch or a job has counted: dicts of namespace, name, step and value."""
        for metric in reported:
            key = (metric["namespace"], metric["name"], metric["step"])
            value = metric["value"]
            self._totals[key] = _sum(self._totals[key], value) if key in self._totals else value

    def updates(self) -> list[Any]:
        """The MetricUpdates of a JobMetrics: Beam's client wants each value both committed and tentative."""
        items = [*self._totals.items(), *self._derived()]
        return [_update(*item, tentative) for item in items for tentative in (False, True)]

    def _derived(self) -> Iterator[tuple[_Key, float]]:
        """The scalars that the service adds to each distribution."""
        for (namespace, name, step), value in self._totals.items():
            if isinstance(value, dict):
                mean = value["sum"] / value["count"] if value["count"] else 0.0
                parts = {"MIN": value["min"], "MAX": value["max"], "MEAN": mean, "COUNT": value["count"]}
                for suffix, part in parts.items():
                    yield (namespace, f"{name}_{suffix}", step), part


def _sum(total: _Value, value: _Value) -> _Value:
    if not isinstance(value, dict):
        return total + value
    return {
        "count": total["count"] + value["count"],
        "sum": total["sum"] + value["sum"],
        "min": min(total["min"], value["min"]),
        "max": max(total["max"], value["max"]),
    }


def _update(key: _Key, value: _Value, tentative: bool) -> Any:
    namespace, name, step = key
    update = types.MetricUpdate.pb()()
    update.name.origin = "user"
    update.name.name = name
    update.name.context.update({"namespace": namespace, "step": step})
    if tentative:
        update.name.context["tentative"] = "true"
    update.cumulative = True
    update.update_time.GetCurrentTime()
    if isinstance(value, dict):
        update.kind = "Distribution"
        json_format.ParseDict(value, update.distribution)
    else:
        update.scalar.number_value = value
    return update
