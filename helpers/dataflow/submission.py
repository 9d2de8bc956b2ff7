"""Submits the pipeline as a Dataflow job: sets options, stages the package, checks the name, adds a guard."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, TestOptions
from apache_beam.runners.runner import PipelineResult

from helpers.dataflow import job_guard, job_options
from helpers.dataflow.job import Job
from helpers.dataflow.job_list import check_name
from helpers.model_handler.options import NAMES, answering_options
from helpers.model_handler.prompt_check import check_around_prompts
from helpers.pipeline.stream import CommandLineError, check_destinations, start

log = logging.getLogger(__name__)


def submit(
    beam_options: PipelineOptions,
    arguments: dict[str, Any],
    *,
    max_run_minutes: float | None = None,
    exactly_once: bool = False,
    helpers_in_image: bool = False,
    torch_index_url: str = "",
) -> PipelineResult:
    """Submits the pipeline as a language-model job, or writes a template if the options say so.

    Both the command line and `helpers.dataflow.submit` end here.

    Args:
        beam_options: Beam's options; what they leave unset is chosen here, see
            `helpers.dataflow.job_options`.
        arguments: of `helpers.pipeline.build`.
        max_run_minutes: minutes after which `helpers.dataflow.job_guard` drains the job.
        exactly_once: whether Dataflow removes duplicates.
        helpers_in_image: whether the workers' image has this package, so that it need not be sent along.
        torch_index_url: the index of torch without CUDA, for workers without an image.

    Raises:
        CommandLineError: a time for a job that is not submitted now; a destination that is also the source.
        JobError: the job's name is in use, or there is no job of this name to update.
        TypeError, ValueError: there is no such answering option, or it is out of its range.
        OptionError, MachineTypeError, ModelError, SizingError: options or models that no worker can serve.
        PromptError: the model cannot be asked as the options say.
        WrongModelError: the state dict was made from another model.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    cloud = beam_options.view_as(GoogleCloudOptions)
    is_submitted = not (cloud.template_location or beam_options.view_as(TestOptions).dry_run)
    if not is_submitted and max_run_minutes is not None:
        raise CommandLineError("--max-run-minutes is for a job that is submitted now")
    answering = {name: arguments[name] for name in NAMES if name in arguments}
    if answering.get("torch_threads") is None and (threads := job_options.torch_threads(beam_options)):
        answering["torch_threads"] = threads
    options = answering_options(answering)
    check_destinations(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        job_options.set_defaults(
            beam_options,
            model_name=arguments["model_name"],
            state_dict_path=arguments["state_dict_path"],
            answering=options,
            exactly_once=exactly_once,
            max_run_minutes=max_run_minutes,
            has_cuda=not torch_index_url,
        )
        check_around_prompts(arguments["state_dict_path"], options)
        if not helpers_in_image:
            job_options.stage_helpers(beam_options, folder, options, torch_index_url)
        if is_submitted:
            check_name(cloud)
        result = start(beam_options, arguments | answering)
    if is_submitted:
        job = Job(cloud.project, cloud.region, result.job_id())
        log.info(
            "To watch the job: python -m helpers.dataflow watch --project=%s --region=%s %s\n"
            "To end it, write drain for watch. Its page in Google Cloud's console: %s",
            *(job.project, job.location, job.job_id, job.url),
        )
    if max_run_minutes is not None:
        job_guard.start(cloud.project, cloud.region, result.job_id(), max_run_minutes)
    return result
