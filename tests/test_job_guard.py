"""The guard drains a job when its time is up, by a clock of the test's own, whatever the wall clock does."""

import time

import pytest
from google.api_core.exceptions import FailedPrecondition, ServiceUnavailable

from helpers.dataflow import job as job_module
from helpers.dataflow import job_guard


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class StubJob:
    """A job that drains 60 s after it was first asked to, or never."""

    def __init__(self, clock: Clock, drains: bool = True) -> None:
        self.clock, self.drains, self.asked, self.faults = clock, drains, [], []
        self._state = "RUNNING"

    def state(self, timeout: float = 60) -> str:
        if self.faults:
            raise self.faults.pop()
        if self._state == "DRAINING" and self.drains and self.clock.time > self.asked[0][1] + 60:
            self._state = "DRAINED"
        return self._state

    def request(self, state: str) -> None:
        self.asked.append((state, self.clock.time))
        if len(self.asked) == 1 and state == "DRAINED" and self.drains is None:
            raise FailedPrecondition("Job is not yet ready for draining.")
        self._state = {"DRAINED": "DRAINING", "CANCELLED": "CANCELLED"}[state]


@pytest.fixture
def guard(monkeypatch):
    """Runs the guard on a stub job for ten minutes of its clock; returns the last state and the job."""

    def run(drains=True, faults=()):
        clock = Clock()
        job = StubJob(clock, drains)
        job.faults = list(faults)
        monkeypatch.setattr(job_module, "Job", lambda *_: job)
        drain_at = time.time() + 600
        return job_guard.guard("p", "r", "id", drain_at, clock.now, clock.sleep), job

    return run


def test_a_job_is_drained_when_its_time_is_up_and_not_before(guard):
    state, job = guard()
    assert state == "DRAINED"
    [(asked, when)] = job.asked
    assert asked == "DRAINED"
    assert 1600 - 1 <= when <= 1600 + job_guard.MOST_POLL_SECONDS


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_clock_that_is_set_anew_changes_nothing(step, guard, monkeypatch):
    """By the wall clock, the job would run, and cost, for an hour more, or end at once."""
    wall, calls = time.time, []
    monkeypatch.setattr(time, "time", lambda: calls.append(1) or wall() + (step if len(calls) > 2 else 0))
    _, job = guard()
    assert 1599 <= job.asked[0][1] <= 1600 + job_guard.MOST_POLL_SECONDS


def test_a_drain_that_is_refused_for_now_is_asked_for_again(guard):
    state, job = guard(drains=None)
    assert [asked for asked, _ in job.asked[:2]] == ["DRAINED", "DRAINED"]
    assert state == "CANCELLED", "it never drains"


def test_a_drain_that_never_ends_is_cancelled(guard):
    state, job = guard(drains=False)
    assert state == "CANCELLED"
    assert job.asked[-1][1] >= 1600 + job_guard.CANCEL_AFTER_DRAINING_SECONDS


def test_a_service_that_is_unreachable_for_a_while_is_asked_again(guard):
    state, job = guard(faults=[ServiceUnavailable("not now")] * 20)
    assert (state, len(job.asked)) == ("DRAINED", 1)


def test_whoever_interrupts_a_wait_is_told_that_the_job_goes_on(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module.Job, "state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job_module.Job("a-project", "a-region", "an-id").wait_for("RUNNING")
    assert "drain --project=a-project --region=a-region an-id" in capsys.readouterr().err
