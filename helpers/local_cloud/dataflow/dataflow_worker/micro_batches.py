"""Streaming for pipelines without state: the whole pipeline is run for each small batch of messages.

A batch's messages are acknowledged when the pipeline has finished with them, and given back when it fails:
they are redelivered without limit, as on Dataflow. A batch that fails is followed by smaller ones until the
message at fault is alone; that one is redelivered later, after others.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from google.api_core import exceptions

from . import graph
from .messages import Batch, Intake
from .service import Service, user_metrics

MAX_MESSAGES = 100
SLOW_BATCH_SECONDS = 20.0  # a batch that takes longer is followed by a smaller one
# But never smaller than this: a language model answers eight prompts in little more time than one.
LEAST_MESSAGES = 8
RETRY_SECONDS = 10  # how long a message that failed alone stays away
MAX_PAUSE_SECONDS = 10.0

log = logging.getLogger(__name__)
_current: dict[str, Batch] = {}  # by the id of a read; the pipeline runs in this process


class _ReadBatch(beam.DoFn):
    def __init__(self, transform_id: str):
        self._transform_id = transform_id

    def process(self, _: bytes) -> Iterator[TimestampedValue]:
        if batch := _current.get(self._transform_id):
            for element in batch.elements:
                yield TimestampedValue(element.value, Timestamp(micros=element.timestamp))


def run(pipeline: Any, options: Any, intake: Intake, service: Service) -> None:
    """Takes in messages until the job is drained."""
    reads = {source.transform_id: _ReadBatch(source.transform_id) for source in graph.sources(pipeline)}
    graph.replace_sources_by_impulse(pipeline, reads)
    graph.make_bounded(pipeline)
    graph.use_this_process(pipeline)
    runner = FnApiRunner()
    size, failures = LEAST_MESSAGES, 0
    service.running(subscriptions=intake.own_subscriptions)
    while not service.draining.is_set():
        try:
            batch = intake.pull(size)
        except exceptions.GoogleAPICallError as error:
            failures += 1
            service.error(error, "Pulling messages failed and will be tried again.")
            service.draining.wait(_pause(failures))
            continue
        if not batch.elements:
            continue
        _current.clear()
        _current[batch.source.transform_id] = batch
        start = time.monotonic()
        try:
            result = runner.run_via_runner_api(
                type(pipeline).FromString(pipeline.SerializeToString()), options
            )
            result.wait_until_finish()
        except Exception as error:
            service.error(error, f"A batch of {len(batch.elements)} messages failed and will be redelivered.")
            size = max(1, len(batch.elements) // 2)
            if len(batch.elements) > 1:
                intake.give_back(batch)
            else:
                failures += 1
                intake.give_back(batch, seconds=RETRY_SECONDS)
                service.draining.wait(_pause(failures))
            continue
        intake.acknowledge(batch)
        seconds, failures = time.monotonic() - start, 0
        is_slow = seconds >= SLOW_BATCH_SECONDS and size > LEAST_MESSAGES
        size = max(LEAST_MESSAGES, size // 2) if is_slow else min(MAX_MESSAGES, size * 2)
        service.metrics(user_metrics(result))
        service.progress()
        log.info("%d messages in %.2f s", len(batch.elements), seconds)


def _pause(failures: int) -> float:
    return min(MAX_PAUSE_SECONDS, 0.1 * 2 ** min(failures, 10))
