"""A job in its worker: set up from what was staged, and run by the engine that suits it."""

import json
from pathlib import Path

import apache_beam as beam
from apache_beam.internal import pickler
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions, SetupOptions, StandardOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from google.cloud import pubsub_v1

from . import bundles, graph, staged_files
from .messages import Intake, Publish
from .service import BROKEN, FINISHED, JOB_FAILED, Service, user_metrics

HARNESS_THREADS = 12  # of a streaming Python worker on Dataflow that is told nothing else


class Job:
    """A job that is ready to run.

    Raises:
      Exception: of any kind, if the job cannot run, as when a package, topic or subscription is missing.
    """

    def __init__(self, folder: Path, service: Service):
        settings = json.loads((folder / "settings.json").read_text())
        self._service = service
        self._options = PipelineOptions.from_dictionary(settings["options"])
        self._streaming = self._options.view_as(StandardOptions).streaming
        library = self._options.view_as(SetupOptions).pickle_library
        pickler.set_library("cloudpickle" if library == "default" else library)
        with FileSystems.open(settings["pipeline_url"]) as file:
            self._pipeline = beam_runner_api_pb2.Pipeline.FromString(file.read())
        staged = folder / "staged"
        if not staged.exists():
            staged_files.fetch(self._pipeline, staged)
            staged_files.install(staged, service)
        staged_files.load_main_session(staged)
        # Dataflow would notice at the first element; here a package that was not staged is noticed at once.
        beam.Pipeline.from_runner_api(self._pipeline, FnApiRunner(), self._options)
        if settings["replaces"]:
            with FileSystems.open(settings["replaces"]) as file:
                old = beam_runner_api_pb2.Pipeline.FromString(file.read())
            graph.check_update(old, self._pipeline, settings["transform_name_mapping"])
        if self._streaming:
            source = self._source()
            graph.replace_sinks(self._pipeline, Publish)
            threads = self._options.view_as(DebugOptions).number_of_worker_harness_threads
            self._stage = bundles.Stage(self._pipeline, source, threads or HARNESS_THREADS)
            self._intake = Intake(source, settings["name"])

    def run(self) -> int:
        """Runs the job to its end and returns the worker's exit status."""
        if not self._streaming:
            return self._run_batch()
        self._service.before_exit(self._intake.close)
        self._service.before_exit(self._intake.give_back_all)
        try:
            bundles.run(self._stage, self._intake, self._service)
        except BaseException as error:
            self._service.error(error, "The pipeline failed.")
            return BROKEN
        if not self._service.handing_over:
            self._intake.close()
        return FINISHED

    def _run_batch(self) -> int:
        graph.use_this_process(self._pipeline)
        self._service.running()
        try:
            result = FnApiRunner().run_via_runner_api(self._pipeline, self._options)
            result.wait_until_finish()
        except BaseException as error:
            self._service.error(error, "The pipeline failed.")
            return JOB_FAILED
        self._service.metrics(user_metrics(result))
        return FINISHED

    def _source(self) -> graph.Source:
        sources = graph.sources(self._pipeline)
        if len(sources) != 1:
            raise ValueError("A streaming job on the local cloud must read from Pub/Sub, by one read.")
        if sources[0].id_attribute:
            self._service.message("WARNING", "id_label is ignored here: duplicates are not removed.")
        publisher = pubsub_v1.PublisherClient()
        for topic in graph.sink_topics(self._pipeline):
            publisher.get_topic(topic=topic)
        publisher.stop()
        return sources[0]
