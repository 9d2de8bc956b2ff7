"""Pub/Sub → language model → Pub/Sub, as Beam transforms and as a job's command line.

    python -m helpers.pipeline \\
        --messages-subscription projects/P/subscriptions/messages \\
        --responses-topic projects/P/topics/responses \\
        --dead-letter-topic projects/P/topics/dead-letters \\
        --state-dict-path gs://BUCKET/run-inference/MODEL.pt --model-name MODEL \\
        --runner DataflowRunner --project P --region R --temp_location gs://BUCKET/temp

On Dataflow these are enough: what else a job for a language model needs is set by
``helpers.jobs.job_options``.

What becomes of a message is told in ``helpers.serving.transforms``.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers.serving.transforms import AskMessages, AskModel
from helpers.state_dicts.manifest import read_manifest

__all__ = ["AskMessages", "AskModel", "build", "main", "parser", "run"]

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")

# Of the command line's arguments, those of the Dataflow job around the pipeline.
JOB_ARGUMENTS = ("max_run_minutes", "exactly_once", "helpers_in_image")


def build(
    pipeline: beam.Pipeline,
    *,
    model_name: str,
    state_dict_path: str,
    responses_topic: str,
    messages_topic: str | None = None,
    messages_subscription: str | None = None,
    dead_letter_topic: str | None = None,
    **options: Any,
) -> None:
    """Adds Pub/Sub → model → Pub/Sub to a pipeline.

    Args:
        pipeline: a streaming pipeline.
        model_name: the model that the state dict was made from.
        state_dict_path: ``.../NAME.pt``, local or ``gs://``.
        responses_topic: ``projects/P/topics/T``.
        messages_topic: read with a subscription of the job's own, which sees what is published from then on.
        messages_subscription: read instead of a topic; messages wait in it for the job.
        dead_letter_topic: for messages that cannot be answered; without it they are logged and counted.
        options: further arguments of ``AskModel``.
    """
    source = beam.io.ReadFromPubSub(
        topic=messages_topic, subscription=messages_subscription, with_attributes=True
    )
    responses, dead_letters = (
        pipeline | "Read messages" >> source | "Answer" >> AskMessages(model_name, state_dict_path, **options)
    )
    responses | "Write responses" >> beam.io.WriteToPubSub(responses_topic, with_attributes=True)
    if dead_letter_topic:
        dead_letters | "Write dead letters" >> beam.io.WriteToPubSub(dead_letter_topic, with_attributes=True)


class CommandLineError(ValueError):
    """Arguments that are not understood; the message says which."""


class _Parser(argparse.ArgumentParser):
    """One that raises, for callers from Python: argparse itself ends the process."""

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(message)


def parser() -> argparse.ArgumentParser:
    """The command line's own arguments; every other one is Beam's.

    What it parses it may refuse with a ``CommandLineError``.
    """
    arguments = _Parser(
        prog="python -m helpers.pipeline",
        description="Answers Pub/Sub messages with a language model, in a streaming Beam pipeline.",
        epilog="Every other option is Beam's: --runner, --project, --region, --temp_location, ...",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    source = arguments.add_mutually_exclusive_group(required=True)
    source.add_argument("--messages-topic", help="projects/P/topics/T to read from the job's start on")
    source.add_argument("--messages-subscription", help="projects/P/subscriptions/S to read")
    arguments.add_argument("--responses-topic", required=True, help="projects/P/topics/T for the responses")
    arguments.add_argument("--dead-letter-topic", help="projects/P/topics/T for messages without a response")
    arguments.add_argument("--state-dict-path", required=True, help=".../NAME.pt, local or gs://")
    arguments.add_argument("--model-name", required=True, help="the model that it was made from")

    model = arguments.add_argument_group("model", "see helpers.model_handler for what is taken without them")
    model.add_argument("--device", help="cpu or cuda; by default a GPU if the worker has one")
    model.add_argument("--dtype", choices=DTYPES, help="by default the device's best")
    model.add_argument("--max-response-tokens", type=_positive, default=256, metavar="N")
    model.add_argument("--max-prompt-tokens", type=_positive, metavar="N", help="longer prompts fail")
    model.add_argument("--truncate", action="store_true", help="longer prompts are cut instead")
    model.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    model.add_argument("--max-batch-size", type=_positive, metavar="N", help="prompts in a batch")
    model.add_argument("--max-batch-tokens", type=_positive, metavar="N", help="tokens in a batch")
    model.add_argument("--max-batch-seconds", type=_time, metavar="S", help="to wait for a fuller batch")
    model.add_argument("--torch-threads", type=_positive, metavar="N", help="of a process")
    model.add_argument("--reload-seconds", type=_time, metavar="S", help="between looks for new weights")

    job = arguments.add_argument_group("job", "for --runner=DataflowRunner; see helpers.jobs.job_options")
    job.add_argument("--max-run-minutes", type=_time, metavar="M", help="drain the job after this time")
    job.add_argument("--exactly-once", action="store_true", help="rather than at least once")
    job.add_argument("--helpers-in-image", action="store_true", help="the workers' image has this package")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _time(text: str) -> float:
    length = float(text)
    if not 0 < length < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return length


def run(argv: Sequence[str] | None = None) -> beam.runners.runner.PipelineResult:
    """Builds the pipeline from a command line and starts it, on whatever runner Beam's options name.

    On Dataflow, what a job for a language model needs is set where the command line does not: see
    ``helpers.jobs.job_options``.

    Raises:
        CommandLineError: the command line is not understood.
        JobError: the job's name is in use, or there is no job of this name to update.
        OptionError, MachineTypeError, SizingError: options or models that no worker can serve.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    command_line = parser()
    arguments, beam_arguments = command_line.parse_known_args(argv)
    _refuse_misspelt(command_line, beam_arguments)
    values = vars(arguments)
    job = {name: values.pop(name) for name in JOB_ARGUMENTS if name in values}
    options = PipelineOptions(beam_arguments)
    options.view_as(StandardOptions).streaming = True
    if _runs_on_dataflow(options):
        # A job is built around its pipeline, and a worker, which imports this module, needs nothing of it.
        from helpers.jobs import submission

        return submission.submit(options, values, **job)
    if job:
        raise CommandLineError(f"--{next(iter(job)).replace('_', '-')} needs --runner=DataflowRunner")
    read_manifest(values["state_dict_path"])  # a worker without one would fail, start, and fail again
    return start(options, values)


