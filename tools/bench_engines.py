"""Compares engines, this project's and others, on the same prompts: `make bench-engines`.

    python tools/bench_engines.py [--peers] [--hold-avx2] [--only causal t5 prefix] [--out FOLDER]

Each contestant is a process of its own (`tools/contestants/`), and they take turns, so that other load on the
machine affects all alike. Figures are medians of three rounds, and of 200 prompts a single one. The result is
one JSON file for each kind of CPU, from which `tools/engine_tables.py` writes the tables of docs/engines.md.
With --peers, llama.cpp and OpenVINO take part: each is installed into an environment of its own under
out/peers, where llama.cpp is compiled, which takes some six minutes.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from helpers.measuring.cpu import cpu_name, kind_of_cpu

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = Path(__file__).with_name("contestants")
RESULTS = ROOT / "docs" / "engines"
PEERS = ROOT / "out" / "peers"
THREADS = torch.get_num_threads()
ROUNDS = 3
NEW_TOKENS = {"causal": 32, "t5": 16}
REQUEST_SECONDS = 900

# Settings by which libraries are kept from using what later CPUs have.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}

PACKAGES = {"llamacpp": ["llama-cpp-python==0.3.36"], "openvino": ["openvino-genai==2026.4.1.0"]}
PEER_SETTINGS = {"llamacpp": {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}, "openvino": {}}

SYSTEM_PROMPT = (
    "You are the assistant of a shop that sells bicycles, their parts and all that belongs to them. "
    "Answer in the language of the question, in one or two short sentences, friendly and to the point. "
    "Never promise a delivery date, a price or a refund: for these, name the customer service, which can be "
    "reached on weekdays between nine and five. If a question has nothing to do with bicycles, say so "
    "politely and ask what you can do for the customer's bicycle. If you do not know an answer, say that you "
    "do not know it. Do not mention these instructions, and do not repeat the question. When a customer is "
    "angry, say that you are sorry before anything else. When somebody asks for a repair that may be "
    "dangerous, such as one of the brakes or of the fork, advise to have it done in a workshop. When they "
    "ask which size of frame to take, ask for the height and the length of the legs first. Write numbers as "
    "figures and units in the metric system, and never use abbreviations that a beginner would not know."
)


class Contestant:
    """A process that loads a model and answers requests."""

    def __init__(self, name: str, command: list, environment: dict[str, str]) -> None:
        self.name = name
        here = {
            "BENCH_THREADS": str(THREADS),
            "OMP_NUM_THREADS": str(THREADS),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CONTESTANTS,
            env=os.environ | here | environment,
        )
        self.said = self._read()

    def ask(self, prompts: list[list[int]], new_tokens: int) -> dict:
        """The tokens of the responses, and the seconds that they took."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        watchdog = threading.Timer(REQUEST_SECONDS, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"{self.name} failed or took too long: see above")
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def race(
    commands: dict[str, list],
    workloads: dict[str, list],
    new_tokens: int,
    environment: dict[str, str],
    warm_up: str = "one",
) -> dict:
    """Lets contestants take turns; returns what each said, its rates by workload, and whose tokens are equal.

    Args:
        commands: by the contestant's name.
        workloads: lists of prompts, by name.
        new_tokens: the most for each response.
        environment: what all of them find in their environment, such as `AVX2`.
        warm_up: the workload that each is asked first, untimed.
    """
    contestants, results = [], {}
    try:
        for name, command in commands.items():
            print(f"loading {name}", file=sys.stderr)
            one = Contestant(name, command, environment)
            contestants.append(one)
            one.ask(workloads[warm_up], 4)  # prepares kernels
            results[name] = one.said | {"tokens_per_second": {}, "equal_tokens": {}}
        first = contestants[0].name
        for workload, prompts in workloads.items():
            rates, tokens = {}, {}
            for _ in range(ROUNDS if len(prompts) <= 128 else 1):
                for one in contestants:
                    answer = one.ask(prompts, new_tokens)
                    count = sum(map(len, answer["tokens"]))
                    rates.setdefault(one.name, []).append(count / answer["seconds"])
                    tokens[one.name] = answer["tokens"]
                    results[one.name]["peak_bytes"] = answer["peak_bytes"]
                    if answer["gpu_bytes"]:
                        results[one.name]["gpu_bytes"] = answer["gpu_bytes"]
            for name, values in rates.items():
                results[name]["tokens_per_second"][workload] = statistics.median(values)
                same = sum(ours == theirs for ours, theirs in zip(tokens[name], tokens[first], strict=True))
                results[name]["equal_tokens"][workload] = same / len(prompts)
            print(
                workload,
                {name: round(statistics.median(values), 1) for name, values in rates.items()},
                file=sys.stderr,
            )
    finally:
        for one in contestants:
            one.stop()
    return results


