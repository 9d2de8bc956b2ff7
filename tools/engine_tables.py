"""Writes the tables of docs/engines.md from the committed results of `tools/bench_engines.py` and
`tools/bench_gpu.py`.

python tools/engine_tables.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "engines"
PAGE = ROOT / "docs" / "engines.md"
TABLES = re.compile(r"(<!-- tables -->\n).*?(<!-- /tables -->)", re.DOTALL)

SECTIONS = {
    "causal": "SmolLM2-135M-Instruct, up to 32 new tokens",
    "t5": "random weights of flan-t5-large's shape, 16 new tokens",
    "prefix": "SmolLM2-135M-Instruct with a long system prompt, up to 32 new tokens",
    "gpu flan-t5-large": "random weights of flan-t5-large's shape, up to 32 new tokens",
    "gpu flan-t5-large alone": "the same shape, on another machine of this kind",
    "gpu flan-t5-xl": "random weights of flan-t5-xl's shape, up to 32 new tokens",
    "gpu SmolLM2-1.7B": "random weights of SmolLM2-1.7B's shape, up to 32 new tokens",
}
KINDS = {
    "AVX512-BF16": "CPU with AVX512-BF16, without AMX",
    "AVX2": "CPU with AVX2 only",
    "held-to-AVX2": "the first CPU, with its libraries held to AVX2",
}


def page() -> str:
    """The page with tables as the results say."""
    tables = "\n".join(_tables(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json")))
    return TABLES.sub(lambda match: f"{match[1]}\n{tables}\n{match[2]}", PAGE.read_text())


def _tables(result: dict) -> str:
    kind = KINDS.get(result["kind"], result["kind"])
    parts = [
        _table(f"{kind[0].upper()}{kind[1:]}: {title}", result, result[section])
        for section, title in SECTIONS.items()
        if section in result
    ]
    return "\n".join(parts)


def _table(title: str, result: dict, section: dict) -> str:
    contestants = section["contestants"]
    workloads = list(next(iter(contestants.values()))["tokens_per_second"])
    waiting = {"one": "one prompt", "32 of 8 kinds": "32 waiting, of which 8 differ"}
    waiting = {name: waiting.get(name, f"{name} waiting") for name in workloads}
    prefix = next(iter(contestants.values())).get("prefix_tokens")
    common = f" {prefix} tokens are the same in all prompts." if prefix else ""
    last = workloads[-1]
    threads = f"{result['threads']} threads" if "threads" in result else f"torch {result['torch']}"
    kind = "GPU memory" if "torch" in result else "peak memory"
    lines = [
        f"### {title}",
        "",
        f"{result['cpu']}, {threads}, {section['date']}. Tokens a second, medians.{common}",
        "",
        f"| computed by | {' | '.join(waiting[name] for name in workloads)} | {kind} | equal answers |",
        f"|---|{'---|' * len(workloads)}---|---|",
    ]
    for name, values in contestants.items():
        rates = " | ".join(_rate(values["tokens_per_second"][one]) for one in workloads)
        size = values.get("gpu_bytes") if "torch" in result else values["peak_bytes"]
        memory = f"{size / 1e9:.2f} GB" if size else "not measured"
        lines.append(f"| {_named(name, values)} | {rates} | {memory} | {values['equal_tokens'][last]:.0%} |")
    return "\n".join([*lines, ""])


def _rate(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"


def _named(name: str, values: dict) -> str:
    version = f" {values['version']}" if "version" in values else ""
    maker, _, rest = name.partition(",")
    return f"{maker}{version.partition('-')[0]},{rest}"


if __name__ == "__main__":
    PAGE.write_text(page())
