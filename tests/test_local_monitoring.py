"""The local cloud's Cloud Monitoring says how many messages wait, and nothing else."""

from datetime import UTC, datetime, timedelta

import pytest
from google.api import metric_pb2
from google.api_core.exceptions import InvalidArgument, MethodNotImplemented
from google.cloud import monitoring_v3, pubsub_v1

from helpers import pubsub
from helpers.dataflow.job_status import backlog

BACKLOG = "pubsub.googleapis.com/subscription/num_undelivered_messages"


@pytest.fixture
def subscription(cloud):
    topic = pubsub.create_topic(cloud.project, "monitored")
    subscription = pubsub.create_subscription(topic, "monitored")
    pubsub.publish(topic, ["one", "two", "three"])
    yield subscription
    pubsub.delete(subscription, topic)


def ask(project: str, filter_text: str, *, end: datetime | None = None, **more):
    end = end or datetime.now(UTC)
    interval = monitoring_v3.TimeInterval(start_time=end - timedelta(minutes=5), end_time=end)
    request = {"name": f"projects/{project}", "filter": filter_text, "interval": interval, **more}
    return list(
        monitoring_v3.MetricServiceClient().list_time_series(request=request, timeout=300, retry=None)
    )


def of(name: str) -> str:
    return f'metric.type = "{BACKLOG}" AND resource.labels.subscription_id = "{name}"'


def test_what_waits_and_what_is_held_count_until_they_are_acknowledged(subscription):
    assert backlog(subscription) == 3
    with pubsub_v1.SubscriberClient() as subscriber:
        held = subscriber.pull(subscription=subscription, max_messages=2).received_messages
        assert backlog(subscription) == 3
        subscriber.acknowledge(subscription=subscription, ack_ids=[one.ack_id for one in held])
    assert backlog(subscription) == 3 - len(held)


def test_a_subscription_that_is_not_there_has_no_series(cloud):
    assert backlog(f"projects/{cloud.project}/subscriptions/none-such") is None


def test_the_series_names_what_it_measures(subscription, cloud):
    [series] = ask(cloud.project, of("monitored"))
    assert series.metric.type == BACKLOG
    assert series.resource.labels["subscription_id"] == "monitored"
    assert series.value_type == metric_pb2.MetricDescriptor.INT64
    assert [point.value.int64_value for point in series.points] == [3]
    headers = monitoring_v3.ListTimeSeriesRequest.TimeSeriesView.HEADERS
    [series] = ask(cloud.project, of("monitored"), view=headers)
    assert not series.points


def test_an_interval_of_the_past_has_no_points(subscription, cloud):
    assert ask(cloud.project, of("monitored"), end=datetime.now(UTC) - timedelta(hours=1)) == []


@pytest.mark.parametrize(
    "filter_text",
    [
        'metric.type = "compute.googleapis.com/instance/cpu/utilization"',
        f'metric.type = "{BACKLOG}"',
        f'metric.type = "{BACKLOG}" AND resource.labels.topic_id = "x"',
        f'{of("monitored")} AND resource.labels.project_id = "p"',
        "",
    ],
)
def test_every_other_query_is_refused(cloud, filter_text):
    with pytest.raises(MethodNotImplemented, match="The local cloud does not imitate this: the filter"):
        ask(cloud.project, filter_text)


def test_a_query_without_an_interval_is_invalid(cloud):
    client = monitoring_v3.MetricServiceClient()
    request = {"name": f"projects/{cloud.project}", "filter": of("monitored")}
    with pytest.raises(InvalidArgument, match="an interval with its end"):
        list(client.list_time_series(request=request, timeout=300, retry=None))