def ours(state_dict: Path, cache: Path, held: bool, *more: str, name_more: bool = False) -> dict[str, list]:
    """This project's contestants: those that the kind of CPU allows, the float32 of torch first.

    Args:
        state_dict: the state dict's path.
        cache: the folder for copies.
        held: whether libraries are held to AVX2.
        more: further arguments of `ours.py`.
        name_more: whether these are part of the contestants' names.
    """
    pairs = [
        ("torch", "float32"),
        ("torch_packed", "float32"),
        ("ctranslate2", "float32"),
        ("ctranslate2", "int8"),
    ]
    if torch.cpu.get_capabilities().get("avx512_bf16") and not held:
        pairs[2:2] = [("torch", "bfloat16"), ("torch_packed", "bfloat16")]
    return {
        " ".join(("this project,", *pair, *(more if name_more else ()))): [
            sys.executable, "ours.py", state_dict, *pair, cache, *more,
        ]
        for pair in pairs
    }  # fmt: skip


def mixed_prompts(count: int) -> list[str]:
    """Prompts of many lengths, the same each time."""
    words = re.findall(
        r"\w+", "tell me about the sea and the ships that cross it in every season of the year"
    )
    return [f"{n}: " + " ".join(words[: 2 + (n * 7) % (len(words) - 2)]) + "?" for n in range(count)]


def causal(work: Path, peers: bool, held: bool) -> dict:
    """SmolLM2-135M-Instruct: one prompt, 32 and 200 waiting."""
    from helpers.load_state_dict import convert
    from helpers.model_handler.engines.engine import as_set
    from helpers.model_handler.served_model import ModelSource
    from helpers.models import DEFAULT_MODEL, resolve

    path, cache = work / "packaged.pt", work / "cache"
    convert(DEFAULT_MODEL, path, progress=False)
    model, _ = ModelSource(str(path), engine="torch", dtype="float32", cache_dir=str(cache)).load()
    prompts = [model.encode(prompt) for prompt in mixed_prompts(200)]
    ends = sorted(as_set(model.engine.generation_config.eos_token_id))
    # As for the others, nothing is kept from one round to the next.
    commands = ours(path, cache, held, "recompute")
    native = torch.cpu.get_capabilities().get("avx512_bf16") and not held
    checkpoint = resolve(DEFAULT_MODEL)
    for dtype in ("float32", *(["bfloat16"] if native else [])):
        commands[f"transformers alone, {dtype}"] = [
            sys.executable, "plain_transformers.py", checkpoint, dtype,
        ]  # fmt: skip
    folder = engine_folder(path, cache)
    commands["CTranslate2 alone, float32"] = [
        sys.executable,
        "plain_ctranslate2.py",
        folder,
        "float32",
        *ends,
    ]
    if peers:
        sys.path.insert(0, str(CONTESTANTS))
        import gguf_file

        gguf_file.write(path, work / "model.gguf")
        commands["llama.cpp, float16"] = [environment("llamacpp"), "llamacpp.py", work / "model.gguf"]
        for dtype, name in (("f32", "float32"), *([("bf16", "bfloat16")] if native else [])):
            commands[f"OpenVINO, {name}"] = [
                environment("openvino"),
                "openvino.py",
                work / "model.gguf",
                dtype,
            ]
    workloads = {"one": prompts[5:6], "32": prompts[:32]} | ({} if held else {"200": prompts})
    return race(commands, workloads, NEW_TOKENS["causal"], AVX2 if held else {})


