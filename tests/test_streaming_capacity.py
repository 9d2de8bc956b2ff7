"""From when answers come follow the times of batches, and from these what the stream does at other rates."""

import math
import statistics
from dataclasses import fields, replace

import pytest

from helpers.dataflow import Distribution
from helpers.measuring.streaming import (
    BatchTimes,
    Phase,
    Point,
    Record,
    Records,
    Result,
    compare,
    highest_rate,
    measured_batch_times,
    most_rate,
    off_by,
    poisson_arrivals,
    predict_points,
    predict_rates,
    predicted_curve,
    read_result,
    simulate,
    simulate_stream,
    start_up,
    volleys,
)

TRUE = {1: 0.27, 2: 0.47, 3: 0.5}


def seconds_of(places) -> float:
    return TRUE.get(len(places), 0.5 + 0.01 * len(places))


def point(messages: list[Record], **values) -> Point:
    """What a sweep makes of messages; the numbers that no test here is about are 0."""
    zeros = {field.name: 0 for field in fields(Point)}
    return Point(**zeros | values | {"records": Records(messages, 0)})


def run(rate: float, seconds: float, random_state: int) -> list[Record]:
    """A stream whose batches take the true times."""
    times = poisson_arrivals([Phase(rate, seconds)], random_state)
    answered = simulate(times, seconds_of, most=32).answered
    attributes = {"response_tokens": "16"}
    return [
        Record(when, when, then, attributes=attributes) for when, then in zip(times, answered, strict=True)
    ]


@pytest.fixture(scope="module")
def measured() -> BatchTimes:
    points = [point(run(rate, 120, 9), batches=100, batch_seconds=0.3) for rate in (1.0, 4.0, 9.0, 60.0)]
    return measured_batch_times(points)


def test_batch_times_are_found_again_from_when_answers_come(measured):
    for size in (1, 2, 6, 12, 24, 32):
        assert measured.seconds(size) == pytest.approx(seconds_of(range(size)), rel=0.05), size
    assert measured.most == 32
    assert measured.response_tokens == 16


def test_they_predict_rates_that_were_not_measured(measured):
    for rate in (2.0, 6.0, 20.0):
        [predicted] = predict_rates(measured, [rate], seconds=300, random_state=10)
        expected = Records(run(rate, 300, 10), 0)
        assert predicted.answered == pytest.approx(expected.rate, rel=0.03)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            assert getattr(predicted, name) == pytest.approx(expected.latency(share), rel=0.15), name


def test_what_was_measured_is_predicted_from_its_own_arrivals(measured):
    points = [point(run(rate, 60, 4), offered=rate) for rate in (2.0, 9.0)]
    for one, found in zip(predict_points(measured, points), points, strict=True):
        assert one.offered == found.offered
        assert one.p95 == pytest.approx(found.records.latency(0.95), rel=0.15)
    with pytest.raises(ValueError, match="records"):
        predict_points(measured, [point([])])


def test_they_predict_how_long_a_burst_takes_to_drain(measured):
    times = poisson_arrivals([Phase(6.0, 20), Phase(60.0, 20), Phase(6.0, 40)], random_state=11)
    expected = simulate(times, seconds_of, most=32)
    predicted = simulate_stream(measured, times)
    assert expected.drained_at(40) > 45
    assert predicted.drained_at(40) - 40 == pytest.approx(expected.drained_at(40) - 40, rel=0.1)


def test_times_between_and_beyond_what_was_measured():
    times = BatchTimes((2, 4, 8), (0.2, 0.3, 0.7), most=8)
    assert [times.seconds(size) for size in (1, 2, 3, 4, 6, 8)] == pytest.approx(
        [0.2, 0.2, 0.25, 0.3, 0.5, 0.7]
    )
    assert times.seconds(16) == pytest.approx(1.4)
    assert most_rate(times) == pytest.approx(8 / 0.7)
    assert most_rate(times, workers=3) == pytest.approx(24 / 0.7)


