"""Starts a command that ends, with everything it started, when asked or when this process ends.

This file is also the program that stands guard: it runs the command in a session of its own, and kills all
that the command started when the command ends, when its own standard input closes, which happens however the
starter ends, or when its parent process changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

CHECK_SECONDS = 1.0
COMMAND_NOT_FOUND = 127  # as a shell reports it
PR_SET_CHILD_SUBREAPER = 36


class ProcessGroup:
    """A running command and its descendants; on macOS, without those that leave its session."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str], log: IO[bytes]):
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float | None = None) -> int | None:
        """The command's exit status, negative for a signal, or None if the time runs out first."""
        try:
            status = self._guard.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._signal(signal.SIGKILL)  # what the command left behind
        return 128 - status if status > 128 else status

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Asks all processes of the group to end, with SIGTERM; kills them when the time runs out."""
        if self._guard.poll() is not None:
            return
        self._signal(signal.SIGTERM)
        if self.wait(grace_seconds) is None:
            self._guard.stdin.close()
            self._guard.wait()

    def _signal(self, number: int) -> None:
        # macOS answers PermissionError for a group of processes that have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._guard.pid, number)


def _run(command: list[str]) -> int:
    parent = os.getppid()
    if sys.platform == "linux":  # orphans become children of this process, those of other sessions too
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the command decides; a handler is not inherited
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"The command {command[0]!r} cannot be run here: {error}", file=sys.stderr)
        return COMMAND_NOT_FOUND

    def watch() -> None:
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], CHECK_SECONDS)
            if readable and not os.read(0, 1):
                break
        _kill_children()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    _kill_children()
    return 128 - status if status < 0 else status


def _kill_children() -> None:
    """Kills this process's descendants, a generation at a time: the children of who is killed come here."""
    for _ in range(100):
        lists = Path("/proc/self/task").glob("*/children")
        children = [int(number) for file in lists for number in file.read_text().split()]
        if not children:
            return
        for number in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, 0)


if __name__ == "__main__":
    status = _run(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
