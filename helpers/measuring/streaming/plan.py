"""Which machine, how many workers and which batches a stream needs, and what that costs: by simulation.

Each candidate is a machine with its service time, or the times of a running stream's batches, measured on it,
and its price. Workers are added until the
simulated queue keeps the latency asked for, at the mean rate and in a burst; of what does, the cheapest is
the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.measuring.streaming.arrivals import Phase, poisson_arrivals
from helpers.measuring.streaming.batch_times import BatchTimes
from helpers.measuring.streaming.changes import label_of
from helpers.measuring.streaming.queueing import percentile, simulate
from helpers.measuring.streaming.service_time import ServiceTime
from helpers.model_handler.options import AnsweringOptions

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MESSAGES = 3000
"""How many messages are simulated at the mean rate: enough for 150 beyond the 95th percentile."""

MOST_WORKERS = 100
LEAST_HINT, MOST_HINT = 0.1, 0.9  # the utilization hints that Dataflow accepts
MOST_LOAD = 0.9
"""The most of what workers can answer in full batches: nearer to all of it, latency is a matter of luck."""


class PlanError(ValueError):
    """A demand that no candidate meets; the message says how near the best one comes."""


@dataclass(frozen=True)
class Demand:
    """What is asked of a stream.

    Attributes:
        rate: messages a second, on average.
        prompt_tokens, response_tokens: of a message, on average.
        seconds: the latency that 95 of 100 messages must keep.
        peak_rate: messages a second in a burst; None for no bursts.
        peak_seconds: how long a burst lasts.

    Raises:
        ValueError: a number that cannot be.
    """

    rate: float
    prompt_tokens: int
    response_tokens: int
    seconds: float
    peak_rate: float | None = None
    peak_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("rate", "prompt_tokens", "response_tokens", "seconds", "peak_seconds", "peak_rate"):
            value = getattr(self, name)
            if name == "peak_rate" and value is None:
                continue
            _check_number(name, value)
        if self.peak_rate is not None and self.peak_rate < self.rate:
            raise ValueError(f"the peak of {self.peak_rate:g} a second is below the mean of {self.rate:g}.")


@dataclass(frozen=True)
class Candidate:
    """A machine that may serve.

    Attributes:
        machine_type: its name.
        service_time: as measured on it. That of an engine (`fit`) holds for prompts and responses of any
            length and batches of any size. That of a running stream (`measured_batch_times`) has in it
            all that is around the engine; it holds for prompts about as long as those that were measured, and
            for the batch size that they were measured with.
        price_per_hour: in whatever currency; the costs of a plan are in the same.
        options: the answering options that it was measured with, where they are not the defaults.

    Raises:
        ValueError: a price that is no number above 0.
    """

    machine_type: str
    service_time: ServiceTime | BatchTimes
    price_per_hour: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_number("price_per_hour", self.price_per_hour)

    def seconds(self, count: int, demand: Demand) -> float:
        """How long it takes for so many messages at once."""
        if isinstance(self.service_time, BatchTimes):
            return self.service_time.seconds(count, demand.response_tokens)
        return self.service_time.seconds([demand.prompt_tokens] * count, [demand.response_tokens] * count)

    def computing(self, demand: Demand) -> float:
        """The share of a batch's time in which the model computes, where that is known."""
        if isinstance(self.service_time, BatchTimes):
            return self.service_time.computing_share(demand.response_tokens)
        return 1.0

    @property
    def turnaround(self) -> float:
        """The seconds from the answers of a batch to taking the next one, where that is known."""
        return self.service_time.turnaround if isinstance(self.service_time, BatchTimes) else 0.0

    def draw(self, demand: Demand) -> Callable[[int], float]:
        """How long it may take: as `seconds`, with the spread that was measured, if there is one."""
        if isinstance(self.service_time, BatchTimes):
            return self.service_time.draw(response_tokens=demand.response_tokens)
        return lambda count: self.seconds(count, demand)

    def sizes(self, batch_sizes: Iterable[int]) -> list[tuple[int, int]]:
        """Pairs of a batch size to try, and of how many messages are then answered at once."""
        chosen = self.options.get("max_batch_size")
        if isinstance(self.service_time, BatchTimes):
            return [(chosen or AnsweringOptions.max_batch_size, self.service_time.most)]
        return [(size, size) for size in sorted({chosen} if chosen else set(batch_sizes))]


