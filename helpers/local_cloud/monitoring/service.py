"""Cloud Monitoring on this machine: how many messages wait in a Pub/Sub subscription.

It answers ListTimeSeries for the metric `pubsub.googleapis.com/subscription/num_undelivered_messages` of one
subscription, and refuses every other query. The service samples once a minute and answers a minute or two
late; here the one point is of the moment of the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import grpc
from google.cloud.monitoring_v3.types import metric_service

from ..front.grpc_service import add_service, invalid_argument, unimplemented
from ..front.permissions import Permissions
from .fields import TABLES

BACKLOG = "pubsub.googleapis.com/subscription/num_undelivered_messages"
_TERM = re.compile(r'\s*(metric\.type|resource\.labels?\.subscription_id)\s*=\s*"([^"]*)"\s*')


class Monitoring:
    """The MetricService, over what Pub/Sub knows.

    Args:
      waiting: how many messages wait in a subscription, by its path; None if there is no such subscription.
    """

    def __init__(self, waiting: Callable[[str], int | None]):
        self._waiting = waiting

    def register(self, server: grpc.Server, permissions: Permissions) -> None:
        """Adds the service to a server."""
        add_service(
            server,
            "google.monitoring.v3.MetricService",
            {self.ListTimeSeries: metric_service.ListTimeSeriesRequest.pb()},
            TABLES,
            permissions,
        )

    def stop(self) -> None:
        """Nothing is running."""

    def ListTimeSeries(self, request: Any, _: grpc.ServicerContext) -> Any:
        answer = metric_service.ListTimeSeriesResponse.pb()()
        project, subscription = self._asked(request)
        waiting = self._waiting(f"projects/{project}/subscriptions/{subscription}")
        if waiting is None:
            return answer
        series = answer.time_series.add()
        series.metric.type = BACKLOG
        series.resource.type = "pubsub_subscription"
        series.resource.labels.update({"project_id": project, "subscription_id": subscription})
        series.metric_kind, series.value_type = 1, 2  # GAUGE, INT64
        point = series.points.add()
        point.value.int64_value = waiting
        point.interval.end_time.GetCurrentTime()
        point.interval.start_time.CopyFrom(point.interval.end_time)
        now, interval = point.interval.end_time.ToNanoseconds(), request.interval
        # A clock that is read after the question is a little later than the end that it names.
        is_within = interval.start_time.ToNanoseconds() <= now <= interval.end_time.ToNanoseconds() + 60e9
        if not is_within:
            return type(answer)()
        if request.view == metric_service.ListTimeSeriesRequest.TimeSeriesView.HEADERS:
            del series.points[:]
        return answer

    def _asked(self, request: Any) -> tuple[str, str]:
        """The project and the subscription that a request asks for."""
        match = re.fullmatch(r"projects/([^/]+)", request.name)
        if not match or not request.interval.HasField("end_time"):
            raise invalid_argument("Give a name such as projects/PROJECT, and an interval with its end.")
        terms = [_TERM.fullmatch(term) for term in request.filter.split(" AND ")]
        named = {term[1].replace("label.", "labels."): term[2] for term in terms if term}
        if None in terms or len(named) != 2 or named.get("metric.type") != BACKLOG:
            raise unimplemented(
                f'the filter {request.filter!r}. It answers metric.type = "{BACKLOG}" AND '
                'resource.labels.subscription_id = "NAME".'
            )
        return match[1], named["resource.labels.subscription_id"]