def test_other_response_lengths_change_the_computed_part_of_the_time():
    times = BatchTimes((1,), (1.0,), most=1, response_tokens=16, computing=0.8)
    assert times.seconds(1, 16) == pytest.approx(1.0)
    assert times.seconds(1, 32) == pytest.approx(1.8)
    assert times.seconds(1, 8) == pytest.approx(0.6)
    assert replace(times, response_tokens=0.0).seconds(1, 32) == 1.0, "nothing is known of tokens"


def test_the_share_that_is_computed_is_what_the_job_counted_of_the_time(measured):
    # A message every second, answered in half a second, of which the model computed 0.3 s.
    messages = [Record(float(n), float(n), n + 0.5) for n in range(10)]
    found = measured_batch_times([point(messages, batches=10, batch_seconds=0.3)])
    assert found.computing == pytest.approx(0.6)
    # Of a run that is no point of a sweep, nothing is known of batches.
    with_records = measured_batch_times(
        [point(messages, batches=10, batch_seconds=0.3), Records(messages, 0)]
    )
    assert with_records == found
    assert found.seconds(1) == pytest.approx(0.5)


def test_what_arrivals_cost_is_found_again():
    """A batch takes 10 ms longer for each message that arrives meanwhile."""
    runs = []
    for rate, last in ((2.0, 60), (8.0, 60), (20.0, 30), (60.0, 15)):
        arrived = poisson_arrivals([Phase(rate, last)], random_state=12)
        answered = simulate(arrived, seconds_of, most=32, per_arrival=0.01).answered
        messages = [Record(when, when, then) for when, then in zip(arrived, answered, strict=True)]
        runs.append(Records(messages, 0))
    found = measured_batch_times(runs)
    assert found.per_arrival == pytest.approx(0.01, abs=0.0021)
    assert found.seconds(1) == pytest.approx(0.27, rel=0.05)
    assert found.seconds(32) == pytest.approx(0.82, rel=0.08)
    # At the most, 32 arrive while 32 are answered.
    assert most_rate(found) == pytest.approx(32 / (0.82 + 0.32), rel=0.08)
    with pytest.raises(ValueError, match="arrival"):
        simulate([0.0], seconds_of, per_arrival=-1.0)


def turning(rate: float, seconds: float) -> list[Record]:
    """A stream whose worker takes the next batch 60 ms after the answers of the one before."""
    arrived = poisson_arrivals([Phase(rate, seconds)], random_state=13)
    answered = simulate(arrived, seconds_of, most=32, turnaround=0.06).answered
    return [Record(when, when, then) for when, then in zip(arrived, answered, strict=True)]


def test_the_turnaround_is_found_again():
    runs = [Records(turning(rate, 60), 0) for rate in (2.0, 8.0, 20.0)]
    found = measured_batch_times(runs)
    assert found.turnaround == pytest.approx(0.06, abs=0.01)
    for size in (1, 2, 12):
        assert found.seconds(size) == pytest.approx(seconds_of(range(size)), rel=0.05), size
    assert most_rate(replace(found, turnaround=0.5)) < most_rate(found)
    # What a full batch leaves behind says nothing of when the next is taken.
    full = [Records(turning(2.0, 30), 0), Records(turning(90.0, 15), 0)]
    assert measured_batch_times(full).turnaround == pytest.approx(0.06, abs=0.012)
    # A worker that turns round at once is seen to.
    assert measured_batch_times([Records(run(8.0, 60, 13), 0)]).turnaround == pytest.approx(0.0, abs=0.005)
    with pytest.raises(ValueError, match="turn round"):
        simulate([0.0], seconds_of, turnaround=-1.0)


def test_a_message_that_comes_in_the_turnaround_is_in_the_next_batch():
    # The first is answered at 1.0; the second, at 1.05, goes with the one that waited since 0.5.
    found = simulate([0.0, 0.5, 1.05, 1.2], lambda places: 1.0, most=8, turnaround=0.1)
    assert found.answered == pytest.approx([1.0, 2.1, 2.1, 3.2])
    assert found.batches == [1, 2, 1]


