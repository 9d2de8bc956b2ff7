"""What each contestant of `tools/bench_engines.py` does: it loads a model, says what it is, and answers
requests, one JSON line each. It needs nothing but Python: contestants run in environments of their own."""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]

THREADS = int(os.environ["BENCH_THREADS"])


def peak_bytes() -> int:
    """The most memory that this process has had, on Linux; 0 elsewhere."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


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
        say({"seconds": time.perf_counter() - began, "tokens": tokens, "peak_bytes": peak_bytes()})
