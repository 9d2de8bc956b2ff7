"""A job on Dataflow: its state, messages and figures, and how to stop it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from google.api_core import exceptions
from google.api_core.exceptions import FailedPrecondition
from google.api_core.retry import Retry, if_exception_type
from google.cloud import dataflow_v1beta3 as dataflow
from google.protobuf.field_mask_pb2 import FieldMask

from helpers.dataflow.job_status import Status, backlog

Client = TypeVar("Client")

POLL_SECONDS = 1.0
ASK_AGAIN_SECONDS = 15.0
"""The longest time between two requests to drain a job that Dataflow does not let drain yet."""

RETRY = Retry(
    predicate=if_exception_type(
        exceptions.ServiceUnavailable,
        exceptions.InternalServerError,
        exceptions.DeadlineExceeded,
        exceptions.TooManyRequests,
        exceptions.Aborted,
    ),
    timeout=300,
)
"""For questions, which change nothing: a service that is unavailable for some minutes ends no wait."""

DERIVED = {"MIN", "MAX", "MEAN", "COUNT"}
"""Scalars that Dataflow adds to each distribution, as NAME_MIN; Beam leaves them out as well."""

TERMINAL = {"DONE", "FAILED", "CANCELLED", "DRAINED", "UPDATED"}
UNDER_WAY = {"DRAINED": {"DRAINING", "CANCELLING"}, "CANCELLED": {"CANCELLING"}}

Importance = dataflow.JobMessageImportance

# What a worker that lacks a package says, and what to do about it.
MISSING_PACKAGE = "No module named"
MISSING_PACKAGE_HINT = (
    "The workers lack a package: rebuild their image (helpers.dataflow.worker_image), or leave out "
    "--sdk_container_image and --helpers-in-image, so that the workers install what they need."
)


class JobError(RuntimeError):
    """A job that failed, or did not reach its state in time; the message says what to look at."""


@dataclass(frozen=True)
class Distribution:
    """What is known of many values of a job's: how many there were, their sum, the least and the greatest."""

    count: int
    sum: int
    min: int
    max: int

    @property
    def mean(self) -> float:
        """Their mean; 0 if there were none."""
        return self.sum / self.count if self.count else 0.0

    def __add__(self, other: Distribution) -> Distribution:
        return Distribution(
            self.count + other.count,
            self.sum + other.sum,
            min(self.min, other.min),
            max(self.max, other.max),
        )


