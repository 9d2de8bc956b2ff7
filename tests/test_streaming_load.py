"""Load keeps its schedule and loses nothing; what it measures is what the simulated queue predicts."""

import json
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
                time.sleep(self._seconds_of(len(pulled)))
                for one in pulled:
                    bad = one.message.data == b"bad"
                    topic = self._paths["dead" if bad else "responses"]
                    publisher.publish(topic, b"answer", **dict(one.message.attributes))
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


def test_two_hundred_messages_a_second_are_sent_when_they_are_to_be(topics):
    times = poisson_arrivals([Phase(200, 3)], random_state=1)
    lateness = []
    for _ in range(6):  # other work on the machine can only make them later
        found = send(topics, times, ["Hi"], wait_seconds=0)
        assert [one.intended for one in found.messages] == times
        assert found.waiting == len(times)
        lateness.append(found.lateness(0.99))
        if lateness[-1] < 0.005:
            break
    assert min(lateness) < 0.005, lateness


@pytest.mark.parametrize("rate", [2.0, 6.0])
def test_what_is_measured_is_what_the_queue_predicts(rate, topics):
    """A bundle of n takes 0.2 + 0.02 n seconds."""

    def seconds_of(size):
        return 0.2 + 0.02 * size

    times = poisson_arrivals([Phase(rate, 12)], random_state=2)
    with Job(topics, seconds_of, most=16):
        found = send(topics, times, ["Hi"], wait_seconds=30)
    predicted = simulate(times, lambda places: seconds_of(len(places)), most=16)
    assert found.waiting == 0
    assert found.rate == pytest.approx(predicted.rate, rel=0.1)
    assert found.latency(0.95) == pytest.approx(predicted.latency(0.95), rel=0.25)
    assert found.latency(0.5) == pytest.approx(predicted.latency(0.5), rel=0.25)


def test_the_command_says_how_late_the_answers_are(topics, cloud, capsys):
    names = {key: path.rpartition("/")[2] for key, path in topics.items()}
    arguments = ["load", "--project", cloud.project, "--rate", "20", "--seconds", "2", "--wait-seconds", "20"]
    arguments += ["--messages", names["messages"], "--responses", names["responses"]]
    arguments += ["--dead-letters", names["dead"], "good", "bad"]
    with Job(topics, lambda size: 0.0, most=100):
        assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["published"] == found["answered"] + found["dead_letters"] > 10
    assert 0 < found["p50_seconds"] <= found["p95_seconds"] <= found["p99_seconds"] < 10
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
        found = send(topics, times, ["good", "bad", "twice"], wait_seconds=30)
    assert len(found.messages) == len(times)
    assert found.dead == len(times) // 3 + (len(times) % 3 > 1)
    assert found.waiting == 0
    assert len(found.answered) + found.dead == len(times)
    assert found.repeated <= len(times) // 3


def test_a_job_that_ends_in_the_middle_ends_the_run_and_leaves_the_rest_waiting(topics):
    times = poisson_arrivals([Phase(20, 60)], random_state=4)
    began = time.monotonic()
    with Job(topics, lambda size: 0.1, most=5, dies_after=20) as job:
        found = send(topics, times, ["Hi"], wait_seconds=30, should_stop=job.has_ended.is_set)
    assert time.monotonic() - began < 20
    assert found.waiting > 0
    assert len(found.answered) + found.dead + found.waiting == len(found.messages)


def test_a_subscription_that_cannot_be_read_is_an_error_and_not_silence(topics):
    for name in ("responses-subscription", "dead-subscription"):
        with pytest.raises(SendingError, match="nowhere"):
            send(topics | {name: topics[name] + "nowhere"}, [0.0, 30.0], ["Hi"])


