"""Pub/Sub → language model → Pub/Sub, built into a Beam pipeline and started on whatever runner is named."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult

from helpers.load_state_dict import read_manifest
from helpers.model_handler.options import options_among, takes_options
from helpers.model_handler.prompt_check import check_around_prompts
from helpers.pipeline.transforms import AskMessages

LAUNCHERS = "streaming_llm_helpers.launchers"
"""The entry points, in pyproject.toml, of what starts a pipeline on a runner that needs more than the
pipeline: for Dataflow, a job around it. They are named by the runner, so that no step knows a later one."""


class CommandLineError(ValueError):
    """Arguments that are not understood, or do not go together; the message says which."""


@takes_options
def build(
    pipeline: beam.Pipeline,
    *,
    model_name: str,
    state_dict_path: str,
    responses_topic: str,
    messages_topic: str | None = None,
    messages_subscription: str | None = None,
    dead_letter_topic: str | None = None,
    before: beam.PTransform | None = None,
    after: beam.PTransform | None = None,
    **options: Any,
) -> None:
    """Adds Pub/Sub → model → Pub/Sub to a pipeline.

    Args:
        pipeline: a streaming pipeline.
        model_name: the model that the state dict was made from.
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        responses_topic: `projects/P/topics/T`.
        messages_topic: a topic to read through the job's own subscription, which sees only what is published
            from then on.
        messages_subscription: a subscription to read instead of a topic; messages wait in it for the job.
        dead_letter_topic: for messages without a response; without it they are only logged and counted.
        before: a step of one's own between reading and asking, from `PubsubMessage`s to `PubsubMessage`s. An
            error in it is retried for ever, as any in a streaming job.
        after: one between asking and writing the responses.
        {options}

    Raises:
        CommandLineError: responses or dead letters would go to `messages_topic`.
    """
    _check_not_read(messages_topic or "", responses_topic, dead_letter_topic)
    source = beam.io.ReadFromPubSub(
        topic=messages_topic, subscription=messages_subscription, with_attributes=True
    )
    messages = pipeline | "Read messages" >> source
    if before is not None:
        messages = messages | "Before" >> before
    responses, dead_letters = messages | "Answer" >> AskMessages(model_name, state_dict_path, **options)
    if after is not None:
        responses = responses | "After" >> after
    responses | "Write responses" >> beam.io.WriteToPubSub(responses_topic, with_attributes=True)
    if dead_letter_topic:
        dead_letters | "Write dead letters" >> beam.io.WriteToPubSub(dead_letter_topic, with_attributes=True)


def check_destinations(
    *,
    responses_topic: str,
    messages_topic: str | None = None,
    messages_subscription: str | None = None,
    dead_letter_topic: str | None = None,
    **_: Any,
) -> None:
    """Refuses a job that would read what it publishes: each message would be answered for ever, and paid for.

    The topic of a subscription is looked up; where it cannot be, because the account may not or there is no
    such subscription, this says nothing. It takes the arguments of `build`, and ignores the others of them.

    Raises:
        CommandLineError: responses or dead letters go to the topic that is read, or both go to the same.
    """
    source = messages_topic or _topic_of(messages_subscription or "")
    _check_not_read(source, responses_topic, dead_letter_topic)
    if dead_letter_topic and dead_letter_topic == responses_topic:
        raise CommandLineError(
            f"responses and dead letters would both go to {responses_topic}: give each a topic of its own."
        )


def _check_not_read(source: str, responses_topic: str, dead_letter_topic: str | None) -> None:
    for name, topic in (("responses", responses_topic), ("dead letters", dead_letter_topic)):
        if topic and topic == source:
            raise CommandLineError(
                f"{name} would go to {topic}, which the job reads: each would be asked again, for ever. Give "
                "them a topic of their own."
            )


def _topic_of(subscription: str) -> str:
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import pubsub_v1

    if not subscription:
        return ""
    try:
        with pubsub_v1.SubscriberClient() as client:
            return client.get_subscription(subscription=subscription, timeout=20, retry=None).topic
    except (GoogleAPICallError, GoogleAuthError):
        return ""


def start(beam_options: PipelineOptions, arguments: dict[str, Any]) -> PipelineResult:
    """Builds the pipeline with `build`'s arguments, and starts it as Beam's options say."""
    beam_options.view_as(StandardOptions).streaming = True
    pipeline = beam.Pipeline(options=beam_options)
    build(pipeline, **arguments)
    return pipeline.run()


def launch(beam_options: PipelineOptions, arguments: dict[str, Any], **job: Any) -> PipelineResult:
    """Starts the pipeline on the runner that Beam's options name, with what that runner needs around it.

    Args:
        beam_options: Beam's; for Dataflow, what is not chosen in them is chosen by `helpers.dataflow`.
        arguments: of `build`.
        job: of the job around the pipeline; see `helpers.dataflow.submit`.

    Raises:
        CommandLineError: arguments of a job for a runner that has none, or the helpers are not installed.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
        WrongModelError: it was made from another model.
        PromptError: its model cannot be asked as the options say.
        And as the launcher of the runner.
    """
    runner = _runner(beam_options)
    if launcher := _launcher(runner):
        return launcher(beam_options, arguments, **job)
    if job:
        raise CommandLineError(f"--{next(iter(job)).replace('_', '-')} needs --runner=DataflowRunner")
    if runner == "DataflowRunner":
        raise CommandLineError(
            "The helpers are not installed, so that no job can be submitted: run `pip install --no-deps "
            "-e .` in the repository's folder."
        )
    check_destinations(**arguments)
    # A worker without a manifest, or with another model's, would fail, start, and fail again.
    read_manifest(arguments["state_dict_path"]).check_model(
        arguments["state_dict_path"], arguments["model_name"]
    )
    check_around_prompts(arguments["state_dict_path"], options_among(arguments))
    return start(beam_options, arguments)


def _runner(beam_options: PipelineOptions) -> str:
    """The runner's class: `--runner` may be a name without `Runner`, in any case, or with its module."""
    name = (beam_options.view_as(StandardOptions).runner or "").rpartition(".")[2]
    return "DataflowRunner" if name.lower() in ("dataflow", "dataflowrunner") else name


def _launcher(runner: str) -> Callable[..., PipelineResult] | None:
    found = list(entry_points(group=LAUNCHERS, name=runner)) if runner else []
    return found[0].load() if found else None
