"""The pipeline as a Dataflow job: options chosen, package staged, name checked, submitted, guarded."""

from __future__ import annotations

import tempfile
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, TestOptions
from apache_beam.runners.runner import PipelineResult

from helpers import pipeline
from helpers.jobs import job_guard, job_options
from helpers.jobs.job_list import check_name

# Of the pipeline's arguments, those that its machine is sized by.
SIZE_ARGUMENTS = (
    "model_name",
    "state_dict_path",
    "device",
    "max_response_tokens",
    "max_batch_size",
    "max_batch_tokens",
)


def submit(
    options: PipelineOptions,
    values: dict[str, Any],
    *,
    max_run_minutes: float | None = None,
    exactly_once: bool = False,
    helpers_in_image: bool = False,
) -> PipelineResult:
    """Submits the pipeline as a job for a language model; or writes a template, if the options say so.

    Args:
        options: Beam's; what is not chosen in them is chosen here, see ``helpers.jobs.job_options``.
        values: the arguments of ``helpers.pipeline.build``.
        max_run_minutes: after which ``helpers.jobs.job_guard`` drains the job.
        exactly_once: whether Dataflow is to remove duplicates.
        helpers_in_image: whether the workers' image has this package, so that it need not be sent along.

    Raises:
        CommandLineError: a time for a job that is not submitted now.
        JobError: the job's name is in use, or there is no job of this name to update.
        OptionError, MachineTypeError, SizingError: options or models that no worker can serve.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    cloud = options.view_as(GoogleCloudOptions)
    is_submitted = not (cloud.template_location or options.view_as(TestOptions).dry_run)
    if not is_submitted and max_run_minutes is not None:
        raise pipeline.CommandLineError("--max-run-minutes is for a job that is submitted now")
    with tempfile.TemporaryDirectory() as folder:
        if not helpers_in_image:
            job_options.stage_helpers(options, folder)
        job_options.set_defaults(
            options,
            **{name: values[name] for name in SIZE_ARGUMENTS if name in values},
            exactly_once=exactly_once,
            max_run_minutes=max_run_minutes,
        )
        if threads := job_options.torch_threads(options):
            values.setdefault("torch_threads", threads)
        if is_submitted:
            check_name(cloud)
        result = pipeline.start(options, values)
    if max_run_minutes is not None:
        job_guard.start(cloud.project, cloud.region, result.job_id(), max_run_minutes)
    return result