@dataclass(frozen=True)
class Job:
    """A job on Dataflow."""

    project: str
    location: str
    job_id: str

    @property
    def url(self) -> str:
        """The job's page in the Google Cloud console."""
        page = f"https://console.cloud.google.com/dataflow/jobs/{self.location}/{self.job_id}"
        return f"{page}?project={self.project}"

    def describe(self, timeout: float = 60) -> dataflow.Job:
        """All that Dataflow knows about the job: its environment, labels and options.

        Args:
            timeout: seconds to wait for the answer.
        """
        request = dataflow.GetJobRequest(
            project_id=self.project,
            location=self.location,
            job_id=self.job_id,
            view=dataflow.JobView.JOB_VIEW_ALL,
        )
        client = _client(dataflow.JobsV1Beta3Client)
        return client.get_job(request=request, timeout=timeout, retry=RETRY)

    def state(self, timeout: float = 60) -> str:
        """The job's state, for instance PENDING, RUNNING, DRAINING, DRAINED, FAILED, CANCELLED or UPDATED."""
        request = dataflow.GetJobRequest(project_id=self.project, location=self.location, job_id=self.job_id)
        client = _client(dataflow.JobsV1Beta3Client)
        job = client.get_job(request=request, timeout=timeout, retry=RETRY)
        return job.current_state.name.removeprefix("JOB_STATE_")

    def successor(self) -> Job | None:
        """The job that has replaced this one in an update, if there is one."""
        job_id = self.describe().replaced_by_job_id
        return Job(self.project, self.location, job_id) if job_id else None

    def wait_for(self, *states: str, timeout: float = 600) -> str:
        """Waits until the job is in one of the states.

        Args:
            states: names as `state` gives them.
            timeout: seconds.

        Returns:
            The state that the job is in.

        Raises:
            JobError: the job ended in another state, or the time is up.
        """
        deadline = time.monotonic() + timeout
        with self._goes_on():
            while (state := self.state()) not in states:
                if state in TERMINAL:
                    raise JobError(f"The job ended as {state}. {self._why()}\nSee {self.url}")
                if time.monotonic() > deadline:
                    raise JobError(
                        f"After {timeout:.0f} s the job is still {state}, not {' or '.join(states)}. It goes "
                        f"on: look at {self.url}, wait longer, or cancel it."
                    )
                time.sleep(POLL_SECONDS)
        return state

    @contextlib.contextmanager
    def _goes_on(self) -> Iterator[None]:
        """Tells whoever interrupts a wait that the job does not end with it."""
        try:
            yield
        except KeyboardInterrupt:
            print(
                f"Interrupted. The job {self.job_id} goes on, and costs money; to end it: python -m "
                f"helpers.dataflow drain --project={self.project} --region={self.location} {self.job_id}",
                file=sys.stderr,
            )
            raise

    def messages(self, minimum: Importance = Importance.JOB_MESSAGE_BASIC) -> list[dataflow.JobMessage]:
        """The job's messages of at least this importance, oldest first."""
        return self._messages_and_workers(minimum)[0]

    def errors(self) -> list[str]:
        """The job's error messages, oldest first."""
        return [message.message_text for message in self.messages(Importance.JOB_MESSAGE_ERROR)]

    def counters(self) -> dict[str, int]:
        """The pipeline's own counters, for instance `response_tokens`, summed over its steps."""
        totals: dict[str, int] = {}
        metrics = list(self._user_metrics())
        distributions = {metric.name.name for metric in metrics if metric.distribution}
        for metric in metrics:
            stem, _, suffix = metric.name.name.rpartition("_")
            if stem in distributions and suffix in DERIVED:
                continue  # the service's own, of a distribution
            if isinstance(metric.scalar, int | float):  # a distribution has no scalar
                totals[metric.name.name] = totals.get(metric.name.name, 0) + int(metric.scalar)
        return totals

    def distributions(self) -> dict[str, Distribution]:
        """The model handler's distributions, `batch_size` and `batch_milliseconds`, over all steps: Beam has
        others of the same names."""
        from helpers.model_handler import NAMESPACE  # here: the process that guards a job needs no torch

        found: dict[str, Distribution] = {}
        for metric in self._user_metrics():
            if metric.distribution and metric.name.context.get("namespace") == NAMESPACE:
                values = {part: int(metric.distribution[part]) for part in ("count", "sum", "min", "max")}
                one, before = Distribution(**values), found.get(metric.name.name)
                found[metric.name.name] = one if before is None else before + one
        return found

    def _user_metrics(self) -> Iterator[dataflow.MetricUpdate]:
        request = dataflow.GetJobMetricsRequest(
            project_id=self.project, location=self.location, job_id=self.job_id
        )
        client = _client(dataflow.MetricsV1Beta3Client)
        for metric in client.get_job_metrics(request, retry=RETRY).metrics:
            if metric.name.origin == "user" and "tentative" not in metric.name.context:
                yield metric

    def watch(
        self, *, seconds: float, every: float = 5.0, subscription: str | None = None
    ) -> Iterator[Status]:
        """Checks the job now and then, until it has ended or the time is up.

        Args:
            seconds: how long to watch at most.
            every: seconds from one check to the next.
            subscription: the path of the subscription that the job reads, for its backlog.

        Yields:
            The job's status, at least once.
        """
        began = time.monotonic()
        told: set[str] = set()
        answered, tokens, then = 0, 0, None
        while True:
            state = self.state()
            counters = self.counters()
            messages, workers = self._messages_and_workers(Importance.JOB_MESSAGE_BASIC)
            now = time.monotonic()
            now_answered = counters.get("num_inferences", 0) - counters.get("failed_prompts", 0)
            now_tokens = counters.get("response_tokens", 0)
            passed = 0.0 if then is None else now - then
            new = [message for message in messages if message.id not in told]
            told.update(message.id for message in new)
            yield Status(
                seconds=now - began,
                state=state,
                workers=workers,
                backlog=backlog(subscription) if subscription else None,
                answered=now_answered,
                answers_per_second=(now_answered - answered) / passed if passed else 0.0,
                tokens_per_second=(now_tokens - tokens) / passed if passed else 0.0,
                dead_letters=counters.get("dead_letters", 0),
                messages=[message.message_text for message in new],
            )
            answered, tokens, then = now_answered, now_tokens, now
            left = began + seconds - time.monotonic()
            if state in TERMINAL or left <= 0:
                return
            with self._goes_on():
                time.sleep(min(every, left))

    def scale(self, least: int, most: int) -> None:
        """Changes the range of workers that the running job may use.

        Raises:
            JobError: the job is not running, or the numbers make no sense.
        """
        if not 1 <= least <= most:
            raise JobError(f"From {least} to {most} workers: give at least 1, the smaller number first.")
        job = dataflow.Job(
            id=self.job_id,
            runtime_updatable_params=dataflow.RuntimeUpdatableParams(
                min_num_workers=least, max_num_workers=most
            ),
        )
        request = dataflow.UpdateJobRequest(
            project_id=self.project,
            location=self.location,
            job_id=self.job_id,
            job=job,
            update_mask=FieldMask(
                paths=[f"runtime_updatable_params.{name}_num_workers" for name in ("min", "max")]
            ),
        )
        try:
            _client(dataflow.JobsV1Beta3Client).update_job(request)
        except FailedPrecondition as error:
            raise JobError(f"The workers of {self.job_id} stay as they are: {error.message}") from error

    def drain(self, timeout: float = 900) -> str:
        """Stops reading, finishes what was read, and waits until that is done; returns the last state.

        What is still in the subscription stays there, for the next job. A job that has ended stays as it is.

        Raises:
            JobError: the job failed, or is not drained in time.
        """
        return self.stop("DRAINED", timeout)

    def cancel(self, timeout: float = 300) -> str:
        """Stops at once, and returns the last state. Pub/Sub delivers again what was not answered."""
        return self.stop("CANCELLED", timeout)

    def request(self, state: str) -> None:
        """Asks Dataflow to bring the job into a state, DRAINED or CANCELLED, and does not wait.

        Raises:
            google.api_core.exceptions.FailedPrecondition: it has ended already, or is too young to drain.
        """
        job = dataflow.Job(id=self.job_id, requested_state=dataflow.JobState[f"JOB_STATE_{state}"])
        request = dataflow.UpdateJobRequest(
            project_id=self.project, location=self.location, job_id=self.job_id, job=job
        )
        # Asking twice for the same state does no harm.
        _client(dataflow.JobsV1Beta3Client).update_job(request, retry=RETRY)

    def stop(self, state: str, timeout: float) -> str:
        """Brings the job into a state, DRAINED or CANCELLED, and returns the one in which it ended.

        Dataflow refuses to drain a job that is young or is being updated, so it is asked again until the job
        drains, ends, or the time is up. A job that has not begun has nothing to finish, and is cancelled.

        Raises:
            JobError: the job failed, or has not ended in time; the message says what it was asked for last.
        """
        deadline = time.monotonic() + timeout
        refusal, ask_at, pause = "", -math.inf, POLL_SECONDS
        if (now := self.state()) in TERMINAL:
            return now
        while now not in TERMINAL:
            moment = time.monotonic()
            wanted = "CANCELLED" if now in ("PENDING", "QUEUED") else state
            if now not in UNDER_WAY[wanted] and moment >= ask_at:
                ask_at, pause = moment + pause, min(2 * pause, ASK_AGAIN_SECONDS)
                try:
                    self.request(wanted)
                    refusal = ""
                except FailedPrecondition as error:
                    refusal = f" Dataflow answered: {error.message}"
            if moment >= deadline:
                raise JobError(
                    f"After {timeout:.0f} s the job is still {now}, not {state}.{refusal} It goes on, and "
                    f"costs money: look at {self.url}, drain it again, or cancel it."
                )
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - moment)))
            now = self.state()
        if now == "UPDATED" and (successor := self.successor()):  # its update went on while it was asked
            return successor.stop(state, max(0.0, deadline - time.monotonic()))
        if now == "FAILED":
            raise JobError(f"The job ended as {now}. {self._why()}\nSee {self.url}")
        return now

    def _why(self) -> str:
        errors = "\n".join(self.errors()[-3:])
        hint = f"\n{MISSING_PACKAGE_HINT}" if MISSING_PACKAGE in errors else ""
        return (errors or "It left no error.") + hint

    def _messages_and_workers(self, minimum: Importance) -> tuple[list[dataflow.JobMessage], int | None]:
        """The job's messages, and the number of its workers, which Dataflow reports along with them."""
        request = dataflow.ListJobMessagesRequest(
            project_id=self.project, location=self.location, job_id=self.job_id, minimum_importance=minimum
        )
        client = _client(dataflow.MessagesV1Beta3Client)
        pages = list(client.list_job_messages(request, retry=RETRY).pages)
        messages = [message for page in pages for message in page.job_messages]
        events = [event for page in pages for event in page.autoscaling_events]
        latest = max(events, key=lambda event: event.time, default=None)
        messages.sort(key=lambda message: (message.time, message.id))
        return messages, None if latest is None else latest.current_num_workers


def _client(kind: type[Client]) -> Client:
    """A client, and so a connection, shared by all calls of this process and account."""
    return _client_of(kind, os.getpid(), os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))


@lru_cache(maxsize=6)
def _client_of(kind: type[Client], process_id: int, credentials_file: str | None) -> Client:
    return kind()
