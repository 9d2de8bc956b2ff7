"""A job's status at one moment, as a row of a table that refreshes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError


@dataclass(frozen=True)
class Status:
    """A job's status at one moment.

    Attributes:
        seconds: seconds since the watching began.
        state: its state, for instance RUNNING.
        workers: how many workers Dataflow last reported; None before its first report.
        backlog: messages waiting in the subscription, as Cloud Monitoring counted them last, a minute or two
            ago; None where it does not say.
        answered: prompts answered since the job began, according to the workers' reports.
        answers_per_second, tokens_per_second: the rates since the last status.
        dead_letters: messages that went to the dead-letter topic since the job began.
        messages: the job's messages since the last status, oldest first.
    """

    seconds: float
    state: str
    workers: int | None = None
    backlog: int | None = None
    answered: int = 0
    answers_per_second: float = 0.0
    tokens_per_second: float = 0.0
    dead_letters: int = 0
    messages: list[str] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """As a row of a table."""
        unknown = "–"
        return {
            "seconds": round(self.seconds, 1),
            "state": self.state,
            "workers": unknown if self.workers is None else self.workers,
            "backlog": unknown if self.backlog is None else self.backlog,
            "answered": self.answered,
            "answers/s": round(self.answers_per_second, 1),
            "tokens/s": round(self.tokens_per_second),
            "dead letters": self.dead_letters,
            "messages": "\n".join(self.messages),
        }


def backlog(subscription: str) -> int | None:
    """How many messages wait in a subscription, by Cloud Monitoring's last count; None where it has none.

    Pub/Sub itself does not say. Cloud Monitoring does, once a minute; the local cloud's, at any moment.

    Args:
        subscription: `projects/P/subscriptions/S`.
    """
    try:
        from google.cloud import monitoring_v3
    except ImportError:  # comes with Beam's [gcp] extra today, by way of its other clients
        return None
    _, project, _, name = subscription.split("/")
    now = datetime.now(UTC)
    request = monitoring_v3.ListTimeSeriesRequest(
        name=f"projects/{project}",
        filter='metric.type = "pubsub.googleapis.com/subscription/num_undelivered_messages" AND '
        f'resource.labels.subscription_id = "{name}"',
        interval=monitoring_v3.TimeInterval(start_time=now - timedelta(minutes=5), end_time=now),
    )
    try:
        series = monitoring_v3.MetricServiceClient().list_time_series(request, timeout=10, retry=None)
        points = [point for one in series for point in one.points]
    except (GoogleAPICallError, GoogleAuthError):
        return None
    return max(points, key=lambda point: point.interval.end_time).value.int64_value if points else None
