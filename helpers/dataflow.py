"""The streaming job on Dataflow, from Python and from a command line: submitted, updated, watched, stopped.

    python -m helpers.dataflow list    --project P --region R
    python -m helpers.dataflow watch   --project P --region R [--minutes M] JOB
    python -m helpers.dataflow drain   --project P --region R JOB
    python -m helpers.dataflow cancel  --project P --region R JOB
    python -m helpers.dataflow scale   --project P --region R --workers LEAST MOST JOB
    python -m helpers.dataflow reap    --project P --region R [--overdue]

JOB is a job's id or name. ``reap`` drains every job that these notebooks started; with ``--overdue``, those
whose ``--max-run-minutes`` are over. A job is submitted by ``python -m helpers.pipeline``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers import pipeline
from helpers.jobs.dataflow_job import TERMINAL, Job, JobError, Status
from helpers.jobs.job_guard import DRAIN_LABEL
from helpers.jobs.job_list import ListedJob, find_name, list_series, reap
from helpers.jobs.job_options import valid_job_name

__all__ = [
    "TERMINAL",
    "Job",
    "JobError",
    "ListedJob",
    "Status",
    "find_name",
    "list_series",
    "reap",
    "submit",
    "update",
    "valid_job_name",
]


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
    max_response_tokens: int = 256,
    machine_type: str | None = None,
    image: str | None = None,
    device: str | None = None,
    max_workers: int | None = None,
    exactly_once: bool = False,
    max_run_minutes: float | None = None,
    beam_options: Sequence[str] = (),
    **handler_options: Any,
) -> Job:
    """Submits Pub/Sub → model → Pub/Sub as a streaming job.

    Args:
        project: the id of the Google Cloud project.
        location: the region, for instance ``us-central1``.
        temp_location: a ``gs://`` folder for what the job stages.
        job_name: lower-case letters, digits and dashes; see ``valid_job_name``.
        model_name: the model that the state dict was made from.
        state_dict_path: ``gs://.../NAME.pt``.
        responses_topic: path of the topic for the responses.
        messages_subscription: path of the subscription to read: messages that are published before the job
            runs wait in it.
        messages_topic: path of the topic to read instead, from when the job runs.
        dead_letter_topic: path of the topic for messages that cannot be answered.
        max_response_tokens: a response ends here, unless the model ends it before.
        machine_type: of the workers; None takes the smallest that holds the model.
        image: of the workers, as ``helpers.worker_image`` builds it; None takes Beam's own, into which each
            worker installs what is missing when it starts.
        device: ``"cuda"`` for workers with a GPU.
        max_workers: that Dataflow may start; None takes ``helpers.jobs.job_options.MAX_WORKERS``.
        exactly_once: whether Dataflow is to remove duplicates, for more latency and cost.
        max_run_minutes: after which the job is drained, whatever has become of this process; see
            ``helpers.jobs.job_guard``.
        beam_options: further options, as on a command line; they win over what is chosen here.
        handler_options: as the command line of ``helpers.pipeline`` has them, for instance
            ``reload_seconds=60``.

    Returns:
        The job; it has been created, and is not running yet.

    Raises:
        JobError: the name is in use, or Dataflow does not take the job; the message says what to do.
        CommandLineError, OptionError: a value out of its range, or options that do not go together.
        TypeError: an option that ``helpers.pipeline`` does not have.
        MachineTypeError, SizingError: no machine is large enough, or the model is of no known kind.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    handler_flags = _flags({name.replace("_", "-"): value for name, value in handler_options.items()})
    arguments = _flags(
        {
            "messages-subscription": messages_subscription,
            "messages-topic": messages_topic,
            "responses-topic": responses_topic,
            "dead-letter-topic": dead_letter_topic,
            "state-dict-path": state_dict_path,
            "model-name": model_name,
            "max-response-tokens": max_response_tokens,
            "device": device,
            "max-run-minutes": max_run_minutes,
            "exactly-once": exactly_once,
            "runner": "DataflowRunner",
            "project": project,
            "region": location,
            "temp_location": temp_location,
            "job_name": valid_job_name(job_name),
            "machine_type": machine_type,
            "sdk_container_image": image,
            "max_num_workers": max_workers,
        }
    )
    arguments += [*handler_flags, *beam_options]
    # Beam takes options that it does not know, and says nothing.
    _, for_beam = pipeline.parser().parse_known_args(arguments)
    if unknown := [flag for flag in handler_flags if flag in for_beam]:
        raise TypeError(f"submit() knows no {', '.join(unknown)}: see `python -m helpers.pipeline --help`.")
    return _submit(arguments, project, location)


