"""The command line: `local` converts on this machine, `vertex` in a Vertex AI custom job."""

import argparse
import signal
import sys

from helpers.load_state_dict import convert, vertex
from helpers.load_state_dict.engine_file import ENGINE_DTYPES
from helpers.models.dtypes import DTYPES


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood;
    130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.load_state_dict",
        description="Writes a model's state dict in constant memory.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="convert on this machine")
    _add_common_flags(local)
    local.add_argument("--checkpoint", help="folder to read the weights from, local or gs://")
    _add_vertex_flags(commands.add_parser("vertex", help="convert in a Vertex AI custom job"))
    for command in commands.choices.values():
        command.add_argument(
            "--engine-file",
            choices=ENGINE_DTYPES,
            metavar="DTYPE",
            help="also make the file of ctranslate2 for computing in DTYPE, "
            f"one of {', '.join(ENGINE_DTYPES)}, beside the state dict: workers then start without making it",
        )
    values = vars(parser.parse_args(arguments))
    try:
        if values.pop("command") == "local":
            convert(**values)
        else:
            vertex(**values)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was left at the destination; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-name", required=True, help="a hub name, a folder, or the packaged model's name"
    )
    parser.add_argument("--state-dict-path", required=True, help="output: NAME.pt or gs://BUCKET/NAME.pt")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="default: %(default)s")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another state dict at the same path"
    )


def _add_vertex_flags(parser: argparse.ArgumentParser) -> None:
    _add_common_flags(parser)
    parser.add_argument("--job-name", help="shown in the console; default: Load MODEL_NAME")
    parser.add_argument("--project", required=True, help="the Google Cloud project's id")
    parser.add_argument("--bucket", required=True, help="name of a bucket for the job's files")
    parser.add_argument("--location", required=True, help="a region, such as us-central1")
    parser.add_argument("--machine-type", help="default: what helpers.sizing finds sufficient")
    parser.add_argument("--disk-size-gb", type=int, help="at least 100; default: what helpers.sizing finds")
    parser.add_argument(
        "--image", help="a container image with Python 3.11 or newer", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--torch-index-url", default="", help="index of torch builds without CUDA; default: the package index"
    )
    parser.add_argument("--timeout-minutes", type=int, help="default: 240", default=argparse.SUPPRESS)
    parser.add_argument("--service-account", help="account the job runs as; default: the project's own")
    parser.add_argument("--network", help="projects/NUMBER/global/networks/NAME")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch files are removed
    sys.exit(main())