def test_single_batches_vary_as_they_did():
    # Of twenty, one took three times as long.
    messages = [Record(float(n), float(n), n + (0.6 if n % 20 == 0 else 0.2)) for n in range(400)]
    found = measured_batch_times([point(messages)])
    draw = found.draw()
    drawn = [draw(1) for _ in range(2000)]
    assert statistics.median(drawn) == pytest.approx(0.2)
    assert max(drawn) > 0.3
    # No factor is beyond what was seen, however few batches there were.
    few = measured_batch_times([point([Record(0.0, 0.0, 0.1), Record(5.0, 5.0, 9.0)])])
    assert 0.1 < min(few.spread) < max(few.spread) < 4.0
    again = found.draw()
    assert [again(1) for _ in range(2000)] == drawn, "the same state draws the same"


@pytest.mark.parametrize("target", [0.25, 0.5, 2.0])
def test_the_highest_rate_keeps_the_target_and_a_higher_one_does_not(target):
    """M/D/1 with a service of 0.1 s."""
    times = BatchTimes((1.0,), (0.1,), most=1)
    rate = highest_rate(times, target)

    def p95(at: float) -> float:
        arrived = poisson_arrivals([Phase(at, 20_000 / at)], random_state=3)
        return simulate_stream(times, arrived).latency(0.95)

    assert p95(0.85 * rate) < target
    assert rate > 9.5 or p95(1.1 * rate) > target
    assert rate < most_rate(times)


def test_a_target_below_the_time_of_one_message_is_kept_at_no_rate():
    times = BatchTimes((1.0,), (0.1,), most=1)
    assert highest_rate(times, 0.05) == 0
    for nonsense in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            highest_rate(times, nonsense)


def test_a_target_that_the_median_keeps_but_not_the_slowest_is_kept_at_no_rate():
    times = BatchTimes((1.0,), (0.1,), most=1, spread=(0.5, 1.0, 1.0, 3.0))
    assert highest_rate(times, 0.2) == 0
    # A tight target is found to a hundredth, too: at a rate of r a second, of M/D/1's messages r / 10 wait.
    tight = highest_rate(BatchTimes((1.0,), (0.1,), most=1), 0.11)
    assert 0.4 < tight < 0.7
    assert highest_rate(times, 0.8) > 0


def test_dead_letters_are_neither_answers_nor_batches():
    dead = [Record(float(n), float(n), n + 0.01, is_dead=True) for n in range(20)]
    alive = [Record(n + 0.3, n + 0.3, n + 0.8) for n in range(20)]
    with pytest.raises(ValueError, match="no message was answered"):
        measured_batch_times([Records(dead, 0)])
    both = sorted([*dead, *alive], key=lambda one: one.sent)
    assert measured_batch_times([Records(both, 0)]).seconds(1) == pytest.approx(0.5)
    refused = point(dead, offered=1.0, published=20, dead_letters=20)
    assert not refused.keeps_up
    assert not point([Record(0.0, 0.0)], offered=1.0, published=1, waiting=1).keeps_up


def test_predictions_stand_beside_what_was_measured(measured):
    points = [point(run(rate, 30, 4), offered=rate, answered=rate, p95=1.0) for rate in (2.0, 9.0)]
    rows = compare(predict_rates(measured, [2.0, 9.0, 20.0], seconds=30), points)
    assert [row["messages a second"] for row in rows] == [2.0, 9.0], "the sweep ended early"
    assert rows[0]["p95, off by"] == off_by(rows[0]["p95 (s), predicted"], 1.0)
    assert [
        off_by(*pair) for pair in ((1.1, 1.0), (0.5, 1.0), (1.0, math.inf), (math.inf, 1.0), (1.0, 0))
    ] == [
        "+10%",
        "-50%",
        "–",
        "–",
        "–",
    ]


