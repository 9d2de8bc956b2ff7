"""Runs a command with this machine in Google Cloud's place, and returns the command's exit code."""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys

from .child import serve
from .cloud_storage.names import check_bucket_name
from .front.http_server import HttpError
from .server import DEFAULT_PROJECT, LocalCloud, LocalCloudError

DEFAULT_FOLDER = ".local_cloud"
START_FAILED, NOT_EXECUTABLE, NOT_FOUND = 2, 126, 127
KILL_SECONDS = 10


def main() -> int:
    """The command line.

    Apart from the command's own, exit codes are those of a shell: 2, 126, 127, 128 + the signal.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.local_cloud",
        description="Run COMMAND with this machine in Google Cloud's place: Cloud Storage, Pub/Sub, "
        "Vertex AI custom jobs and Dataflow on 127.0.0.1, reached by Google's own unmodified clients.",
    )
    parser.add_argument(
        "--dir", default=DEFAULT_FOLDER, help=f"folder for objects and logs (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument(
        "--project", default=DEFAULT_PROJECT, help=f"the project's id (default: {DEFAULT_PROJECT})"
    )
    parser.add_argument("--port", type=int, default=0, help="the proxy's port (default: any free one)")
    parser.add_argument(
        "--offline", action="store_true", help="refuse every host but Google's and this machine"
    )
    parser.add_argument("--serve", type=int, metavar="PARENT", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command and options.serve is None:
        parser.error("name the COMMAND to run")
    try:
        cloud = LocalCloud(options.dir, options.project, options.offline, options.port)
    except LocalCloudError as error:
        print(f"local cloud: {error}", file=sys.stderr)
        return START_FAILED
    with cloud:
        if options.serve is not None:
            serve(cloud, options.serve)
            return 0
        return _run(command, {**os.environ, **cloud.environment, **_names(cloud)})


def _names(cloud: LocalCloud) -> dict[str, str]:
    """What the documented commands take from variables: the project, a region, and a bucket, which is made.

    The bucket is that of the notebooks, unless the caller's own BUCKET names another.
    """
    bucket = os.environ.get("BUCKET") or f"{cloud.project}-streaming-llm"
    with contextlib.suppress(HttpError, OSError):  # a name that cannot be one: whatever uses it says so
        (cloud.storage_root / check_bucket_name(bucket)).mkdir(exist_ok=True)
    location = os.environ.get("LOCATION") or "us-central1"
    return {"PROJECT": cloud.project, "LOCATION": location, "BUCKET": bucket}


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs the command to its end; signals sent to this process are passed on to it."""
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        exists = os.path.exists(command[0])
        print(f"local cloud: {command[0]}: {'not executable' if exists else 'not found'}", file=sys.stderr)
        return NOT_EXECUTABLE if exists else NOT_FOUND
    process = subprocess.Popen([*_die_with_parent(), *command], env=environment)

    def interrupt(*_) -> None:
        # Ctrl-C reaches the whole foreground group, the command included; a signal sent to this process does
        # not.
        if not _in_foreground():
            process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    return code if code >= 0 else 128 - code


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _die_with_parent() -> list[str]:
    """A prefix for a command, so that it ends when this process is killed; on Linux only."""
    if sys.platform != "linux":
        return []
    program = (
        "import ctypes, os, signal, sys\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG, kept across exec
        f"if os.getppid() == {os.getpid()}: os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-I", "-S", "-c", program]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # during start-up; whatever had started is stopped
        sys.exit(128 + signal.SIGINT)
