"""What each contestant of `tools/bench_engines.py` does: it loads a model, says what it is, and answers
requests, one JSON line each. It needs nothing but Python: contestants run in environments of their own."""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]

THREADS = int(os.environ["BENCH_THREADS"])

BATCH = int(os.environ.get("BENCH_BATCH", "32"))
"""The most prompts in a batch."""

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
"""Where to compute: cpu or cuda."""


def peak_bytes() -> int:
    """The most memory that this process has had, on Linux; 0 elsewhere."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


def gpu_bytes() -> int | None:
    """The memory that this process has of a GPU, its CUDA context included; None where it has none.

    Whatever has computed keeps what it took, so that this is about the most that it had. The driver is asked,
    since torch knows nothing of what others take.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # no GPU, or not NVIDIA's
        return None
    return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)


def answer_requests(load: Callable[[], tuple[Generate, dict]]) -> None:
    """Loads, and answers until the input ends.

    Args:
        load: gives a function that takes prompts as token ids and the most new tokens, and gives the tokens
            of each response, its end token included; and what is to be said of it: version, dtype.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def say(values: dict) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    began = time.perf_counter()
    generate, said = load()
    say(said | {"load_seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        tokens = generate(request["prompts"], request["new_tokens"])
        seconds = time.perf_counter() - began
        say(
            {
                "seconds": seconds,
                "tokens": tokens,
                "peak_bytes": peak_bytes(),
                "gpu_bytes": gpu_bytes(),
            }
        )
