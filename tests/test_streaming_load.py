"""Load keeps its schedule and loses nothing; what it measures is what the simulated queue predicts."""

import json
import math
import threading
import time
import uuid

import pytest
from google.api_core.exceptions import ServiceUnavailable
from google.cloud import pubsub_v1

from helpers import dataflow, pubsub
from helpers.dataflow import Distribution
from helpers.measuring.__main__ import main
from helpers.measuring.streaming import (
    NotAnsweredError,
    Phase,
    Record,
    Records,
    SendingError,
    SweepError,
    knee,
    measure_changes,
    most_rate,
    poisson_arrivals,
    send_load,
    simulate,
    sweep_rates,
    warm_up,
)
from helpers.measuring.streaming import changes as changes_module
from helpers.measuring.streaming import load as load_module
from helpers.measuring.streaming import sweep as sweep_module


@pytest.fixture
def topics(cloud):
    """The paths of a stream's topics and of subscriptions to them."""
    run = uuid.uuid4().hex[:8]
    paths = {}
    for name in ("messages", "responses", "dead"):
        paths[name] = pubsub.create_topic(cloud.project, f"{name}-{run}")
        paths[f"{name}-subscription"] = pubsub.create_subscription(paths[name], f"{name}-{run}")
    yield paths
    pubsub.delete(*paths.values())


class Job:
    """Stands in for a job: takes what waits, up to so many, needs a known time for it, and answers it."""

    def __init__(self, paths, seconds_of, most, dies_after=float("inf")):
        self._paths, self._seconds_of, self._most = paths, seconds_of, most
        self._left = dies_after
        self.has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.has_ended.set()
        self._thread.join(10)

    def _run(self):
        publisher = pubsub_v1.PublisherClient()
        with pubsub_v1.SubscriberClient() as subscriber:
            source = self._paths["messages-subscription"]
            while not self.has_ended.is_set():
                try:
                    pulled = subscriber.pull(
                        subscription=source, max_messages=self._most, timeout=1
                    ).received_messages
                except Exception:
                    continue
                if not pulled:
                    continue
                taken = time.monotonic()
                time.sleep(self._seconds_of(len(pulled)))
                for one in pulled:
                    bad = one.message.data == b"bad"
                    topic = self._paths["dead" if bad else "responses"]
                    seen = {"taken": str(taken), "given": str(time.monotonic())}
                    publisher.publish(topic, b"answer", **dict(one.message.attributes), **seen)
                    if one.message.data == b"twice":
                        publisher.publish(topic, b"answer", **dict(one.message.attributes))
                subscriber.acknowledge(subscription=source, ack_ids=[one.ack_id for one in pulled])
                self._left -= len(pulled)
                if self._left <= 0:
                    self.has_ended.set()


def send(paths, times, prompts, **options):
    return send_load(
        paths["messages"],
        times,
        prompts,
        responses=paths["responses-subscription"],
        dead_letters=paths["dead-subscription"],
        **options,
    )


class Clock:
    """A clock of the test's own, whose sleeps last 1.5 ms longer than they should."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds + 0.0015


def test_two_hundred_messages_a_second_are_due_at_their_times_and_none_before():
    clock, times = Clock(), poisson_arrivals([Phase(200, 3)], random_state=1)
    found = []
    for number, delay in load_module._when_due(times, 100.0, lambda: False, clock.now, clock.sleep):
        assert clock.time - 100.0 == pytest.approx(times[number] + delay)
        found.append(delay)
    assert len(found) == len(times)
    assert 0 <= min(found) <= max(found) < load_module.SLEEP_SHORT


def test_a_delay_does_not_move_the_schedule():
    """Otherwise, load would be lower just when the stream is slow: coordinated omission."""
    clock, delays = Clock(), []
    for number, delay in load_module._when_due(
        [0.0, 1.0, 2.0, 5.0], 100.0, lambda: False, clock.now, clock.sleep
    ):
        delays.append(delay)
        if number == 0:
            clock.time += 3  # publishing took long
    assert delays == pytest.approx([0.0, 2.0, 1.0, 0.0], abs=0.002)


def test_a_schedule_ends_when_it_is_told_to():
    clock = Clock()
    due = load_module._when_due([0.0, 3600.0], 100.0, lambda: clock.time > 110, clock.now, clock.sleep)
    assert [number for number, _ in due] == [0]
    assert clock.time < 111


def test_a_message_is_sent_then_taken_then_answered_and_then_received(topics):
    """Whatever the machine's speed: each time on the record fits those that the job saw."""
    times = poisson_arrivals([Phase(20, 2)], random_state=2)
    before = time.monotonic()
    with Job(topics, lambda size: 0.02, most=16):
        found = send(topics, times, ["Hi"], wait_seconds=120)
    assert found.waiting == 0
    assert [one.intended for one in found.messages] == times
    assert all(one.intended <= one.sent <= one.answered for one in found.messages)
    # When the run began, by the clock of the job: not before any message was answered here ...
    earliest = max(float(one.attributes["given"]) - one.answered for one in found.messages)
    # ... nor after any was taken there.
    latest = min(float(one.attributes["taken"]) - one.sent for one in found.messages)
    assert max(earliest, before) <= latest