class Counting(Job):
    """One that also counts as a job on Dataflow does: each lot is a batch, with a token of padding each."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.sizes, self.times = [], []
        seconds_of = self._seconds_of

        def counted(size):
            self.sizes.append(size)
            self.times.append(round(seconds_of(size) * 1000))
            return seconds_of(size)

        self._seconds_of = counted

    def state(self):
        return "FAILED" if self.has_ended.is_set() else "RUNNING"

    def counters(self):
        return {"prompt_tokens": 3 * sum(self.sizes), "padding_tokens": sum(self.sizes)}

    def distributions(self):
        values = {"batch_size": self.sizes, "batch_milliseconds": self.times}
        return {
            name: Distribution(len(found), sum(found), min(found), max(found))
            for name, found in values.items()
            if found
        }


def sweep(paths, job, rates, seconds):
    return sweep_rates(
        job,
        rates,
        seconds=seconds,
        topic=paths["messages"],
        prompts=["Hi"],
        responses=paths["responses-subscription"],
        dead_letters=paths["dead-subscription"],
        wait_seconds=1,
    )


def test_a_sweep_ends_at_the_first_rate_that_the_job_does_not_keep_up_with(topics):
    """Two at a time in 0.2 s are at most ten a second."""
    with Counting(topics, lambda size: 0.2, most=2) as job:
        points = sweep(topics, job, [2.0, 5.0, 40.0, 80.0], seconds=3)
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
    assert points[2].p99 == float("inf")


def test_a_sweep_whose_job_ends_says_so(topics):
    with (
        Counting(topics, lambda size: 0.0, most=5, dies_after=8) as job,
        pytest.raises(SweepError, match=r"ended \(FAILED\) after 0 of 2 rates"),
    ):
        sweep(topics, job, [5.0, 10.0], seconds=20)
    for rates in ([5.0, 2.0], [2.0, 2.0], [-1.0], [0.001]):
        with pytest.raises(ValueError):
            sweep(topics, None, rates, seconds=1)


def test_a_job_that_cannot_be_asked_after_ends_the_run(topics):
    def should_stop():
        raise RuntimeError("no such job")

    began = time.monotonic()
    with pytest.raises(SendingError, match="no such job"):
        send(topics, [0.0, 60.0], ["Hi"], should_stop=should_stop)
    assert time.monotonic() - began < 20


def test_what_the_service_refuses_for_once_is_tried_again(topics, monkeypatch):
    acknowledge, failed = pubsub_v1.SubscriberClient.acknowledge, []

    def fails_once(self, *arguments, **named):
        if not failed and named["subscription"] == topics["responses-subscription"]:
            failed.append(True)
            raise ServiceUnavailable("not now")
        return acknowledge(self, *arguments, **named)

    monkeypatch.setattr(pubsub_v1.SubscriberClient, "acknowledge", fails_once)
    with Job(topics, lambda size: 0.0, most=2):
        found = send(topics, [n / 10 for n in range(20)], ["Hi"], wait_seconds=20)
    assert failed
    assert (len(found.answered), found.waiting) == (20, 0)


def test_large_messages_go_in_requests_that_the_service_takes(topics):
    found = send(topics, [0.0] * 30, ["x" * 1_000_000], wait_seconds=0)
    assert len(pubsub.collect(topics["messages-subscription"], 30, timeout=30)) == len(found.messages) == 30
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


def test_what_a_change_does_to_the_most_that_is_answered_is_found(topics, monkeypatch):
    """Up to 20 at once, at 0.01 s each and 0.1 s together: 67 a second, or a third of that."""
    factors = {"fast": 1.0, "slow": 3.0}
    now = ["fast"]
    monkeypatch.setattr(changes_module, "WARM_UP", (1, 2, 4))
    monkeypatch.setattr(dataflow, "update", lambda job, *, speed: now.append(speed) or job)
    monkeypatch.setattr(pubsub, "ask", lambda *_, **__: ["yes"])  # the stand-in names no prompts
    load = {
        "topic": topics["messages"],
        "prompts": ["Hi"],
        "responses": topics["responses-subscription"],
        "dead_letters": topics["dead-subscription"],
    }
    with Counting(topics, lambda size: factors[now[-1]] * (0.1 + 0.01 * size), most=20) as job:
        _, found = measure_changes(
            job,
            {},
            [{"speed": name} for name in ("slow", "fast")],
            rates=[3.0],
            seconds=2,
            flood=60,
            responses_topic=topics["responses"],
            **load,
        )
    assert most_rate(found["speed = fast"]) == pytest.approx(20 / 0.3, rel=0.25)
    assert most_rate(found["speed = slow"]) == pytest.approx(20 / 0.9, rel=0.25)
    # Nobody answers any more.
    monkeypatch.setattr(changes_module, "WARM_UP_WAIT", 0.5)
    with pytest.raises(NotAnsweredError, match=r"7 of 7 messages .*job.errors"):
        warm_up(**load)
    monkeypatch.setattr(pubsub, "ask", lambda *_, **__: [None])
    with pytest.raises(NotAnsweredError, match="with speed = slow, the job answers nothing"):
        measure_changes(
            job, {}, [{"speed": "slow"}], rates=[3.0], seconds=2, flood=60,
            responses_topic=topics["responses"], **load,
        )  # fmt: skip
