"""What a job would miss, found before it is submitted: one list, each miss with the command that mends it.

    python -m helpers.preflight --messages-subscription ... --runner DataflowRunner --project P ...

It takes the command line of ``helpers.pipeline``, and submits nothing. What it cannot ask for, because the
account in use may not or the local cloud has no such service, it tells as skipped, which is no miss.

The permissions are those of the account in use. What the workers' own account may do cannot be asked for by
others: it needs roles/dataflow.worker, roles/storage.objectUser on the buckets, roles/pubsub.subscriber and
roles/pubsub.publisher.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers import machine_types, pipeline
from helpers.files import storage
from helpers.jobs import job_options
from helpers.jobs.cloud_checks import (
    MISS,
    SKIPPED,
    Finding,
    check_apis,
    check_bucket,
    check_permissions,
    check_subscription,
    check_topic,
    not_asked,
)
from helpers.jobs.job_list import list_active
from helpers.machine_types import MachineTypeError
from helpers.memory.model_memory import SizingError
from helpers.state_dicts.manifest import Manifest, read_manifest


class PreflightError(RuntimeError):
    """Something is missing; the message is the whole list, with the commands that mend it."""


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
    device: str | None = None,
    **batch_options: int,
) -> list[Finding]:
    """Looks at everything that a job needs; the arguments are those of ``helpers.dataflow.submit``.

    Args:
        batch_options: ``max_response_tokens``, ``max_batch_size``, ``max_batch_tokens``, which a machine must
            have the memory for.

    Returns:
        What was looked at. ``misses`` picks what is missing, ``require`` raises it.
    """
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
    manifest_findings, manifest = _state_dict(state_dict_path, model_name)
    findings += manifest_findings
    if manifest:
        workload = job_options.workload_of(**batch_options)
        findings += _machine(state_dict_path, manifest, machine_type, device, workload)
    if job_name:
        findings += _job_name(project, location, job_options.valid_job_name(job_name))
    return findings


def misses(findings: Iterable[Finding]) -> list[Finding]:
    """Those of the findings that keep a job from running as it should."""
    return [finding for finding in findings if finding.result == MISS]


def require(findings: Iterable[Finding]) -> None:
    """Raises all misses together.

    Raises:
        PreflightError: there are some.
    """
    if missing := misses(findings):
        lines = [f"{one.subject}: {one.detail}.\n    {one.mend}" for one in missing]
        raise PreflightError("The job would miss:\n" + "\n".join(f"{n}. {x}" for n, x in enumerate(lines, 1)))


def _state_dict(path: str, model_name: str) -> tuple[list[Finding], Manifest | None]:
    subject = f"state dict {path}"
    convert = f"python -m helpers.load_state_dict local --model-name={model_name} --state-dict-path={path}"
    if not storage.is_cloud(path):
        return [
            Finding(subject, MISS, "the workers cannot read this machine's disk", "give gs://BUCKET/NAME.pt")
        ], None
    try:
        manifest = read_manifest(path)
        content = storage.size_and_crc32c(path)
    except (OSError, ValueError) as error:
        return [Finding(subject, MISS, str(error), convert)], None
    if content != (manifest.bytes, manifest.crc32c):
        finding = Finding(
            subject, MISS, "it is not the file that its manifest describes", f"{convert} --overwrite"
        )
    elif manifest.model_name != model_name:
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
    path: str, manifest: Manifest, machine_type: str | None, device: str | None, workload: dict[str, int]
) -> Iterator[Finding]:
    machine = machine_types.CATALOGUE.get(machine_type or "")
    if machine_type and machine is None:
        detail = "it is not in this project's catalogue: whether the model fits is not known"
        yield Finding(f"machine {machine_type}", SKIPPED, detail)
        return
    subject = f"machine {machine_type or '(from sizing)'}"
    try:
        if machine is None:
            sizing = job_options.size_for_serving(
                path, manifest, on_gpu=job_options.wants_gpu(device), **workload
            )
            machine = sizing.serve.machine
            yield Finding(f"machine {machine.name}", detail="the smallest that holds the model")
            return
        sizing = job_options.size_for_serving(path, manifest, family=machine.family, **workload)
    except (MachineTypeError, SizingError, OSError, ValueError) as error:
        yield Finding(subject, MISS, str(error), "choose a smaller model, or another family of machines")
        return
    if job_options.wants_gpu(device) and not machine.gpu:
        yield Finding(
            subject, MISS, "it has no GPU", "leave the machine type out, or name one of g2, a2 or a3"
        )
        return
    memory = machine.gpu_memory_bytes if machine.gpu else machine.memory_bytes
    needed, usable = sizing.serve.memory_bytes, memory * (1 - sizing.headroom)
    if needed > usable:
        yield Finding(
            subject,
            MISS,
            f"the model needs {needed / 1e9:.1f} GB, and it has {usable / 1e9:.1f} GB for it",
            f"give --machine_type={sizing.serve.machine.name}, or leave it out",
        )
    else:
        yield Finding(subject, detail=f"{needed / 1e9:.1f} of {usable / 1e9:.1f} GB")


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
    """The command line: 0 if nothing is missing, else 2; the misses are on stderr."""
    try:
        arguments, beam_arguments = pipeline.parser().parse_known_args(argv)
    except pipeline.CommandLineError as error:
        pipeline.end_with_usage(error)
    options = PipelineOptions(beam_arguments)
    cloud, worker = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    given = vars(arguments)
    names = ("messages_topic", "messages_subscription", "responses_topic", "dead_letter_topic")
    names += ("state_dict_path", "model_name", "device")
    names += ("max_response_tokens", "max_batch_size", "max_batch_tokens")
    if absent := [n for n in ("project", "region", "temp_location") if not getattr(cloud, n)]:
        print(f"error: give {', '.join(f'--{name}' for name in absent)}", file=sys.stderr)
        return 2
    findings = preflight(
        **{name: given[name] for name in names if name in given},
        project=cloud.project,
        location=cloud.region,
        temp_location=cloud.temp_location,
        job_name=cloud.job_name,
        machine_type=worker.machine_type,
    )
    for finding in findings:
        print(f"{finding.result:8}{finding.subject}  {finding.detail}".rstrip())
    try:
        require(findings)
    except PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
