"""Streaming for pipelines with state, timers or grouping: one run of Beam's bundle-based direct runner.

Messages reach the pipeline through Beam's TestStream, whose events come from a service in this process. The
runner asks for the next event only when it has nothing left to do, so a mark after each batch shows when the
pipeline has done with it what it can. Its messages are acknowledged once the pipeline's buffers hold nothing
of it any more: state lives in this process, and a worker that replaces another begins without it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.portability import python_urns
from apache_beam.portability.api import (
    beam_interactive_api_pb2_grpc,
    beam_runner_api_pb2,
)
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.testing import test_stream  # noqa: F401 - makes the transform known to Beam
from google.api_core import exceptions

from . import graph
from .buffered import Buffers, has_other_state
from .messages import Batch, Intake
from .service import Service

MAX_MESSAGES = 100
WATERMARK_LAG_SECONDS = 2.0  # behind the present when no messages are waiting
STEP_SECONDS = 600.0  # the longest that a batch of messages may take
_MARK, _MESSAGE = b"!", b"m"

log = logging.getLogger(__name__)
_step_done = threading.Event()  # set by the pipeline, which runs in this process

_Event = beam_runner_api_pb2.TestStreamPayload.Event


class _Unwrap(beam.DoFn):
    """Turns what the TestStream emits into messages."""

    def process(self, element: bytes) -> Iterable[bytes]:
        if element == _MARK:
            _step_done.set()
        else:
            yield element.removeprefix(_MESSAGE)


class _Events(beam_interactive_api_pb2_grpc.TestStreamServiceServicer):
    """The events of the pipeline's only run, made from the messages of an Intake."""

    def __init__(self, intake: Intake, service: Service, reads: Iterable[str]):
        self._intake = intake
        self._service = service
        self._reads = list(reads)
        self._clock = 0  # the pipeline's processing time, in microseconds
        self._watermarks: dict[str, int] = {}
        self._step = 0
        self._unacknowledged: deque[tuple[int, Batch]] = deque()
        self.buffers: futures.Future[Buffers] = futures.Future()

    def Events(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        size = 1
        while not self._service.draining.is_set() and context.is_active():
            try:
                batch = self._intake.pull(size)
            except exceptions.GoogleAPICallError as error:
                self._service.error(error, "Pulling messages failed and will be tried again.")
                self._service.draining.wait(1.0)
                continue
            size = min(MAX_MESSAGES, size * 2) if batch.elements else 1
            yield from self._take_a_step(batch)
        # The end of the stream closes every window, as a drain on Dataflow does.

    def acknowledge_the_rest(self) -> None:
        """Acknowledges what has gone through a pipeline that has come to its end; gives back what has not."""
        self._acknowledge()
        if self._unacknowledged:
            count = sum(len(batch.elements) for _, batch in self._unacknowledged)
            self._service.message(
                "WARNING",
                f"The pipeline has ended with messages in its state: {count} were not acknowledged. They are "
                "given back to their subscriptions; those of a topic's own subscription go with it.",
            )
            for _, batch in self._unacknowledged:
                self._intake.give_back(batch)

    def _take_a_step(self, batch: Batch) -> Iterator[Any]:
        """Time passes, a batch of messages comes, and the pipeline does all that it can with both."""
        tag = batch.source.transform_id
        self._step += 1
        _step_done.clear()
        yield self._advance_clock()
        if batch.elements:
            self._unacknowledged.append((self._step, batch))
            yield _elements(tag, [(_MESSAGE + e.value, e.timestamp) for e in batch.elements])
        yield from self._advance_watermark(batch)
        yield _elements(tag, [(_MARK, self._clock)])
        if not _step_done.wait(STEP_SECONDS):
            raise TimeoutError(f"A batch of messages took longer than {STEP_SECONDS:g} s.")
        self._acknowledge()

    def _acknowledge(self) -> None:
        oldest = self.buffers.result(STEP_SECONDS).oldest(self._step)
        while self._unacknowledged and self._unacknowledged[0][0] < oldest:
            self._intake.acknowledge(self._unacknowledged.popleft()[1])
            self._service.progress()

    def _advance_clock(self) -> Any:
        now = time.time_ns() // 1000
        event = _Event(processing_time_event=_Event.AdvanceProcessingTime(advance_duration=now - self._clock))
        self._clock = now
        return event

    def _advance_watermark(self, batch: Batch) -> Iterator[Any]:
        """Advances it to the batch's oldest message or, if the batch is empty, to just before now."""
        tag = batch.source.transform_id
        if batch.elements:
            watermark = min(e.timestamp for e in batch.elements)
        else:
            watermark = self._clock - round(WATERMARK_LAG_SECONDS * 1_000_000)
        if watermark > self._watermarks.get(tag, 0):
            self._watermarks[tag] = watermark
            yield _Event(watermark_event=_Event.AdvanceWatermark(new_watermark=watermark, tag=tag))


def _elements(tag: str, elements: list[tuple[bytes, int]]) -> Any:
    timestamped = [
        beam_runner_api_pb2.TestStreamPayload.TimestampedElement(encoded_element=value, timestamp=timestamp)
        for value, timestamp in elements
    ]
    return _Event(element_event=_Event.AddElements(elements=timestamped, tag=tag))


def run(pipeline: Any, options: Any, intake: Intake, service: Service) -> None:
    """Takes in messages until the job is drained and its windows are closed."""
    reads = {source.transform_id: _Unwrap() for source in graph.sources(pipeline)}
    events = grpc.server(futures.ThreadPoolExecutor(4))
    source = _Events(intake, service, reads)
    beam_interactive_api_pb2_grpc.add_TestStreamServiceServicer_to_server(source, events)
    port = events.add_insecure_port("127.0.0.1:0")
    events.start()
    graph.replace_sources_by_test_stream(pipeline, reads, f"127.0.0.1:{port}")
    graph.set_environment(pipeline, python_urns.EMBEDDED_PYTHON)
    runner = BundleBasedDirectRunner()
    result = runner.run_pipeline(beam.Pipeline.from_runner_api(pipeline, runner, options), options)
    source.buffers.set_result(Buffers(result._evaluation_context))
    service.message(
        "WARNING",
        "The pipeline has state, timers or grouping: it has no user metrics here, because the runner that it "
        "needs stops counting after the first bundles.",
    )
    if has_other_state(result._evaluation_context):
        service.message(
            "WARNING",
            "The pipeline keeps values or sets in its state. Here they are in the worker's memory: what they "
            "hold of a message is lost if the worker fails, where Dataflow would have kept it.",
        )
    service.running(stateful=True, subscriptions=intake.own_subscriptions)
    try:
        result.wait_until_finish()
        source.acknowledge_the_rest()
    except Exception:
        intake.give_back_all()
        raise
    finally:
        events.stop(None)
