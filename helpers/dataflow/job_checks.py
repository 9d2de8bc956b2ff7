"""Finds everything that a job lacks before it is submitted: one list, with the command that fixes each miss.

    python -m helpers.dataflow preflight --messages-subscription ... --runner DataflowRunner --project P ...

It takes the command line of `helpers.pipeline`, and submits nothing. What it cannot check, because the
account in use is not allowed to or the local cloud has no such service, it reports as skipped, not as a miss.

The permissions are those of the account in use. Those of the workers' own account cannot be checked by
others: `helpers.files.access` lists its roles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers.dataflow import job_options, worker_image
from helpers.dataflow.cloud_checks import (
    MISS,
    SKIPPED,
    Finding,
    check_apis,
    check_bucket,
    check_compute,
    check_permissions,
    check_subscription,
    check_topic,
    not_asked,
)
from helpers.dataflow.job_list import list_active
from helpers.files import storage
from helpers.load_state_dict import Manifest, check_companions, read_manifest
from helpers.model_handler import AnsweringOptions
from helpers.model_handler.options import answering_options, takes_options
from helpers.model_handler.prompt_check import check_around_prompts
from helpers.models import ModelError
from helpers.pipeline.command_line import parse, parser
from helpers.pipeline.stream import CommandLineError, check_destinations
from helpers.sizing import MachineTypeError, SizingError, machine_types
from helpers.sizing.services import check_dataflow_worker, needs_reservation
from helpers.sizing.sizes import SERVICE_BYTES


class PreflightError(RuntimeError):
    """Something is missing; the message is the whole list, with the commands that fix it."""


@takes_options
def preflight(
    *,
    project: str,
    location: str,
    temp_location: str,
    state_dict_path: str,
    model_name: str,
    responses_topic: str,
    messages_subscription: str | None = None,
    messages_topic: str | None = None,
    dead_letter_topic: str | None = None,
    job_name: str | None = None,
    machine_type: str | None = None,
    image: str | None = None,
    network: str | None = None,
    torch_index_url: str = "",
    **options: Any,
) -> list[Finding]:
    """Checks everything that a job needs; the arguments mean what they mean for `helpers.dataflow.submit`.

    Args:
        {options}

    Returns:
        A finding for each check. `misses` picks what is missing, `require` raises it.

    Raises:
        TypeError, ValueError: there is no such answering option, or it is out of its range.
    """
    answering = answering_options(options)
    buckets = dict.fromkeys(path for path in (temp_location, state_dict_path) if storage.is_cloud(path))
    topics = [topic for topic in (messages_topic, responses_topic, dead_letter_topic) if topic]
    findings = [*check_apis(project), *check_permissions(project)]
    for name, path in {path.split("/")[2]: path for path in buckets}.items():
        findings += check_bucket(name, path, project, location)
    if not storage.is_cloud(temp_location):
        findings.append(
            Finding(f"temp_location {temp_location}", MISS, "it is not in a bucket", "give gs://BUCKET/temp")
        )
    for topic in dict.fromkeys(topics):
        findings += check_topic(topic)
    if messages_subscription:
        findings += check_subscription(messages_subscription)
    findings += _destinations(
        responses_topic=responses_topic,
        messages_topic=messages_topic,
        messages_subscription=messages_subscription,
        dead_letter_topic=dead_letter_topic,
    )
    manifest_findings, manifest = _state_dict(state_dict_path, model_name)
    findings += manifest_findings
    if manifest:
        sized, chosen = _machine(state_dict_path, manifest, machine_type, answering, bool(image))
        findings += sized
        if chosen:
            gpu = getattr(machine_types.CATALOGUE.get(chosen), "gpu", "")
            findings += check_compute(project, location, chosen, gpu, bool(network))
        findings += _prompts(state_dict_path, answering)
    findings.append(_image(image) if image else _packages(torch_index_url))
    if job_name:
        findings += _job_name(project, location, job_options.valid_job_name(job_name))
    return findings


def misses(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that keep a job from running as it should."""
    return [finding for finding in findings if finding.result == MISS]


