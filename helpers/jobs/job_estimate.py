"""What a job costs, before it is launched: workers × price × hours."""

from __future__ import annotations

from dataclasses import dataclass

from helpers import machine_types
from helpers.jobs.job_options import MAX_WORKERS


@dataclass(frozen=True)
class Estimate:
    """What a job costs at least and at most, in the currency of the price.

    It counts machines by the hour. Disks, Streaming Engine, Pub/Sub and Cloud Storage come on top.
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
        machine_type: of the workers.
        price_per_hour: of one, as the reader's price list has it.
        hours: that the job runs.
        least_workers, most_workers: between which Dataflow may choose.

    Raises:
        ValueError: a negative price or time, or fewer workers at most than at least.
    """
    if not 1 <= least_workers <= most_workers:
        raise ValueError(f"From {least_workers} to {most_workers} workers: give at least 1, in this order.")
    low, high = (machine_types.cost(price_per_hour, hours, n) for n in (least_workers, most_workers))
    return Estimate(machine_type, hours, (least_workers, most_workers), (low, high))
