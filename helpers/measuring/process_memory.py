"""The memory of processes and of this machine.

On Linux they come from `/proc/PID/smaps_rollup`, which separates anonymous from file-backed pages.
Elsewhere only the resident set is known, from psutil.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Reading smaps_rollup walks all of a process's page tables, and stalls it meanwhile: at most this share of
# the time is spent on it.
SAMPLING_SHARE = 0.1
SHORTEST_SECONDS = 0.02


class MeasureError(RuntimeError):
    """A measurement that could not be made: the message says why, and what to do."""


@dataclass(frozen=True)
class Memory:
    """Memory of a process at one moment, in bytes; None where the system does not report it.

    Attributes:
        resident: pages in memory, each counted whole.
        proportional: pages in memory, each divided by the number of processes that map it.
        anonymous: the resident pages that only memory or swap can hold.
        file_backed: the resident pages of files: libraries, and whatever else is mapped.
    """

    resident: int
    proportional: int | None = None
    anonymous: int | None = None
    file_backed: int | None = None


@dataclass(frozen=True)
class Peak:
    """The most that a process held, each figure at its own peak.

    Attributes:
        resident: the kernel's own record where it keeps one (`VmHWM`), so that no moment is missed.
        source: `smaps_rollup`, or `rss` where nothing but `resident` is known.
    """

    resident: int
    proportional: int | None
    anonymous: int | None
    file_backed: int | None
    source: str


def memory_of(pid: int | None = None) -> Memory:
    """The memory of a process now; of this one by default.

    Raises:
        ProcessLookupError: it has ended.
    """
    try:
        text = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text()
    except (PermissionError, ProcessLookupError):
        raise ProcessLookupError(f"process {pid} has ended") from None
    except FileNotFoundError:
        return Memory(resident=_resident(pid))
    sizes = {}
    for line in text.splitlines()[1:]:
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024
    if not sizes:
        raise ProcessLookupError(f"process {pid} has ended")
    return Memory(sizes["Rss"], sizes["Pss"], sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"])


def run_and_measure(module: str, arguments: Sequence[str], timeout: float = 600) -> tuple[Peak, str]:
    """Runs `python -m MODULE ARGUMENTS` to its end and samples its memory meanwhile.

    Returns:
        The peak, and what the process wrote to its standard output.

    Raises:
        MeasureError: it failed, was killed, or took longer than `timeout` seconds.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": path},
        )
        what = " ".join([module, *arguments[:1]])
        try:
            samples, resident = _samples_until_done(child, time.monotonic() + timeout)
        except TimeoutError:
            raise MeasureError(
                f"{what} took longer than {timeout:.0f} s: measure a smaller model, or raise the timeout."
            ) from None
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        output.seek(0)
        errors.seek(0)
        if child.returncode == -9:
            raise MeasureError(f"{what} was killed, most likely for lack of memory: measure a smaller model.")
        if child.returncode or not samples:
            raise MeasureError(f"{what} failed:\n{errors.read().strip()[-1500:]}")
        return _peak(samples, resident), output.read()


def _samples_until_done(child: subprocess.Popen, deadline: float) -> tuple[list[Memory], int]:
    samples, highest = [], 0
    while child.poll() is None:
        started = time.monotonic()
        if started > deadline:
            raise TimeoutError
        with contextlib.suppress(ProcessLookupError):  # it has just ended: poll() will say so
            samples.append(memory_of(child.pid))
            highest = max(highest, samples[-1].resident, high_water_mark(child.pid))
        time.sleep(max(SHORTEST_SECONDS, (time.monotonic() - started) / SAMPLING_SHARE))
    return samples, highest


def high_water_mark(pid: int) -> int:
    """The largest resident set that a process has had so far; 0 where the system does not report it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak(samples: Sequence[Memory], resident: int) -> Peak:
    if samples[0].anonymous is None:
        return Peak(resident, None, None, None, "rss")
    return Peak(
        resident,
        max(memory.proportional for memory in samples),
        max(memory.anonymous for memory in samples),
        max(memory.file_backed for memory in samples),
        "smaps_rollup",
    )


def _resident(pid: int | None) -> int:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        raise ProcessLookupError(f"process {pid} has ended") from None