def require(findings: Iterable[Finding]) -> None:
    """Raises all misses together.

    Raises:
        PreflightError: something is missing.
    """
    if missing := misses(findings):
        lines = [f"{one.subject}: {one.detail}.\n    {one.mend}" for one in missing]
        raise PreflightError("Not ready to run:\n" + "\n".join(f"{n}. {x}" for n, x in enumerate(lines, 1)))


def _state_dict(path: str, model_name: str) -> tuple[list[Finding], Manifest | None]:
    subject = f"state dict {path}"
    convert = f"python -m helpers.load_state_dict local --model-name={model_name} --state-dict-path={path}"
    if not storage.is_cloud(path):
        return [
            Finding(subject, MISS, "the workers cannot read this machine's disk", "give gs://BUCKET/NAME.pt")
        ], None
    try:
        manifest = read_manifest(path)
        if is_whole := manifest.describes(path):
            check_companions(path, manifest)
    except (OSError, ValueError) as error:
        return [Finding(subject, MISS, str(error), convert)], None
    if not is_whole:
        finding = Finding(
            subject, MISS, "it is not the file that its manifest describes", f"{convert} --overwrite"
        )
    elif not manifest.is_of(model_name):
        finding = Finding(
            subject,
            MISS,
            f"it was made from {manifest.model_name}",
            f"give --model-name={manifest.model_name}, or the path of {model_name}'s state dict",
        )
    else:
        finding = Finding(subject, detail=f"{manifest.bytes / 1e9:.2f} GB, {manifest.dtype}")
    return [finding], manifest


def _machine(
    path: str, manifest: Manifest, machine_type: str | None, answering: AnsweringOptions, has_image: bool
) -> tuple[list[Finding], str]:
    """The findings, and the machine type: the job's own, or the one that sizing chooses, if there is one."""
    if machine_type:
        return list(_given_machine(path, manifest, machine_type, answering, has_image)), machine_type
    wants_gpu = job_options.wants_gpu(answering.device)
    settings = answering.workload() | job_options.computing(answering)
    try:
        sizing = job_options.size_for_serving(path, manifest, on_gpu=wants_gpu, **settings)
    except (MachineTypeError, ModelError, SizingError, OSError, ValueError) as error:
        return [_not_sized("(from sizing)", error)], ""
    name = sizing.serve.machine.name
    return [Finding(f"machine {name}", detail="the smallest that holds the model")], name


def _not_sized(name: str, error: Exception) -> Finding:
    return Finding(
        f"machine {name}", MISS, str(error), "choose a smaller model, or another family of machines"
    )


def _given_machine(
    path: str, manifest: Manifest, machine_type: str, answering: AnsweringOptions, has_image: bool
) -> Iterator[Finding]:
    subject = f"machine {machine_type}"
    try:
        check_dataflow_worker(machine_type, has_own_image=has_image)
    except MachineTypeError as error:
        yield Finding(subject, MISS, str(error), "leave it out, or name another")
        return
    if needs_reservation(machine_type):
        yield Finding(f"reservation of {machine_type}", SKIPPED, "without one, it hardly ever starts")
    machine = machine_types.CATALOGUE.get(machine_type)
    if machine is None:
        detail = "it is not in this project's catalogue, so it is not known whether the model fits"
        yield Finding(subject, SKIPPED, detail)
        return
    settings = answering.workload() | job_options.computing(answering)
    try:
        sizing = job_options.size_for_serving(path, manifest, family=machine.family, **settings)
    except (MachineTypeError, ModelError, SizingError, OSError, ValueError) as error:
        yield _not_sized(machine_type, error)
        return
    if job_options.wants_gpu(answering.device) and not machine.gpu:
        yield Finding(
            subject, MISS, "it has no GPU", "leave the machine type out, or name one of g2, a2 or a3"
        )
        return
    memory = machine.gpu_memory_bytes if machine.gpu else machine.memory_bytes
    needed, usable = sizing.serve.memory_bytes, memory * (1 - sizing.headroom)
    if not machine.gpu:
        usable -= SERVICE_BYTES["project"]
    if needed > usable:
        yield Finding(
            subject,
            MISS,
            f"the model needs {needed / 1e9:.1f} GB, but the machine has {usable / 1e9:.1f} GB for it",
            f"give --machine_type={sizing.serve.machine.name}, or leave it out",
        )
    else:
        yield Finding(subject, detail=f"{needed / 1e9:.1f} of {usable / 1e9:.1f} GB")


