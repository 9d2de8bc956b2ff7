"""Streaming: a pipeline that is one stage, in small bundles and several at once, as on Dataflow.

The stage is set up once; then each of the harness's threads takes a few messages, has Beam's own SDK harness
process them as a bundle, and acknowledges them. The messages of a bundle that fails are tried one by one, and
the one at fault is given back: it is redelivered without limit, as on Dataflow.
"""

import functools
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder, WindowedValueCoder
from apache_beam.coders.coders import GlobalWindowCoder
from apache_beam.portability.api import beam_fn_api_pb2, beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import (
    execution,
    fn_runner,
    translations,
    worker_handlers,
)
from apache_beam.transforms.window import GlobalWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from google.api_core import exceptions

from . import graph
from .messages import Batch, Intake
from .service import Service, user_metrics

# Of a bundle. Dataflow names no number, and what works with few works with many.
MAX_MESSAGES = int(os.environ.get("LOCAL_CLOUD_BUNDLE_MESSAGES", 5))
RETRY_SECONDS = 10  # how long a message that failed alone stays away
MAX_PAUSE_SECONDS = 10.0
IMPULSE_CODER = WindowedValueCoder(BytesCoder(), GlobalWindowCoder()).get_impl()

NOT_IMITATED = (
    "A streaming pipeline with state, timers, grouping, side inputs, or more inputs than Pub/Sub's is not "
    "imitated by the local cloud: try it on Google Cloud, or without."
)

log = logging.getLogger(__name__)
_bundles: dict[bytes, Batch] = {}  # by the name that a bundle's impulse has; the stage runs in this process


class _ReadBundle(beam.DoFn):
    def process(self, name: bytes) -> Iterator[TimestampedValue]:
        for element in _bundles[name].elements:
            yield TimestampedValue(element.value, Timestamp(micros=element.timestamp))


def _fuse_all(stages: list[Any], context: Any) -> list[Any]:
    return [functools.reduce(lambda one, other: one.fuse(other, context), stages)]


class Stage:
    """A streaming pipeline that is one stage, registered with an SDK harness in this process.

    Args:
      pipeline: its graph, which is changed.
      source: its Pub/Sub read.
      threads: how many bundles are processed at once.

    Raises:
      ValueError: it has state, or more stages than one.
    """

    def __init__(self, pipeline: Any, source: graph.Source, threads: int = 1):
        graph.replace_source_by_impulse(pipeline, source.transform_id, _ReadBundle())
        graph.leave_out_reshuffles(pipeline)
        graph.use_this_process(pipeline)
        if not graph.is_one_stage(pipeline):
            raise ValueError(NOT_IMITATED)
        context, (stage,) = translations.create_and_optimize_stages(
            pipeline,
            phases=[
                _fuse_all,
                translations.impulse_to_input,
                translations.populate_data_channel_coders,
            ],
            known_runner_urns=frozenset(),
        )
        self._manager = worker_handlers.WorkerHandlerManager(
            context.components.environments,
            fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo()),
        )
        running = execution.FnApiRunnerExecutionContext(
            [stage],
            self._manager,
            context.components,
            context.safe_coders,
            context.data_channel_coders,
            threads,
        )
        running.setup()
        _, data = running.queues.ready_inputs.deque()
        (self._input,) = data.data
        bundles = running.bundle_manager_for(stage)
        self._manager.register_process_bundle_descriptor(bundles.process_bundle_descriptor)
        self._descriptor = bundles.process_bundle_descriptor.id
        self.threads = threads
        # A harness in memory mixes up the data of bundles that it processes at once: one for each thread.
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for harness in bundles.worker_handlers:
            self._free.put(harness)

    def process(self, batch: Batch) -> list[dict[str, Any]]:
        """Processes messages as a bundle, and returns its user metrics.

        Raises:
          Exception: as the pipeline's code does.
        """
        name = uuid.uuid4().hex
        request = beam_fn_api_pb2.InstructionRequest(
            instruction_id=name,
            process_bundle=beam_fn_api_pb2.ProcessBundleRequest(
                process_bundle_descriptor_id=self._descriptor
            ),
        )
        harness = self._free.get()
        _bundles[name.encode()] = batch
        try:
            impulse = harness.data_conn.output_stream(name, self._input)
            impulse.write(IMPULSE_CODER.encode_nested(GlobalWindows.windowed_value(name.encode())))
            impulse.close()
            response = harness.control_conn.push(request).get()
        finally:
            del _bundles[name.encode()]
            self._free.put(harness)
        if response.error:
            raise RuntimeError(response.error)
        infos = list(response.process_bundle.monitoring_infos)
        return user_metrics(fn_runner.RunnerResult("DONE", {"stage": infos}))

    def close(self) -> None:
        """Tears the pipeline's functions down."""
        self._manager.close_all()


def run(stage: Stage, intake: Intake, service: Service) -> None:
    """Takes in messages, in as many threads as the stage has, until the job is drained."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _work(stage, intake, service)
        except BaseException as error:
            failed.append(error)
            service.draining.set()

    harness = [threading.Thread(target=work, name=f"harness-{number}") for number in range(stage.threads)]
    service.running(subscriptions=intake.own_subscriptions)
    for thread in harness:
        thread.start()
    for thread in harness:
        thread.join()
    if failed:
        raise failed[0]
    stage.close()


def _work(stage: Stage, intake: Intake, service: Service) -> None:
    """A harness thread: one bundle after the other."""
    failures = 0
    while not service.draining.is_set():
        try:
            batch = intake.pull(MAX_MESSAGES)
        except exceptions.GoogleAPICallError as error:
            failures += 1
            service.error(error, "Pulling messages failed and will be tried again.")
            service.draining.wait(_pause(failures))
            continue
        if not batch.elements:
            continue
        failures = 0 if _process(stage, batch, intake, service) else failures + 1
        if failures:
            service.draining.wait(_pause(failures))


def _process(stage: Stage, batch: Batch, intake: Intake, service: Service) -> bool:
    """Processes messages and acknowledges them; returns whether one of them failed alone."""
    start = time.monotonic()
    try:
        metrics = stage.process(batch)
    except Exception as error:
        if len(batch.elements) > 1:
            log.warning("A bundle of %d messages failed; they are tried one by one.", len(batch.elements))
            answered = [_process(stage, one, intake, service) for one in _singly(batch)]
            return all(answered)
        service.error(error, "A message failed and will be redelivered.")
        intake.give_back(batch, seconds=RETRY_SECONDS)
        return False
    intake.acknowledge(batch)
    service.metrics(metrics)
    service.progress()
    log.info("%d messages in %.2f s", len(batch.elements), time.monotonic() - start)
    return True


def _singly(batch: Batch) -> Sequence[Batch]:
    pairs = zip(batch.elements, batch.ack_ids, strict=True)
    return [Batch([element], [ack_id]) for element, ack_id in pairs]


def _pause(failures: int) -> float:
    return min(MAX_PAUSE_SECONDS, 0.1 * 2 ** min(failures, 10))