def test_the_command_says_how_late_the_answers_are(topics, cloud, capsys):
    names = {key: path.rpartition("/")[2] for key, path in topics.items()}
    arguments = [
        "load",
        "--project",
        cloud.project,
        "--rate",
        "20",
        "--seconds",
        "2",
        "--wait-seconds",
        "120",
    ]
    arguments += ["--messages", names["messages"], "--responses", names["responses"]]
    arguments += ["--dead-letters", names["dead"], "good", "bad"]
    with Job(topics, lambda size: 0.0, most=100):
        assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["published"] == found["answered"] + found["dead_letters"] > 10
    assert 0 < found["p50_seconds"] <= found["p95_seconds"] <= found["p99_seconds"] < 122
    for wrong, reason in (
        (["--rate", "-1"], "give 0 or more"),
        (["--rate", "nan"], "a number"),
        (["--responses", "nowhere"], "nowhere"),
    ):
        assert main([*arguments, *wrong]) == 1
        assert reason in capsys.readouterr().err
    assert main([*arguments, "--seconds", "0.5", "--wait-seconds", "0.5"]) == 1
    assert "Is a job running?" in capsys.readouterr().err


def test_every_message_is_accounted_for(topics):
    times = poisson_arrivals([Phase(50, 2)], random_state=3)
    with Job(topics, lambda size: 0.0, most=100):
        found = send(topics, times, ["good", "bad", "twice"], wait_seconds=120)
    assert len(found.messages) == len(times)
    assert found.dead == len(times) // 3 + (len(times) % 3 > 1)
    assert found.waiting == 0
    assert len(found.answered) + found.dead == len(times)
    assert found.repeated <= len(times) // 3


def test_a_job_that_ends_in_the_middle_ends_the_run_and_leaves_the_rest_waiting(topics):
    times = poisson_arrivals([Phase(20, 500)], random_state=4)
    with Job(topics, lambda size: 0.1, most=5, dies_after=20) as job:
        found = send(topics, times, ["Hi"], wait_seconds=300, should_stop=job.has_ended.is_set)
    assert found.waiting > 0
    assert len(found.messages) < len(times)
    assert len(found.answered) + found.dead + found.waiting == len(found.messages)


def test_a_subscription_that_cannot_be_read_is_an_error_and_not_silence(topics):
    for name in ("responses-subscription", "dead-subscription"):
        with pytest.raises(SendingError, match="nowhere"):
            send(topics | {name: topics[name] + "nowhere"}, [0.0, 3600.0], ["Hi"])


class Simulated:
    """A job, and the load on it, on a clock of their own: batches take known times, and nobody waits.

    It counts as a job on Dataflow does, with a token of padding for each prompt.
    """

    def __init__(self, monkeypatch, seconds_of, most, dies_after=math.inf):
        self.seconds_of, self._most, self._left = seconds_of, most, dies_after
        self.sizes, self.times = [], []
        for module in (sweep_module, changes_module):
            monkeypatch.setattr(module, "send_load", self.send)

    def send(self, topic, times, prompts, *, wait_seconds=120, **_):
        def seconds_of(places):
            self.sizes.append(len(places))
            self.times.append(round(self.seconds_of(len(places)) * 1000))
            return self.seconds_of(len(places))

        answered = simulate(times, seconds_of, most=self._most).answered
        self._left -= len(times)
        end = times[-1] + wait_seconds
        records = [
            Record(when, when, then if then < end else None)
            for when, then in zip(times, answered, strict=True)
        ]
        return Records(records, 0)

    def state(self):
        return "RUNNING" if self._left > 0 else "FAILED"

    def counters(self):
        return {"prompt_tokens": 3 * sum(self.sizes), "padding_tokens": sum(self.sizes)}

    def distributions(self):
        values = {"batch_size": self.sizes, "batch_milliseconds": self.times}
        return {
            name: Distribution(len(found), sum(found), min(found), max(found))
            for name, found in values.items()
            if found
        }


LOAD = {"topic": "messages", "prompts": ["Hi"], "responses": "responses", "dead_letters": "dead"}


