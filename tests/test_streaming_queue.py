"""The simulated queue against closed forms, and the fit of service times against known ones."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.measuring.streaming import (
    Observed,
    Phase,
    ServiceTime,
    fit,
    poisson_arrivals,
    simulate,
)
from helpers.measuring.streaming.queueing import percentile

SECONDS = 40_000


def erlang_c(workers: int, load: float) -> float:
    """The probability that a message waits, in M/M/k; `load` is the rate times the mean service time."""
    top = load**workers / math.factorial(workers) * workers / (workers - load)
    return top / (sum(load**n / math.factorial(n) for n in range(workers)) + top)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_worker_with_a_constant_time_waits_as_pollaczek_and_khinchine_say(load):
    """M/D/1: the mean wait is load · service / (2 · (1 - load))."""
    times = poisson_arrivals([Phase(load, SECONDS)], random_state=1)
    found = simulate(times, lambda places: 1.0, most=1)
    waits = [latency - 1.0 for latency in found.latencies]
    assert statistics.mean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.08)
    assert found.busy == pytest.approx(load, rel=0.03)


@pytest.mark.parametrize(("workers", "load"), [(1, 0.7), (3, 2.0), (8, 6.0)])
def test_several_workers_wait_as_erlang_says(workers, load):
    """M/M/k: the mean wait is Erlang's C times service / (k - load); a share of waits is exponential."""
    generator = random.Random(2)
    times = poisson_arrivals([Phase(load, SECONDS / load)], random_state=3)
    taken = [generator.expovariate(1.0) for _ in times]
    found = simulate(times, lambda places: taken[places[0]], workers=workers, most=1)
    waits = [latency - own for latency, own in zip(found.latencies, taken, strict=True)]
    waiting = erlang_c(workers, load)
    assert statistics.mean(waits) == pytest.approx(waiting / (workers - load), rel=0.15)
    assert sum(wait > 1e-9 for wait in waits) / len(waits) == pytest.approx(waiting, rel=0.06)
    # The wait that 95 % do not exceed, from its exponential tail.
    expected = math.log(waiting / 0.05) / (workers - load)
    assert percentile(waits, 0.95) == pytest.approx(expected, rel=0.15)


def test_larger_batches_raise_the_rate_above_one_at_a_time():
    times = poisson_arrivals([Phase(8.0, 500)], random_state=4)

    def seconds_of(places):
        return 0.2 + 0.01 * len(places)

    alone, together = (simulate(times, seconds_of, most=most) for most in (1, 32))
    assert alone.rate < 5
    assert together.rate == pytest.approx(8.0, rel=0.05)
    assert together.latency(0.95) < 1 < alone.latency(0.95)
    assert max(together.batches) > 2


def test_a_burst_drains_in_the_time_that_its_rates_say():
    """From 1 to 10 a second for 20 s, answered at 5 a second: 100 are left, which go at 5 - 1 a second."""
    times = poisson_arrivals([Phase(1, 100), Phase(10, 20), Phase(1, 200)], random_state=5)
    found = simulate(times, lambda places: 0.2 * len(places), most=8)
    backlog = found.waiting_at(120)
    assert 70 < backlog < 130
    empty = next(when for when in (120 + n / 10 for n in range(2000)) if found.waiting_at(when) == 0)
    assert empty - 120 == pytest.approx(backlog / 4, rel=0.3)
    assert found.drained_at(120) <= empty


@given(
    gaps=st.lists(st.floats(0, 2), max_size=60),
    workers=st.integers(1, 4),
    most=st.integers(1, 9),
    times=st.tuples(st.floats(0, 1), st.floats(0, 0.5)),
)
def test_each_message_is_answered_once_after_it_arrived(gaps, workers, most, times):
    arrived, now = [], 0.0
    for gap in gaps:
        arrived.append(now := now + gap)
    seen = []

    def seconds_of(places):
        seen.extend(places)
        return times[0] + times[1] * len(places)

    found = simulate(arrived, seconds_of, workers=workers, most=most)
    assert sorted(seen) == list(range(len(gaps)))
    assert all(latency >= times[0] - 1e-9 for latency in found.latencies)
    assert max(found.batches, default=0) <= most
    assert 0 <= found.busy <= 1 + 1e-9


def test_a_known_service_time_is_found_again_through_noise():
    true = ServiceTime(0.05, 0.0002, 0.02, 0.001)
    generator = random.Random(6)
    batches = []
    for _ in range(200):
        size = generator.randint(1, 32)
        prompts = [generator.randint(5, 60) for _ in range(size)]
        responses = [generator.randint(1, 48) for _ in range(size)]
        seconds = true.seconds(prompts, responses) * generator.gauss(1, 0.05)
        batches.append(Observed(sum(prompts), max(responses), sum(responses), seconds))
    found = fit(batches)
    assert found.error < 0.06
    for size in (1, 8, 32):
        prompts, responses = [30] * size, [32] * size
        assert found.seconds(prompts, responses) == pytest.approx(true.seconds(prompts, responses), rel=0.05)


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [Observed(10, 4, 8, 0.1)] * 20,
        # All responses are as long as may be: a step is a part of a batch, and a token of a prompt.
        [Observed(30 * n, 32, 32 * n, 0.1 + 0.02 * n) for n in range(1, 9)],
    ],
)
def test_batches_that_are_too_alike_tell_no_service_time(batches):
    with pytest.raises(ValueError, match="do not tell"):
        fit(batches)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_that_cannot_be_are_refused(seconds):
    with pytest.raises(ValueError, match="cannot be"):
        Observed(1, 1, 1, seconds)
    if seconds:
        with pytest.raises(ValueError, match="cannot be"):
            simulate([0.0], lambda places: seconds)


def test_percentiles_are_nearest_ranks_for_every_share():
    for share in range(1, 101):
        assert percentile(range(1, 101), share / 100) == share
    assert simulate([0.0], lambda places: 1.0).drained_at(100) == 100


@pytest.mark.parametrize(
    "values", [(-1, 1), (1, 0), (math.nan, 1), (math.inf, 1), ("fast", 1), (True, 1), (10**400, 1)]
)
def test_rates_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError):
        Phase(*values)
    with pytest.raises(ValueError, match="more than"):
        poisson_arrivals([Phase(10**6, 6), Phase(10**6, 6)])


def test_the_arrivals_of_a_seed_are_the_same_and_have_their_rate():
    phases = [Phase(50, 100), Phase(0, 10), Phase(5, 100)]
    times = poisson_arrivals(phases, random_state=7)
    assert times == poisson_arrivals(phases, random_state=7) != poisson_arrivals(phases, random_state=8)
    assert times == sorted(times)
    assert not [time for time in times if 100 <= time < 110]
    assert sum(time < 100 for time in times) == pytest.approx(5000, rel=0.06)
    gaps = [b - a for a, b in itertools.pairwise(times) if b < 100]
    assert statistics.stdev(gaps) == pytest.approx(
        statistics.mean(gaps), rel=0.06
    )  # as exponential gaps have


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"most": 0}])
def test_queues_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError):
        simulate([0.0], lambda places: 1.0, **arguments)
    with pytest.raises(ValueError, match="order"):
        simulate([1.0, 0.0], lambda places: 1.0)
    with pytest.raises(ValueError):
        percentile([], 0.5)
