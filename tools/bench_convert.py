"""Compares this project's conversion with `from_pretrained(dtype=...)` and `torch.save`.

    python tools/bench_convert.py [MODEL] [--dtype float16] [--rounds 3]

The two alternate, each in a process of its own, on the same checkpoint of random weights in the model's real
shape. Only the conversion is measured, without imports. The last line of the output is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from helpers.measuring.random_checkpoint import write_random_checkpoint
from helpers.models import load_config

# The classes are imported beforehand on both sides.
WAYS = {
    "from_pretrained and torch.save": """
import transformers.models.t5.modeling_t5, transformers.models.llama.modeling_llama
from helpers.measuring.published_sample import convert_in_dtype as convert
""",
    "helpers.load_state_dict": """
import helpers.load_state_dict.writing
import transformers.models.t5.modeling_t5, transformers.models.llama.modeling_llama
from helpers.load_state_dict import convert as convert_quietly
def convert(source, target, dtype):
    convert_quietly(source, target, dtype, progress=False)
""",
}

MEASURE = """
import json, sys, threading, time
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
import torch
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
began, cpu_began = time.perf_counter(), time.process_time()
convert(*sys.argv[1:4])
seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_anonymous_bytes": peak - before}))
"""


def bench(
    model_name: str = "google/flan-t5-large", dtype: str = "float16", rounds: int = 3
) -> dict[str, Any]:
    """Measures both ways.

    Returns:
        For each way, the medians of the seconds, the CPU seconds, and the peak anonymous bytes above an
        interpreter with torch imported; and `speed_ratio`, how many times as fast this project's way was.
    """
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        source = write_random_checkpoint(load_config(model_name), Path(scratch) / "checkpoint")
        for _ in range(rounds):
            for way, code in WAYS.items():
                target = Path(scratch) / "converted.pt"
                command = [sys.executable, "-c", code + MEASURE, str(source), str(target), dtype]
                output = subprocess.run(
                    command, check=True, capture_output=True, text=True, timeout=1800
                ).stdout
                results[way].append(json.loads(output.splitlines()[-1]))
                target.unlink()
    summary = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in results.items()
    }
    theirs, ours = (summary[way]["seconds"] for way in WAYS)
    return {
        "model_name": model_name,
        "dtype": dtype,
        "rounds": rounds,
        **summary,
        "speed_ratio": theirs / ours,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_name", nargs="?", default="google/flan-t5-large")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(bench(**vars(parser.parse_args()))))
