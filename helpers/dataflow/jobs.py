"""A streaming job on Dataflow, from Python: submitted, and updated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
from apache_beam.transforms.ptransform import PTransform
from google.api_core.exceptions import Forbidden, GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers.dataflow.job import Job, JobError
from helpers.dataflow.job_guard import DRAIN_LABEL
from helpers.dataflow.job_options import valid_job_name
from helpers.dataflow.submission import submit as submit_pipeline
from helpers.files import access
from helpers.model_handler.options import answering_options, takes_options
from helpers.pipeline.command_line import check_beam_arguments

UPDATE_SECONDS = 900.0
"""How long an updated job may take to answer a first message: new workers start for it."""


@takes_options
def submit(
    *,
    project: str,
    location: str,
    temp_location: str,
    job_name: str,
    model_name: str,
    state_dict_path: str,
    responses_topic: str,
    messages_subscription: str | None = None,
    messages_topic: str | None = None,
    dead_letter_topic: str | None = None,
    machine_type: str | None = None,
    image: str | None = None,
    max_workers: int | None = None,
    exactly_once: bool = False,
    max_run_minutes: float | None = None,
    helpers_in_image: bool = False,
    torch_index_url: str = "",
    beam_options: Sequence[str] = (),
    before: PTransform | None = None,
    after: PTransform | None = None,
    **options: Any,
) -> Job:
    """Submits Pub/Sub → model → Pub/Sub as a streaming job.

    Args:
        project: the id of the Google Cloud project.
        location: the region, for instance `us-central1`.
        temp_location: a `gs://` folder for the files that the job stages.
        job_name: lower-case letters, digits and dashes; see `valid_job_name`.
        model_name: the model that the state dict was made from.
        state_dict_path: `gs://.../NAME.pt`.
        responses_topic: the path of the topic for the responses.
        messages_subscription: the path of the subscription to read; messages published before the job runs
            wait in it.
        messages_topic: the path of a topic to read instead, from when the job runs.
        dead_letter_topic: the path of the topic for messages without a response.
        machine_type: the workers' machine type; None or an empty text takes the smallest that holds the
            model.
        image: the workers' image, as `helpers.dataflow.worker_image` builds it; None or an empty text takes
            Beam's own, into which each worker installs what is missing when it starts.
        max_workers: how many workers Dataflow may start; None takes
            `helpers.dataflow.job_options.MAX_WORKERS`.
        exactly_once: whether Dataflow removes duplicates, at more latency and cost.
        max_run_minutes: minutes after which the job is drained, whatever has become of this process; see
            `helpers.dataflow.job_guard`.
        helpers_in_image: whether the image has this package, so that it need not be sent along.
        torch_index_url: for workers without an image: the package index of torch without CUDA, which
            PyTorch's installation page (pytorch.org/get-started) names for Linux, pip, CPU. Without it, each
            new worker fetches several GB of CUDA's libraries, also one without a GPU.
        beam_options: further options of Beam's, as on a command line; they win over what is chosen here.
        before, after: steps of one's own, as for `helpers.pipeline.build`.
        {options}

    Returns:
        The job, which has been created but is not running yet.

    Raises:
        JobError: the name is in use, or Dataflow does not accept the job; the message says what to do.
        CommandLineError, OptionError: options of Beam's that it does not know, or that do not go together.
        TypeError, ValueError: there is no such answering option, or it is out of its range.
        MachineTypeError, ModelError, SizingError: no machine is large enough, or no such model can be served.
        WrongModelError: the state dict was made from another model.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    answering_options(
        options
    )  # early: an option that does not exist must not cost the time to look at the rest
    check_beam_arguments(beam_options)
    chosen = {
        "runner": "DataflowRunner",
        "project": project,
        "region": location,
        "temp_location": temp_location,
        "job_name": valid_job_name(job_name),
        "machine_type": machine_type,
        "sdk_container_image": image,
        "max_num_workers": max_workers,
    }
    theirs = PipelineOptions(list(beam_options)).get_all_options(drop_default=True)
    chosen = {name: value for name, value in chosen.items() if value not in (None, "") and name not in theirs}
    arguments = {
        "model_name": model_name,
        "state_dict_path": state_dict_path,
        "responses_topic": responses_topic,
        "messages_subscription": messages_subscription,
        "messages_topic": messages_topic,
        "dead_letter_topic": dead_letter_topic,
        "before": before,
        "after": after,
    }
    try:
        result = submit_pipeline(
            PipelineOptions(list(beam_options), **chosen),
            arguments | options,
            max_run_minutes=max_run_minutes,
            exactly_once=exactly_once,
            helpers_in_image=helpers_in_image,
            torch_index_url=torch_index_url,
        )
        return Job(project, location, result.job_id())
    except DataflowJobAlreadyExistsError as error:  # submitted by somebody else in the meantime
        raise JobError(str(error)) from error
    except GoogleAuthError as error:
        raise JobError(f"No credentials: {access.log_in()}. ({error})") from error
    except Forbidden as error:
        raise JobError(access.explain(error, project)) from error
    except GoogleAPICallError as error:
        raise JobError(
            f"Dataflow in {project}, {location}, does not accept the job: {error.message} "
            "(helpers.dataflow.preflight looks for what is missing.)"
        ) from error


def update(
    job: Job,
    *,
    transform_name_mapping: Mapping[str, str] | None = None,
    timeout: float = UPDATE_SECONDS,
    **arguments: Any,
) -> Job:
    """Replaces a running job by a new one, with another state dict, other options, or new code.

    The new job takes over what the old one has read but not answered. It must have all steps of the old one:
    give `dead_letter_topic`, `before` and `after` as then. For a new state dict at the same path
    there is a lighter way: `submit(..., reload_seconds=...)` takes it up without a new job.

    Args:
        job: the running job.
        transform_name_mapping: maps the names of the old pipeline's steps to the new ones, where they differ.
        timeout: seconds to wait for the new job to run.
        arguments: those of `submit`, except `project`, `location` and `job_name`, which stay.

    Returns:
        The new job, now running. The old one has ended as UPDATED.

    Raises:
        JobError: the old job is not running, or cannot be replaced by the new one: then it goes on.
    """
    described = job.describe()
    state = described.current_state.name.removeprefix("JOB_STATE_")
    # If no job of this name is running, Beam looks for one again and again, for ever.
    if state != "RUNNING":
        raise JobError(f"Only a running job can be updated, but {job.job_id} is {state}: submit a new one.")
    options = [*arguments.pop("beam_options", ()), "--update"]
    deadline = described.labels.get(DRAIN_LABEL)
    if deadline and arguments.get("max_run_minutes") is None:
        options.append(f"--labels={DRAIN_LABEL}={deadline}")  # the old job's guard holds the new one to it
    if transform_name_mapping:
        options.append(f"--transform_name_mapping={json.dumps(dict(transform_name_mapping))}")
    new = submit(
        project=job.project,
        location=job.location,
        job_name=described.name,
        beam_options=options,
        **arguments,
    )
    new.wait_for("RUNNING", timeout=timeout)
    job.wait_for("UPDATED", timeout=timeout)  # until then it may still answer messages
    return new
