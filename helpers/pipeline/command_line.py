"""The arguments of `python -m helpers.pipeline`: the pipeline's own, the job's, and Beam's."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult
from apache_beam.transforms.ptransform import PTransform

from helpers.model_handler.options import add_arguments, options_among
from helpers.pipeline.stream import CommandLineError, launch


class CommandLine(NamedTuple):
    """A command line that was understood; what was not given is left out.

    Attributes:
        arguments: of `helpers.pipeline.build`.
        job: of the Dataflow job around it.
        beam: Beam's own, as they were given.
    """

    arguments: dict[str, Any]
    job: dict[str, Any]
    beam: list[str]


class _Parser(argparse.ArgumentParser):
    """A parser that raises, for callers in Python: argparse itself ends the process."""

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(message)


def parser(prog: str = "python -m helpers.pipeline") -> argparse.ArgumentParser:
    """The parser for the command line's own arguments; all others are Beam's.

    It raises `CommandLineError` for arguments that it rejects.
    """
    arguments = _Parser(
        prog=prog,
        description="Answers Pub/Sub messages with a language model, in a streaming Beam pipeline.",
        epilog="Every other option is Beam's: --runner, --project, --region, --temp_location, ...",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    source = arguments.add_mutually_exclusive_group(required=True)
    source.add_argument("--messages-topic", help="projects/P/topics/T to read once the job has started")
    source.add_argument("--messages-subscription", help="projects/P/subscriptions/S to read")
    arguments.add_argument("--responses-topic", required=True, help="projects/P/topics/T for the responses")
    arguments.add_argument("--dead-letter-topic", help="projects/P/topics/T for messages without a response")
    arguments.add_argument("--state-dict-path", required=True, help=".../NAME.pt, local or gs://")
    arguments.add_argument("--model-name", required=True, help="the model that the state dict was made from")
    add_arguments(arguments.add_argument_group("answering"))
    job = arguments.add_argument_group("job", "with --runner=DataflowRunner")
    job.add_argument("--max-run-minutes", type=_minutes, metavar="M", help="drain the job after this time")
    job.add_argument("--exactly-once", action="store_true", help="use exactly-once mode")
    job.add_argument("--helpers-in-image", action="store_true", help="the workers' image has this package")
    job.add_argument(
        "--torch-index-url",
        metavar="URL",
        help="index of torch without CUDA, for workers without an image of their own",
    )
    return arguments


JOB_ARGUMENTS = ("max_run_minutes", "exactly_once", "helpers_in_image", "torch_index_url")


def parse(argv: Sequence[str] | None = None) -> CommandLine:
    """Parses a command line.

    Raises:
        CommandLineError: it is not understood, or does not go together; Beam itself would only warn of an
            option that it does not know.
    """
    own = parser()
    parsed, beam_arguments = own.parse_known_args(argv)
    check_beam_arguments(beam_arguments)
    arguments = vars(parsed)
    job = {name: arguments.pop(name) for name in JOB_ARGUMENTS if name in arguments}
    try:
        options_among(arguments)
    except ValueError as error:  # what does not go together
        raise CommandLineError(str(error)) from error
    return CommandLine(arguments, job, beam_arguments)


def run(argv: Sequence[str] | None = None, **steps: PTransform) -> PipelineResult:
    """Starts the pipeline that a command line describes, on whatever runner it names.

    Args:
        argv: as `python -m helpers.pipeline` takes it; by default this process's own.
        steps: `before` and `after` of `helpers.pipeline.build`.

    Raises:
        CommandLineError: as `parse`.
        And as `helpers.pipeline.stream.launch`.
    """
    given = parse(argv)
    return launch(PipelineOptions(given.beam), given.arguments | steps, **given.job)


def check_beam_arguments(arguments: Sequence[str]) -> None:
    """Checks that Beam knows every one of its arguments. Beam drops the others, and a guard may be among
    them.

    Raises:
        CommandLineError: one is misspelt, or has a value that Beam does not take.
    """
    beams = _Parser(allow_abbrev=False, add_help=False)
    for options in {str(kind): kind for kind in PipelineOptions.__subclasses__()}.values():
        options._add_argparse_args(beams)
    _, unknown = beams.parse_known_args(list(arguments))
    if not unknown:
        return
    name = unknown[0].partition("=")[0]
    known = [
        option for one in (parser(), beams) for action in one._actions for option in action.option_strings
    ]
    spelt = "--" + name.lstrip("-")
    # Ours are written with dashes, Beam's with underscores; each is looked for in both spellings.
    candidates = (spelt.replace("_", "-"), "--" + spelt[2:].replace("-", "_"))
    close = [found for one in candidates for found in difflib.get_close_matches(one, known, 1, cutoff=0.7)]
    best = max(close, key=lambda one: difflib.SequenceMatcher(None, one, spelt).ratio(), default=None)
    raise CommandLineError(f"there is no option {name}" + (f": do you mean {best}?" if best else ""))


def _minutes(text: str) -> float:
    length = float(text)
    if not 0 < length < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return length
