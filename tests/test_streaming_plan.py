"""A plan is the cheapest that the simulated queue says is enough."""

import math
from dataclasses import replace

import pytest

from helpers.measuring.streaming import BatchTimes, Candidate, Demand, PlanError, ServiceTime, make_plan

# A batch takes 0.1 s, and 0.01 s for each of its prompts (32 tokens in, 16 out).
SERVICE = ServiceTime(per_batch=0.1, per_prompt_token=0.01 / 32, per_step=0.0, per_token=0.0)
SMALL = Candidate("small", SERVICE, 0.10)
# Twice as fast, at 2.5 times the price.
LARGE = Candidate("large", ServiceTime(0.05, 0.005 / 32, 0.0, 0.0), 0.25)
# A running stream that answers at most 50 messages a second.
STREAM = Candidate("stream", BatchTimes((1.0, 10.0), (0.1, 0.2), most=10, response_tokens=16), 0.10)


def demand(**values) -> Demand:
    return Demand(**{"rate": 10.0, "prompt_tokens": 32, "response_tokens": 16, "seconds": 1.0} | values)


def test_batches_save_workers_and_the_cost_follows():
    together = make_plan(demand(rate=40.0), [SMALL])
    alone = make_plan(demand(rate=40.0), [SMALL], batch_sizes=[1])
    assert together.least_workers == 1
    # One at a time, a worker answers 1 / 0.11 a second; it may work for nine tenths of its time.
    assert alone.least_workers == math.ceil(40 * 0.11 / 0.9)
    assert alone.cost_per_hour == pytest.approx(alone.least_workers * 0.10)
    assert alone.cost_per_million_messages == pytest.approx(alone.cost_per_hour / (3600 * 40) * 1e6)
    assert alone.cost_per_million_tokens == pytest.approx(alone.cost_per_million_messages / 48)
    assert alone.load == pytest.approx(40 * 0.11 / alone.least_workers)
    assert max(alone.load, together.load) <= 0.9
    assert max(together.latency, alone.latency) <= 1.0


def test_the_cheaper_machine_is_chosen_unless_it_is_too_slow():
    assert make_plan(demand(), [LARGE, SMALL]).machine_type == "small"
    assert make_plan(demand(seconds=0.1), [LARGE, SMALL]).machine_type == "large"


def test_a_burst_needs_more_workers_for_its_time_alone():
    without = make_plan(demand(rate=5.0), [SMALL])
    found = make_plan(demand(rate=5.0, peak_rate=500.0), [SMALL])
    assert found.least_workers == without.least_workers == without.most_workers
    assert found.most_workers > found.least_workers
    assert found.peak_latency <= 1.0
    assert without.peak_latency is None
    assert found.cost_per_hour == without.cost_per_hour


def test_what_follows_goes_to_submit():
    from inspect import signature

    from helpers.dataflow import submit

    arguments = make_plan(demand(), [SMALL]).arguments()
    assert arguments.keys() <= signature(submit).parameters.keys()
    assert arguments["machine_type"] == "small"


def test_a_running_streams_times_make_a_plan_too():
    # A batch of n takes 0.1 + 0.01 n.
    times = BatchTimes((1, 64), (0.11, 0.74), most=64, response_tokens=16)
    stream = Candidate("small", times, 0.10, {"max_batch_size": 8, "engine": "ctranslate2"})
    found = make_plan(demand(rate=40.0), [stream])
    assert found.options == {"max_batch_size": 8, "engine": "ctranslate2"}
    assert found.load == pytest.approx(40 * 0.74 / 64 / found.least_workers)
    arguments = found.arguments()
    assert arguments["engine"] == "ctranslate2"
    assert f"--dataflow_service_options=min_num_workers={found.least_workers}" in arguments["beam_options"]
    # Turning round is part of the cycle.
    slower = Candidate("small", replace(times, turnaround=0.74), 0.10)
    turning = make_plan(demand(rate=40.0), [slower])
    assert turning.load * turning.least_workers == pytest.approx(40 * 1.48 / 64)
    # Twice the tokens take twice the time.
    longer = make_plan(demand(rate=40.0, response_tokens=32), [stream])
    assert longer.load * longer.least_workers == pytest.approx(2 * found.load * found.least_workers)
    # With the default options, the batch size is the default too.
    assert make_plan(demand(), [Candidate("small", times, 0.1)]).options == {"max_batch_size": 32}


def test_the_hint_is_one_that_dataflow_takes():
    for busy, hint in ((0.0, "0.1"), (0.35, "0.4"), (0.97, "0.9")):
        options = replace(make_plan(demand(), [SMALL]), busy=busy).arguments()["beam_options"]
        assert f"--dataflow_service_options=worker_utilization_hint={hint}" in options


def test_the_table_says_what_it_costs():
    rows = {row["plan"]: row[""] for row in make_plan(demand(), [SMALL]).rows()}
    assert rows["machine"] == "small"
    assert rows["cost an hour"] == "0.1"
    assert rows["95 % within, in a burst, with all workers"] == "–"


def test_a_target_that_no_machine_meets_says_how_near_the_best_comes():
    with pytest.raises(PlanError, match=r"within 0.01 s with up to 100 workers: the best takes 0.055 s"):
        make_plan(demand(seconds=0.01), [SMALL, LARGE])
    with pytest.raises(PlanError, match="up to 2 workers: the best takes"):
        make_plan(demand(rate=1000.0), [SMALL], most_workers=2)
    # Nearly all of what two workers answer: fast enough in so short a simulation, and not for long.
    with pytest.raises(PlanError, match="more than 90% of what a machine that is fast enough answers with"):
        make_plan(demand(rate=95.0, seconds=20.0), [STREAM], most_workers=2)


def test_busy_is_the_time_in_which_the_model_computes():
    whole = make_plan(demand(), [STREAM])
    half = make_plan(demand(), [replace(STREAM, service_time=replace(STREAM.service_time, computing=0.5))])
    assert half.busy == pytest.approx(whole.busy / 2)
    # Of longer responses, more is computed.
    times = BatchTimes((1.0,), (0.1,), most=1, response_tokens=16, computing=0.5)
    longer = make_plan(demand(rate=1.0, response_tokens=64), [replace(STREAM, service_time=times)])
    assert longer.busy == pytest.approx(0.25 * 0.8, rel=0.1)


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 0},
        {"rate": "10"},
        {"rate": math.nan},
        {"seconds": -1},
        {"response_tokens": 0},
        {"peak_rate": 5.0},
        {"peak_seconds": math.inf},
    ],
)
def test_demands_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError):
        demand(**values)


@pytest.mark.parametrize("price", ["0.1", None, 0, -1, math.nan, True])
def test_prices_that_are_no_numbers_are_refused(price):
    with pytest.raises(ValueError, match="price_per_hour"):
        Candidate("n4-standard-2", SERVICE, price)
    with pytest.raises(ValueError, match="no machines"):
        make_plan(demand(), [])