@dataclass(frozen=True)
class Plan:
    """What meets a demand.

    Attributes:
        machine_type: of each worker.
        options: the answering options, among them `max_batch_size`.
        least_workers: enough for the mean rate.
        most_workers: enough for a burst.
        latency: the simulated 95th percentile at the mean rate, in seconds.
        peak_latency: the same of messages that arrive in a burst; None without one.
        load: the mean rate as a share of what the least workers can answer, in full batches.
        busy: the share of their time in which the models of the least workers compute at the mean rate.
        cost_per_hour: of the least workers.
        cost_per_million_messages, cost_per_million_tokens: at the mean rate; prompts and responses count.
    """

    machine_type: str
    options: Mapping[str, Any]
    least_workers: int
    most_workers: int
    latency: float
    peak_latency: float | None
    load: float
    busy: float
    cost_per_hour: float
    cost_per_million_messages: float
    cost_per_million_tokens: float

    def arguments(self) -> dict[str, Any]:
        """The arguments of `helpers.dataflow.submit` that follow from it.

        Dataflow adds workers above a utilization of their processors, and takes some away below it. A worker
        that takes what waits is busy long before it is at its limit, so the hint is a tenth above what the
        mean rate needs, or the highest that Dataflow takes.
        """
        hint = min(max(self.busy + 0.1, LEAST_HINT), MOST_HINT)
        return {
            "machine_type": self.machine_type,
            "max_workers": self.most_workers,
            **self.options,
            "beam_options": [
                f"--num_workers={self.least_workers}",
                f"--dataflow_service_options=min_num_workers={self.least_workers}",
                f"--dataflow_service_options=worker_utilization_hint={hint:.1f}",
            ],
        }

    @property
    def _cost_with_most(self) -> float:
        return self.cost_per_hour / self.least_workers * self.most_workers

    def rows(self) -> list[dict[str, Any]]:
        """For a table."""
        burst = "–" if self.peak_latency is None else f"{self.peak_latency:.2f} s"
        values = {
            "machine": self.machine_type,
            "answering options": label_of(self.options),
            "workers, at least": self.least_workers,
            "workers, at most": self.most_workers,
            "95 % within, at the mean rate": f"{self.latency:.2f} s",
            "95 % within, in a burst, with all workers": burst,
            "load at the mean rate": f"{self.load:.0%}",
            "time in which the model computes": f"{self.busy:.0%}",
            "cost an hour": f"{self.cost_per_hour:.3g}",
            "cost an hour, with all workers": f"{self._cost_with_most:.3g}",
            "cost of a million messages": f"{self.cost_per_million_messages:.3g}",
            "cost of a million tokens": f"{self.cost_per_million_tokens:.3g}",
        }
        return [{"plan": name, "": value} for name, value in values.items()]


