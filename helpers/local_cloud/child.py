"""The local cloud in a child process, which ends when its parent does."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from .server import DEFAULT_PROJECT, LocalCloud, LocalCloudError, prepare_folder

PARENT_POLL_SECONDS = 0.5
STOP_SECONDS = 15


class Child:
    """A running child process. `environment` leads clients to it; `log` is the file it writes to."""

    def __init__(self, process: subprocess.Popen, environment: dict[str, str], folder: Path, log: Path):
        self.environment = environment
        self.project = environment["LOCAL_CLOUD_PROJECT"]
        self.folder = folder
        self.storage_root = folder / "storage"
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the services are still running."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the services and every process they started. Objects stay."""
        _end(self._process)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def launch(
    folder: str | Path, *, project: str = DEFAULT_PROJECT, offline: bool = False, timeout: float = 30
) -> Child:
    """Runs the services in a child process, which dies with its parent and which Ctrl-C here does not reach.

    The arguments are those of `start`; timeout: seconds to wait until it is ready. Raises LocalCloudError.
    """
    folder = prepare_folder(folder)
    log = folder / "local_cloud.log"
    command = [sys.executable, "-m", __package__, "--serve", str(os.getpid())]
    command += ["--dir", str(folder), "--project", project] + ["--offline"] * offline
    with log.open("ab") as log_file:
        start_of_log = log_file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
            cwd=Path(__file__).parents[2],  # wherever this process runs, the child imports the same package
        )
    try:
        line = _read_line(process, timeout)
    except BaseException:
        _end(process)
        raise
    finally:
        process.stdout.close()
    if not line.endswith(b"\n"):
        _end(process)
        with log.open("rb") as log_file:
            log_file.seek(start_of_log)
            said = log_file.read()[-2000:].decode(errors="replace").strip()
        raise LocalCloudError(f"The local cloud did not start within {timeout} s. {said or f'See {log}.'}")
    return Child(process, json.loads(line), folder, log)


def _read_line(process: subprocess.Popen, timeout: float) -> bytes:
    """The first line of the process's output; less if it ends or the time runs out first."""
    line, deadline = b"", time.monotonic() + timeout
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left)[0]:
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            line += data
    return line


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(cloud: LocalCloud, parent: int) -> None:
    """The child's side: prints its environment, then serves until a signal comes or the parent is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise_exit)
    with contextlib.suppress(SystemExit, BrokenPipeError):
        print(json.dumps(cloud.environment), flush=True)
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)


def _raise_exit(*_) -> None:
    raise SystemExit
