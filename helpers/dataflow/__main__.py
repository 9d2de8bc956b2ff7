"""The command line for jobs on Dataflow, and for what they need.

    python -m helpers.dataflow list      --project P --region R [--json]
    python -m helpers.dataflow watch     --project P --region R [--minutes M] JOB
    python -m helpers.dataflow drain     --project P --region R JOB
    python -m helpers.dataflow cancel    --project P --region R JOB
    python -m helpers.dataflow scale     --project P --region R --workers LEAST MOST JOB
    python -m helpers.dataflow reap      --project P --region R [--overdue]
    python -m helpers.dataflow preflight ARGUMENTS...
    python -m helpers.dataflow image     build|requirements ARGUMENTS...

JOB is a job's id or name. `reap` drains every job that these notebooks started; with `--overdue`, those whose
`--max-run-minutes` are over. It exits with 1 if one is left, and sees the jobs of one region only.
`preflight` takes the command line of `python -m helpers.pipeline`, which submits a job, and says what that
job would miss. `image` builds the workers' image.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from google.api_core.exceptions import Forbidden, GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers.dataflow import job_checks, worker_image
from helpers.dataflow.job import TERMINAL, Job, JobError
from helpers.dataflow.job_list import find_name, list_series, reap
from helpers.files import access


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood;
    130 when interrupted.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--project", required=True)
    common.add_argument("--region", required=True)
    # Two commands have command lines of their own, whose arguments argparse would take for this one's.
    own = {"preflight": job_checks.main, "image": worker_image.main}
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in own:
        return own[given[0]](given[1:])
    parser = argparse.ArgumentParser(prog="python -m helpers.dataflow", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", parents=[common], help="the jobs that these notebooks started")
    lister.add_argument("--json", action="store_true", help="print JSON rather than lines")
    for command, text in (("watch", "until it has ended"), ("drain", "and wait"), ("cancel", "and wait")):
        one = commands.add_parser(command, parents=[common], help=f"{command} a job {text}")
        one.add_argument("job", metavar="JOB", help="its id or name")
        if command == "watch":
            one.add_argument("--minutes", type=float, default=10.0, help="how long at most (default: 10)")
    scaler = commands.add_parser("scale", parents=[common], help="set the range of workers for a job")
    scaler.add_argument("--workers", nargs=2, type=int, required=True, metavar=("LEAST", "MOST"))
    scaler.add_argument("job", metavar="JOB", help="its id or name")
    reaper = commands.add_parser("reap", parents=[common], help="drain the jobs that these notebooks started")
    reaper.add_argument("--overdue", action="store_true", help="only those whose time is up")
    commands.add_parser("preflight", help="say what a job would miss", add_help=False)
    commands.add_parser("image", help="build the workers' image", add_help=False)
    arguments = parser.parse_args(given)
    try:
        _run(arguments)
    except GoogleAuthError as error:
        mend = f"{access.log_in()}, or try it with python -m helpers.local_cloud"
        print(f"error: no credentials for Google Cloud: {mend}. ({error})", file=sys.stderr)
        return 1
    except Forbidden as error:
        print(f"error: {access.explain(error, arguments.project)}", file=sys.stderr)
        return 1
    except (JobError, GoogleAPICallError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the job goes on, with what it was asked to do.", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    where = arguments.project, arguments.region
    if arguments.command == "list":
        rows = [listed.row() for listed in list_series(*where)]
        if arguments.json:
            rows = [row | {"overdue": bool(row["overdue"])} for row in rows]
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            for row in rows:
                _print(row)
        if not rows:
            print("No job of this series is under way there.", file=sys.stderr)
    elif arguments.command == "reap":
        found = reap(*where, overdue_only=arguments.overdue)
        for listed, state in found:
            _print({"name": listed.name, "state": state, "job": listed.job.job_id})
        if left := [listed.name for listed, state in found if state not in TERMINAL]:
            raise JobError(f"{', '.join(left)} could not be drained, and goes on: cancel it, or try again.")
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