def test_a_sweep_ends_at_the_first_rate_that_the_job_does_not_keep_up_with(monkeypatch):
    """Two at a time in 0.2 s are at most ten a second."""
    job = Simulated(monkeypatch, lambda size: 0.2, most=2)
    points = sweep_rates(job, [2.0, 5.0, 40.0, 80.0], seconds=3, wait_seconds=1, **LOAD)
    assert len(points) == 3
    assert [point.keeps_up for point in points] == [True, True, False]
    assert knee(points) is points[1]
    for point in points:
        assert point.published == point.responses + point.dead_letters + point.waiting
        assert 1 <= point.batch_size <= 2
        assert point.batch_seconds == pytest.approx(0.2)
        assert point.padding == pytest.approx(0.25)
        assert point.p50 <= point.p95 <= point.p99
    assert points[0].p95 < 1
    assert points[2].p99 == math.inf


def test_a_sweep_whose_job_ends_says_so(monkeypatch):
    job = Simulated(monkeypatch, lambda size: 0.0, most=5, dies_after=8)
    with pytest.raises(SweepError, match=r"ended \(FAILED\) after 0 of 2 rates"):
        sweep_rates(job, [5.0, 10.0], seconds=20, **LOAD)
    for rates in ([5.0, 2.0], [2.0, 2.0], [-1.0], [0.001]):
        with pytest.raises(ValueError):
            sweep_rates(None, rates, seconds=1, **LOAD)


def test_a_job_that_cannot_be_asked_after_ends_the_run(topics):
    def should_stop():
        raise RuntimeError("no such job")

    with pytest.raises(SendingError, match="no such job"):
        send(topics, [0.0, 3600.0], ["Hi"], should_stop=should_stop)


def test_what_the_service_refuses_for_once_is_tried_again(topics, monkeypatch):
    acknowledge, failed = pubsub_v1.SubscriberClient.acknowledge, []

    def fails_once(self, *arguments, **named):
        if not failed and named["subscription"] == topics["responses-subscription"]:
            failed.append(True)
            raise ServiceUnavailable("not now")
        return acknowledge(self, *arguments, **named)

    monkeypatch.setattr(pubsub_v1.SubscriberClient, "acknowledge", fails_once)
    with Job(topics, lambda size: 0.0, most=2):
        found = send(topics, [n / 10 for n in range(20)], ["Hi"], wait_seconds=120)
    assert failed
    assert (len(found.answered), found.waiting) == (20, 0)


def test_large_messages_go_in_requests_that_the_service_takes(topics):
    found = send(topics, [0.0] * 30, ["x" * 1_000_000], wait_seconds=0)
    assert len(pubsub.collect(topics["messages-subscription"], 30, timeout=300)) == len(found.messages) == 30
    assert found.latency(0.5) == float("inf")


def test_what_cannot_be_sent_is_an_error_that_says_what_to_do(topics, monkeypatch):
    monkeypatch.setattr(load_module, "MOST_LATE_SECONDS", 0.05)
    with pytest.raises(SendingError, match="Ask for a lower one"):
        send(topics, [n * 1e-6 for n in range(20_000)], ["Hi"])
    with pytest.raises(SendingError, match="cannot be published"):
        send(topics | {"messages": topics["messages"] + "x"}, [0.0], ["Hi"], wait_seconds=1)
    for prompts in ([], [""], "Hi"):
        with pytest.raises(ValueError, match="no prompts"):
            send(topics, [0.0], prompts)
    for times in ([float("nan")], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="0 or more"):
            send(topics, times, ["Hi"])
    with pytest.raises(ValueError, match="order"):
        send(topics, [1.0, 0.0], ["Hi"])


def test_what_a_change_does_to_the_max_throughput_is_found(monkeypatch):
    """Up to 20 at once, at 0.01 s each and 0.1 s together: 67 a second, or a third of that."""
    factors = {"fast": 1.0, "slow": 3.0}
    now = ["fast"]
    monkeypatch.setattr(dataflow, "update", lambda job, *, speed: now.append(speed) or job)
    monkeypatch.setattr(pubsub, "ask", lambda *_, **__: ["yes"])
    job = Simulated(monkeypatch, lambda size: factors[now[-1]] * (0.1 + 0.01 * size), most=20)
    changes = [{"speed": name} for name in ("slow", "fast")]
    more = {"rates": [3.0], "seconds": 20, "flood": 60, "responses_topic": "responses", **LOAD}
    _, found = measure_changes(job, {}, changes, **more)
    assert most_rate(found["speed = fast"]) == pytest.approx(20 / 0.3, rel=0.05)
    assert most_rate(found["speed = slow"]) == pytest.approx(20 / 0.9, rel=0.05)
    # Nobody answers any more.
    job.seconds_of = lambda size: 1000.0
    with pytest.raises(NotAnsweredError, match=r"of 220 messages .*job.errors"):
        warm_up(**LOAD)
    monkeypatch.setattr(pubsub, "ask", lambda *_, **__: [None])
    with pytest.raises(NotAnsweredError, match="with speed = slow, the job answers nothing"):
        measure_changes(job, {}, changes, **more)