def test_the_curve_rises_to_nearly_the_most(measured):
    curve = predicted_curve(measured)
    assert curve[-1].offered == pytest.approx(0.95 * most_rate(measured), rel=0.1)
    assert curve[-1].p95 > 3 * curve[0].p95
    assert all(one.p50 <= one.p95 <= one.p99 for one in curve)


def test_what_cannot_be_is_refused(measured):
    with pytest.raises(ValueError, match="no message was answered"):
        measured_batch_times([point([Record(0.0, 0.0)]), point([])])
    for sizes, times in (((), ()), ((1,), (0.1, 0.2)), ((2, 1), (0.1, 0.2)), ((1,), (0.0,)), ((0,), (1.0,))):
        with pytest.raises(ValueError):
            BatchTimes(sizes, times, most=1)
    for wrong in (
        {"times": (math.nan,)},
        {"spread": (math.nan,)},
        {"spread": ()},
        {"per_arrival": math.nan},
        {"turnaround": math.inf},
        {"most": 0},
    ):
        with pytest.raises(ValueError):
            BatchTimes(**{"sizes": (1,), "times": (0.1,), "most": 1} | wrong)
    with pytest.raises(ValueError, match="send for longer"):
        predict_rates(measured, [0.001], seconds=1)
    for sizes, apart in (([0], 1), ([1], 0), ([1], math.nan)):
        with pytest.raises(ValueError):
            volleys(sizes, apart)
    assert volleys([1, 3], 0.5) == [0.0, 0.5, 0.5, 0.5]


def test_a_run_that_keeps_up_sustains_the_offered_rate_and_one_that_does_not_less():
    steady = Records(run(6.0, 15, 1), 0)
    assert steady.sustained == pytest.approx(len(steady.messages) / 15, rel=0.07)
    late = Records(run(60.0, 15, 1), 0)
    assert late.sustained < 0.85 * len(late.messages) / 15
    assert Records([Record(0.0, 0.0)], 0).sustained == 0


def test_what_waits_and_when_it_is_gone():
    found = Records([Record(0.0, 0.0, 1.0), Record(0.5, 0.5, 3.0, is_dead=True), Record(4.0, 4.0, 5.0)], 0)
    assert [found.waiting_at(when) for when in (0.2, 0.7, 2.0, 3.5, 4.5, 6.0)] == [1, 2, 1, 0, 1, 0]
    assert found.drained_at(1.0) == 3.0
    assert Records([Record(0.0, 0.0)], 0).drained_at(1.0) == math.inf


def test_a_result_comes_back_as_it_was_kept(tmp_path, measured):
    points = [point([], offered=4.0, p95=0.5), point([], offered=8.0, p95=math.inf)]
    result = Result("a machine", "a model", {"max_response_tokens": 16}, points, measured)
    path = tmp_path / "result.json"
    for _ in range(2):  # in place of what is there
        result.save(path)
    assert read_result(path) == result
    assert "Infinity" not in path.read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [{}]}', '{"points": 1}'])
def test_another_file_is_no_result(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no result of a sweep"):
        read_result(path)


def test_a_result_comes_with_the_helpers():
    saved = read_result()
    assert saved.machine
    assert len(saved.points) >= 5
    assert any(not one.keeps_up for one in saved.points)


class Started:
    """Stands in for a job that has answered one message, and counts it only when asked again."""

    asked = 0

    def counters(self):
        self.asked += 1
        done = {"models_loaded": 1, "fetch_milliseconds": 500, "load_milliseconds": 2000}
        return done if self.asked > 1 else {}

    def distributions(self):
        return {"batch_milliseconds": Distribution(1, 400, 400, 400)}


def test_the_time_to_the_first_answer_has_parts():
    parts = start_up(Started(), submitted=10.0, running=14.0, answered=17.0)
    assert list(parts.values()) == pytest.approx([4.0, 0.5, 1.5, 0.4, 0.6])
    assert sum(parts.values()) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="order"):
        start_up(Started(), submitted=10.0, running=9.0, answered=17.0)