def make_plan(
    demand: Demand,
    candidates: Sequence[Candidate],
    *,
    batch_sizes: Iterable[int] = BATCH_SIZES,
    most_workers: int = MOST_WORKERS,
) -> Plan:
    """The cheapest way to meet a demand.

    Args:
        demand: what is asked for.
        candidates: machines with their service times and prices.
        batch_sizes: those that may be used, where the service time is an engine's.
        most_workers: how many there may be.

    Raises:
        PlanError: none meets it with so many workers.
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("there are no machines to choose from: measure a service time, and name its price.")
    found, nearest = [], math.inf
    for candidate in candidates:
        for batch_size, at_once in candidate.sizes(batch_sizes):
            try:
                found.append(_plan_for(demand, candidate, batch_size, at_once, most_workers))
            except _NotEnoughError as error:
                nearest = min(nearest, error.latency)
    if not found:
        limit = f"with up to {most_workers} workers"
        if nearest <= demand.seconds:  # fast enough, for as long as luck lasts
            raise PlanError(
                f"{demand.rate:g} messages a second would be more than {MOST_LOAD:.0%} of what a machine "
                f"that is fast enough answers {limit}: allow more of them, or measure a faster machine."
            )
        raise PlanError(
            f"No machine answers 95 of 100 messages within {demand.seconds:g} s {limit}: the best takes "
            f"{nearest:.2g} s. Allow more time or shorter responses, or measure a faster machine."
        )
    return min(found, key=lambda one: (one.cost_per_hour, one.most_workers, one.latency))


class _NotEnoughError(Exception):
    """All workers together are too slow; `latency` is the best that there was."""

    def __init__(self, latency: float) -> None:
        super().__init__(latency)
        self.latency = latency


@dataclass(frozen=True)
class _Trial:
    workers: int
    latency: float
    busy: float


def _plan_for(demand: Demand, candidate: Candidate, batch_size: int, at_once: int, most_workers: int) -> Plan:
    """The plan for a machine and a batch size."""

    def try_with(workers: int, times: list[float], begin: float, end: float) -> _Trial:
        """The latency of what arrives in a time."""
        draw = candidate.draw(demand)
        # What arrivals cost is left out: workers on Dataflow do not deliver the messages.
        found = simulate(
            times,
            lambda places: draw(len(places)),
            workers=workers,
            most=at_once,
            turnaround=candidate.turnaround,
        )
        pairs = zip(found.arrived, found.latencies, strict=True)
        chosen = [latency for when, latency in pairs if begin <= when < end]
        return _Trial(workers, percentile(chosen, 0.95) if chosen else 0.0, found.busy)

    # Messages a second, in full batches.
    most_of_one = at_once / (candidate.seconds(at_once, demand) + candidate.turnaround)
    steady = poisson_arrivals([Phase(demand.rate, MESSAGES / demand.rate)], random_state=1)
    least = _fewest(
        range(1, most_workers + 1),
        lambda workers: try_with(workers, steady, 0, math.inf),
        lambda trial: (
            trial.latency <= demand.seconds and demand.rate <= MOST_LOAD * trial.workers * most_of_one
        ),
    )
    most = None
    if demand.peak_rate is not None:
        begin, end = demand.peak_seconds, 2 * demand.peak_seconds
        around = Phase(demand.rate, demand.peak_seconds)
        bursting = poisson_arrivals(
            [around, Phase(demand.peak_rate, demand.peak_seconds), around], random_state=2
        )
        most = _fewest(
            range(least.workers, most_workers + 1),
            lambda workers: try_with(workers, bursting, begin, end),
            lambda trial: trial.latency <= demand.seconds,
        )
    per_hour = least.workers * candidate.price_per_hour
    per_message = per_hour / (3600 * demand.rate)
    return Plan(
        machine_type=candidate.machine_type,
        options={**candidate.options, "max_batch_size": batch_size},
        least_workers=least.workers,
        most_workers=(most or least).workers,
        latency=least.latency,
        peak_latency=most and most.latency,
        load=demand.rate / (least.workers * most_of_one),
        busy=least.busy * candidate.computing(demand),
        cost_per_hour=per_hour,
        cost_per_million_messages=per_message * 1e6,
        cost_per_million_tokens=per_message / (demand.prompt_tokens + demand.response_tokens) * 1e6,
    )


def _fewest(counts: range, try_with: Callable[[int], _Trial], is_enough: Callable[[_Trial], bool]) -> _Trial:
    """The trial with the fewest workers that are enough: more are never slower, so halving finds it.

    Raises:
        _NotEnoughError: not even the most are.
    """
    best = try_with(counts[-1])
    if not is_enough(best):
        raise _NotEnoughError(best.latency)
    while len(counts) > 1:
        middle = (len(counts) - 1) // 2
        if is_enough(trial := try_with(counts[middle])):
            best, counts = trial, counts[: middle + 1]
        else:
            counts = counts[middle + 1 :]
    return best


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: it must be a number above 0.")