def start(options: PipelineOptions, values: dict[str, Any]) -> beam.runners.runner.PipelineResult:
    """Builds the pipeline with ``build``'s arguments, and starts it as the options say."""
    pipeline = beam.Pipeline(options=options)
    build(pipeline, **values)
    return pipeline.run()


def _runs_on_dataflow(options: PipelineOptions) -> bool:
    """Whether the pipeline is to be submitted to Dataflow: ``--runner`` in any of the forms Beam takes."""
    runner = options.view_as(StandardOptions).runner or ""
    return runner.rpartition(".")[2].lower() in ("dataflow", "dataflowrunner")


def _refuse_misspelt(command_line: argparse.ArgumentParser, beam_arguments: Sequence[str]) -> None:
    """Beam only warns of options that it does not know: a misspelt one would be lost, and a guard with it."""
    ours = [option for action in command_line._actions for option in action.option_strings]
    for argument in beam_arguments:
        name = argument.partition("=")[0]
        if not name.startswith("--"):
            continue
        # Beam's own have underscores, and none of them is this like one of ours.
        close = difflib.get_close_matches(name.replace("_", "-"), ours, 1, cutoff=0.85)
        if "-" in name[2:] or close:
            command_line.error(f"there is no option {name}" + (f": do you mean {close[0]}?" if close else ""))


def end_with_usage(error: CommandLineError) -> NoReturn:
    """Ends the process as argparse does: the usage and the error on stderr, exit code 2."""
    parser().print_usage(sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv: Iterable[str] | None = None) -> None:
    """The command line: starts the pipeline, and waits for it where the runner is this process."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = run(list(argv) if argv is not None else sys.argv[1:])
        if not hasattr(result, "job_id"):  # for a runner other than Dataflow's
            result.wait_until_finish()
    except KeyboardInterrupt:
        sys.exit("Interrupted: messages that were not answered come again from the subscription.")
    except CommandLineError as error:
        end_with_usage(error)
    # RuntimeError: JobError, StorageError, a name that has just been taken, a package that is not installed.
    except (OSError, RuntimeError, ValueError, GoogleAPICallError, GoogleAuthError) as error:
        sys.exit(f"error: {error}")
    if not hasattr(result, "job_id"):
        return
    if result.has_job:
        print(f"Submitted job {result.job_id()}")
    else:
        print("No job was submitted: the template has been written.")


if __name__ == "__main__":
    # By its own name, which its errors have in the other modules too.
    from helpers import pipeline

    pipeline.main()
