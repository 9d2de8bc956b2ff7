"""Estimates what a job costs before it is launched: workers × price × hours."""

from __future__ import annotations

from dataclasses import dataclass

from helpers.dataflow.job_options import MAX_WORKERS
from helpers.sizing import machine_types


@dataclass(frozen=True)
class Estimate:
    """The least and the most that a job costs, in the currency of the price.

    It counts machine hours only. Disks, Streaming Engine, Pub/Sub and Cloud Storage are extra.
    """

    machine_type: str
    hours: float
    workers: tuple[int, int]
    cost: tuple[float, float]

    def __str__(self) -> str:
        (least, most), (low, high) = self.workers, self.cost
        many = f"{least} to {most} workers" if least != most else f"{least} worker{'s' * (least != 1)}"
        much = f"{low:.2f} to {high:.2f}" if low != high else f"{low:.2f}"
        return f"{many} of {self.machine_type} for {self.hours:g} h: {much} in the price's currency"


def estimate(
    machine_type: str,
    price_per_hour: float,
    *,
    hours: float,
    least_workers: int = 1,
    most_workers: int = MAX_WORKERS,
) -> Estimate:
    """What a job costs: workers × price × hours.

    Args:
        machine_type: the workers' machine type.
        price_per_hour: the price of one worker, from the reader's price list.
        hours: how long the job runs.
        least_workers, most_workers: the range in which Dataflow may scale.

    Raises:
        ValueError: a negative price or time, no workers, or `most_workers` below `least_workers`.
    """
    if not 1 <= least_workers <= most_workers:
        raise ValueError(f"From {least_workers} to {most_workers} workers: give at least 1, smaller first.")
    low, high = (machine_types.cost(price_per_hour, hours, n) for n in (least_workers, most_workers))
    return Estimate(machine_type, hours, (least_workers, most_workers), (low, high))