def _prompts(path: str, answering: AnsweringOptions) -> Iterator[Finding]:
    """Whether the model can be asked as the options say; nothing where they say nothing."""
    try:
        if check_around_prompts(path, answering):
            yield Finding("system prompt and template", detail="they leave room for prompts")
    except (OSError, ValueError) as error:
        yield Finding("system prompt and template", MISS, str(error), "change them, or the prompt format")


def _destinations(**named: str | None) -> Iterator[Finding]:
    try:
        check_destinations(**named)
    except CommandLineError as error:
        yield Finding("source and destinations", MISS, str(error), "gcloud pubsub topics create ANOTHER")


def _packages(torch_index_url: str) -> Finding:
    subject = "packages, without an image"
    if torch_index_url:
        return Finding(subject, detail=f"each new worker installs them, with torch from {torch_index_url}")
    detail = "each new worker installs them, CUDA's with torch's: torch_index_url spares several GB on CPUs"
    return Finding(subject, detail=detail)


def _image(image: str) -> Finding:
    subject, here, there = f"image {image}", worker_image.python_here(), worker_image.python_of(image)
    if there is None:
        return Finding(subject, SKIPPED, f"its name does not tell whether it has Python {here}, as it must")
    if there != here:
        return Finding(
            subject,
            MISS,
            f"it has Python {there}, and this is Python {here}: its workers could not read the pipeline",
            f"submit from Python {there}, or build one here: python -m helpers.dataflow image build",
        )
    return Finding(subject, detail=f"Python {there}, as here")


def _job_name(project: str, location: str, name: str) -> Iterator[Finding]:
    subject = f"job name {name}"
    try:
        active = list_active(project, location)
    except (GoogleAPICallError, GoogleAuthError) as error:
        yield not_asked(subject, error, "--role=roles/dataflow.developer")
        return
    for one in active:
        if one.name == name:
            command = f"python -m helpers.dataflow drain --project={project} --region={location} {name}"
            yield Finding(
                subject, MISS, f"in use by {one.job.job_id}, {one.state}", f"{command}, or another name"
            )
            return
    yield Finding(subject)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Exit codes: 0 if nothing is missing; 1 if something is, with the misses on stderr; 2 for a command line
    that is not understood.
    """
    own = parser("python -m helpers.dataflow preflight")
    own.description = "Says what a job would miss; the arguments are those of python -m helpers.pipeline."
    try:
        own.parse_known_args(argv)  # for its --help
        given = parse(argv)
    except CommandLineError as error:
        own.print_usage(sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 2
    beam_options = PipelineOptions(given.beam)
    cloud, worker = beam_options.view_as(GoogleCloudOptions), beam_options.view_as(WorkerOptions)
    if absent := [n for n in ("project", "region", "temp_location") if not getattr(cloud, n)]:
        print(f"error: give {', '.join(f'--{name}' for name in absent)}", file=sys.stderr)
        return 2
    try:
        findings = preflight(
            **given.arguments,
            project=cloud.project,
            location=cloud.region,
            temp_location=cloud.temp_location,
            job_name=cloud.job_name,
            machine_type=worker.machine_type,
            image=worker.sdk_container_image,
            network=worker.network or worker.subnetwork,
            torch_index_url=given.job.get("torch_index_url", ""),
        )
        for finding in findings:
            print(f"{finding.result:8}{finding.subject}  {finding.detail}".rstrip())
        require(findings)
    except (PreflightError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