def update(
    job: Job,
    *,
    transform_name_mapping: Mapping[str, str] | None = None,
    timeout: float = 900,
    **arguments: Any,
) -> Job:
    """Puts a new job in a running one's place: another state dict, other options, or new code.

    What the old job has read and not answered goes over to the new one. For a new state dict at the same path
    there is a lighter way: ``submit(..., reload_seconds=...)`` takes it up as it is, with no new job.

    Args:
        job: that runs.
        transform_name_mapping: from names of the old pipeline's steps to those of the new, where they differ.
        timeout: seconds to wait for the new job to run.
        arguments: those of ``submit``, save ``project``, ``location`` and ``job_name``, which stay.

    Returns:
        The new job, which runs. The old one ends as UPDATED.

    Raises:
        JobError: the old job does not run, or the new one cannot replace it: then the old one goes on.
    """
    described = job.describe()
    state = described.current_state.name.removeprefix("JOB_STATE_")
    # Beam asks for the job of this name again and again, without end, when there is none.
    if state != "RUNNING":
        raise JobError(f"Only a running job can be updated, and {job.job_id} is {state}: submit a new one.")
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
    job.wait_for("UPDATED", timeout=timeout)  # until then it may still answer what comes
    return new


def _flags(named: Mapping[str, Any]) -> list[str]:
    """A command line from names and values; None and False leave a flag out, True gives it alone."""
    given = {name: value for name, value in named.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def _submit(arguments: list[str], project: str, location: str) -> Job:
    try:
        return Job(project, location, pipeline.run(arguments).job_id())
    except DataflowJobAlreadyExistsError as error:  # submitted by somebody else in the meantime
        raise JobError(str(error)) from error
    except GoogleAuthError as error:
        raise JobError(f"No credentials: run `gcloud auth application-default login`. ({error})") from error
    except GoogleAPICallError as error:
        raise JobError(
            f"Dataflow in {project}, {location}, does not take the job: {error.message} "
            "(helpers.preflight looks for what is missing.)"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 if all went well, 2 and a line on stderr for what the user can mend."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--project", required=True)
    common.add_argument("--region", required=True)
    parser = argparse.ArgumentParser(prog="python -m helpers.dataflow", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[common], help="the jobs that these notebooks started")
    for command, text in (("watch", "until it has ended"), ("drain", "and wait"), ("cancel", "and wait")):
        one = commands.add_parser(command, parents=[common], help=f"{command} a job {text}")
        one.add_argument("job", metavar="JOB", help="its id or name")
        if command == "watch":
            one.add_argument("--minutes", type=float, default=10.0, help="how long at most (default: 10)")
    scaler = commands.add_parser("scale", parents=[common], help="set how many workers a job may choose")
    scaler.add_argument("--workers", nargs=2, type=int, required=True, metavar=("LEAST", "MOST"))
    scaler.add_argument("job", metavar="JOB", help="its id or name")
    reaper = commands.add_parser("reap", parents=[common], help="drain the jobs that these notebooks started")
    reaper.add_argument("--overdue", action="store_true", help="only those whose time is over")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except (JobError, GoogleAPICallError, GoogleAuthError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    where = arguments.project, arguments.region
    if arguments.command == "list":
        for listed in list_series(*where):
            _print(listed.row())
    elif arguments.command == "reap":
        for listed, state in reap(*where, overdue_only=arguments.overdue):
            _print({"name": listed.name, "state": state, "job": listed.job.job_id})
    else:
        job = find_name(*where, arguments.job) or Job(*where, arguments.job)
        if arguments.command == "watch":
            for status in job.watch(seconds=arguments.minutes * 60):
                _print(status.row())
        elif arguments.command == "scale":
            job.scale(*arguments.workers)
        else:
            _print({"state": job.drain() if arguments.command == "drain" else job.cancel()})


def _print(row: Mapping[str, object]) -> None:
    print("  ".join(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