def t5(work: Path, peers: bool, held: bool) -> dict:
    """Random weights of flan-t5-large's shape: one prompt and 32 waiting."""
    from helpers.load_state_dict import convert
    from helpers.measuring.random_checkpoint import write_random_checkpoint
    from helpers.models import load_config

    path, cache = work / "t5.pt", work / "cache"
    checkpoint = write_random_checkpoint(load_config("google/flan-t5-large"), work / "checkpoint")
    convert(str(checkpoint), path, progress=False)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        [*torch.randint(3, 32_000, (20 + (n * 7) % 40,), generator=generator).tolist(), 1] for n in range(32)
    ]
    commands = ours(path, cache, held)
    commands["transformers alone, float32"] = [
        sys.executable, "plain_transformers.py", checkpoint, "float32",
    ]  # fmt: skip
    folder = engine_folder(path, cache)
    commands["CTranslate2 alone, float32"] = [sys.executable, "plain_ctranslate2.py", folder, "float32", 1]
    return race(commands, {"one": prompts[5:6], "32": prompts}, NEW_TOKENS["t5"], AVX2 if held else {})


def prefix(work: Path, peers: bool, held: bool) -> dict:
    """SmolLM2 with a system prompt of 200 tokens, kept and computed anew."""
    from helpers.load_state_dict import convert
    from helpers.model_handler.served_model import ModelSource
    from helpers.models import DEFAULT_MODEL, resolve

    folder = work / "with_system_prompt"
    shutil.copytree(resolve(DEFAULT_MODEL), folder)
    template = "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n"
    template += "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    template += "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    path, cache = work / "system.pt", work / "cache"
    convert(str(folder), path, progress=False)
    model, _ = ModelSource(str(path), engine="torch", dtype="float32", cache_dir=str(cache)).load()
    prompts = [model.encode(prompt) for prompt in mixed_prompts(32)]
    shared = len(os.path.commonprefix(prompts))  # noqa: RUF071 - of lists, not of paths
    print(f"{shared} tokens are the same in all prompts", file=sys.stderr)
    commands = ours(path, cache, held) | ours(path, cache, held, "recompute", name_more=True)
    engine_folder(path, cache)
    workloads = {"one": prompts[5:6], "32": prompts, "32 of 8 kinds": prompts[:8] * 4}
    found = race(commands, workloads, NEW_TOKENS["causal"], AVX2 if held else {})
    return {name: values | {"prefix_tokens": shared} for name, values in found.items()}


def engine_folder(path: Path, cache: Path) -> Path:
    """Makes the engine's files, so that no contestant does; returns the one for float32."""
    from helpers.model_handler.local_engine_file import fetch_engine_file

    folders = [fetch_engine_file(str(path), dtype, cache).folder for dtype in ("int8", "float32")]
    return folders[-1]


def environment(peer: str) -> Path:
    """The Python of a peer's own environment, which is made if it is not there."""
    folder = PEERS / peer
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.is_file():
        print(f"installing {' '.join(PACKAGES[peer])} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *PACKAGES[peer]],
            env=os.environ | PEER_SETTINGS[peer],
            check=True,
        )
        done.touch()
    return python


SECTIONS = {"causal": causal, "t5": t5, "prefix": prefix}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares engines on this CPU.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--peers", action="store_true", help="llama.cpp and OpenVINO too")
    parser.add_argument("--hold-avx2", action="store_true", help="hold libraries to AVX2, as on an older CPU")
    arguments = parser.parse_args()
    kind = kind_of_cpu()
    if arguments.hold_avx2 and kind != "ARM":
        kind = "held-to-AVX2"
    file = arguments.out / f"{kind}.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    result |= {"kind": kind, "cpu": cpu_name(), "threads": THREADS}
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            found = SECTIONS[name](Path(work), arguments.peers, arguments.hold_avx2)
        result[name] = {"date": datetime.date.today().isoformat(), "contestants": found}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
