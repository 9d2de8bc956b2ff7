"""The notebooks' plots: few colours, told apart in grey by shade and hatching, axes with their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import apache_beam as beam
    import torch
    from matplotlib.axes import Axes

    from helpers.measuring.memory import Measurement
    from helpers.measuring.streaming import BatchTimes, Point, Predicted, Records, Simulated

GB = 1e9
# From dark to light, each with a hatch: shades alone are hard to match with a legend.
SHADES = (("#1b3a57", ""), ("#4f81b0", "//"), ("#a9c5de", ".."), ("#e3e9ef", "xx"), ("#ffffff", "\\\\"))
EDGE = "#444444"


def new_axes(width: float = 8, height: float = 3.2) -> Axes:
    """Axes in the notebooks' common style; sizes in inches."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def stacked_bars(bars: Mapping[str, Mapping[str, float]], *, xlabel: str, axes: Axes | None = None) -> Axes:
    """Horizontal bars, each of several parts.

    Args:
        bars: label of a bar → name of a part → its length, in the unit that `xlabel` names.
        xlabel: what the lengths are, with their unit.
        axes: where to draw.
    """
    axes = axes or new_axes(height=1.1 + 0.45 * len(bars))
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    left = [0.0] * len(bars)
    for part, (shade, hatch) in zip(parts, SHADES, strict=False):
        lengths = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(
            list(bars), lengths, left=left, height=0.6, label=part, color=shade, hatch=hatch, edgecolor=EDGE
        )
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    axes.bar_label(axes.containers[-1], labels=[f" {total:.2f}" for total in left])
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="#dddddd")
    axes.legend(frameon=False, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return axes


def grouped_bars(
    labels: Sequence[str], groups: Mapping[str, Iterable[float]], *, xlabel: str, axes: Axes | None = None
) -> Axes:
    """Horizontal bars side by side: one per group for each label, with its value at the end.

    Args:
        labels: the labels along the axis.
        groups: name → a value for each label, in the unit that `xlabel` names.
        xlabel: what the values are, with their unit.
        axes: where to draw.
    """
    axes = axes or new_axes(height=1.1 + 0.32 * len(labels) * len(groups))
    height = 0.8 / len(groups)
    for index, ((name, values), (shade, hatch)) in enumerate(zip(groups.items(), SHADES, strict=False)):
        places = [place + index * height for place in range(len(labels))]
        bars = axes.barh(
            places, list(values), height=height, label=name, color=shade, hatch=hatch, edgecolor=EDGE
        )
        axes.bar_label(bars, fmt=" %.3g", fontsize=8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="#dddddd")
    # A legend that is wider than the plot would squeeze it.
    axes.legend(frameon=False, ncols=min(len(groups), 3), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return axes


def predicted_and_measured(measurements: Sequence[Measurement]) -> Axes:
    """Predicted beside measured memory, a pair of bars for each measurement."""
    labels = [f"{m.model_name.split('/')[-1]}, {m.phase}, {m.method}" for m in measurements]
    groups = {
        "predicted": [m.predicted / GB for m in measurements],
        "measured": [m.measured / GB for m in measurements],
    }
    return grouped_bars(labels, groups, xlabel="peak memory of the process (GB = 10⁹ bytes)")


def rounding(weights: torch.Tensor) -> None:
    """What rounding to float16 and bfloat16 does to numbers of any size, above a histogram of real weights.

    Args:
        weights: some of a model's weights, in any shape.
    """
    import matplotlib.pyplot as plt
    import torch

    _, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.4), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    edges = torch.logspace(-9, 6, 151, dtype=torch.float64)
    for name, color, style in (("float16", "black", "-"), ("bfloat16", "#4f81b0", "--")):
        errors = [_largest_error(low, high, name) for low, high in pairwise(edges)]
        above.loglog(edges[:-1], errors, style, color=color, label=name)
    above.annotate("float16 overflows", (65504, 3e-2), xytext=(-3, 0), textcoords="offset points", ha="right")
    above.axvline(65504, color="#888888", linewidth=0.8)
    above.set_ylabel("relative error,\nat most")
    above.legend(frameon=False, loc="lower left")
    sizes = weights.flatten().abs().double()
    below.hist(sizes[sizes > 0], bins=edges, color=SHADES[2][0], edgecolor=EDGE, linewidth=0.3)
    below.set_yticks([])
    below.set(xlabel="size of a weight (absolute value)", ylabel="weights of\nthis model")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)


def _largest_error(low: torch.Tensor, high: torch.Tensor, dtype: str) -> float:
    """The largest relative error of rounding numbers from low to high; 1 if any become zero or infinite."""
    import torch

    exact = torch.linspace(float(low), float(high), 200, dtype=torch.float64)
    rounded = exact.to(getattr(torch, dtype)).double()
    return float(((rounded - exact).abs() / exact).clamp(max=1).max())


def pipeline_graph(pipeline: beam.Pipeline) -> Axes:
    """A Beam pipeline's steps, as its author named them, and what flows between them."""
    proto = pipeline.to_runner_api()
    transforms = proto.components.transforms
    [root] = proto.root_transform_ids
    steps = [transforms[key] for key in transforms[root].subtransforms] or [transforms[root]]
    made_by = {pcollection: step for step in steps for pcollection in step.outputs.values()}
    before = {
        step.unique_name: [made_by[p].unique_name for p in step.inputs.values() if p in made_by]
        for step in steps
    }
    column: dict[str, int] = {}
    for step in steps:  # in the order they were made: the steps before this one have their columns
        column[step.unique_name] = 1 + max((column[name] for name in before[step.unique_name]), default=-1)
    columns = [
        [name for name in column if column[name] == place] for place in range(1 + max(column.values()))
    ]
    place = {
        name: (x * 2.4, (len(names) - 1) / 2 - y)
        for x, names in enumerate(columns)
        for y, name in enumerate(names)
    }
    axes = new_axes(width=2.2 * len(columns), height=0.5 + 0.6 * max(map(len, columns)))
    box = {"boxstyle": "round,pad=0.5", "facecolor": SHADES[3][0], "edgecolor": EDGE}
    drawn = {
        # Without the cell's number, "[7]: ", which Beam puts before the name in a notebook.
        name: axes.text(*spot, name.rpartition("]: ")[2], ha="center", va="center", bbox=box, fontsize=9)
        for name, spot in place.items()
    }
    for name, earlier_names in before.items():
        for earlier in earlier_names:
            ends = {"patchA": drawn[earlier].get_bbox_patch(), "patchB": drawn[name].get_bbox_patch()}
            arrow = {"arrowstyle": "->", "color": EDGE, "shrinkA": 2, "shrinkB": 2, **ends}
            axes.annotate("", place[name], place[earlier], arrowprops=arrow)
    axes.set_xlim(-1, 2.4 * (len(columns) - 1) + 1)
    axes.set_ylim(-max(map(len, columns)) / 2 - 0.2, max(map(len, columns)) / 2 + 0.2)
    axes.axis("off")
    return axes


def latencies(seconds: Sequence[float], *, xlabel: str, ylabel: str) -> Axes:
    """A dot for each message, in the order of publishing: those answered together stand at one height.

    Args:
        seconds: how long each message waited for its answer.
        xlabel: what the messages are.
        ylabel: from when to when, with the unit.
    """
    axes = new_axes(height=3)
    axes.plot(
        range(1, len(seconds) + 1), seconds, "o", color=SHADES[1][0], markeredgecolor=EDGE, markersize=4
    )
    for share, style, name in ((0.5, "--", "half"), (0.95, ":", "95 %")):
        value = percentile(seconds, share)
        axes.axhline(value, color=EDGE, linestyle=style, label=f"{name} within {value:.1f} s")
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.15 * max(seconds)))
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return axes


def latency_against_rate(
    measured: Sequence[Point], predicted: Sequence[Predicted] = (), *, at: float = 0.0
) -> Axes:
    """Latency against the offered rate: predicted as lines, measured as marks, and the highest rate that was
    kept up with as a vertical line.

    Args:
        measured: a running job at several rates.
        predicted: at rates near enough to each other for a line.
        at: the rate of that line, in messages a second; 0 for none.
    """
    axes = new_axes(height=3.6)
    for name, (shade, _), mark, style in (
        ("p50", SHADES[1], "o", "--"),
        ("p95", SHADES[0], "s", "-"),
    ):
        if predicted:
            axes.plot(
                [one.offered for one in predicted],
                [getattr(one, name) for one in predicted],
                style,
                color=shade,
                label=f"{name}, predicted",
            )
        finite = [one for one in measured if math.isfinite(getattr(one, name))]
        axes.plot(
            [one.offered for one in finite],
            [getattr(one, name) for one in finite],
            mark,
            color=shade,
            markeredgecolor=EDGE,
            label=f"{name}, measured",
        )
    if at:
        axes.axvline(at, color="#888888", linewidth=0.8)
        axes.annotate(
            "kept up with", (at, 1), xycoords=("data", "axes fraction"), xytext=(-4, -4),
            textcoords="offset points", ha="right", va="top", color=EDGE,
        )  # fmt: skip
    _log_with_plain_numbers(axes)
    axes.set(xlabel="messages sent a second", ylabel="seconds until\nthe response")
    axes.grid(color="#eeeeee")
    _legend_beside(axes)
    return axes


def batch_times(ways: Mapping[str, BatchTimes]) -> Axes:
    """The seconds that batches take, by their size.

    Args:
        ways: what was measured → its times.
    """
    axes = new_axes(height=3)
    marks = ("o-", "s--", "^:", "D-.", "v-", "P--")
    for (name, times), mark in zip(ways.items(), marks, strict=False):
        axes.plot(times.sizes, times.times, mark, markersize=5, markeredgecolor=EDGE, label=name)
    _log_with_plain_numbers(axes)
    axes.set(xlabel="messages answered together", ylabel="seconds")
    axes.grid(color="#eeeeee")
    _legend_beside(axes)
    return axes


def backlog(measured: Records, predicted: Simulated, *, burst: tuple[float, float]) -> Axes:
    """How many messages wait, over time, measured and predicted.

    Args:
        measured: what was sent and answered.
        predicted: the same arrivals, simulated.
        burst: when it begins and ends, in seconds.
    """
    axes = new_axes(height=3)
    end = max(measured.drained_at(burst[1]), predicted.drained_at(burst[1]))
    end = 1.1 * (end if math.isfinite(end) else measured.messages[-1].intended)
    times = [end * place / 400 for place in range(401)]
    axes.axvspan(*burst, color=SHADES[3][0], label="burst")
    axes.plot(
        times, [predicted.waiting_at(when) for when in times], "--", color=SHADES[0][0], label="predicted"
    )
    axes.plot(times, [measured.waiting_at(when) for when in times], color=SHADES[1][0], label="measured")
    axes.set(xlabel="seconds", ylabel="messages that\nwait", ylim=(0, None), xlim=(0, end))
    _legend_beside(axes)
    return axes


def _legend_beside(axes: Axes) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _log_with_plain_numbers(axes: Axes) -> None:
    """Makes both axes logarithmic, with their numbers written out: 0.5 and 20, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


# Each notebook with what it takes in; the last one's result comes after it.
STEPS = (
    ("01", "size\nthe model", "a model's\nname"),
    ("02", "convert\nthe weights", "memory,\nmachine"),
    ("03", "try it\ninteractively", "state dict\nin gs://"),
    ("04", "deploy\nthe stream", "answers in\na notebook"),
    ("05", "tune the\nthroughput", "a running\njob"),
)
RESULT = "rate, latency\nand cost"


def series(here: str) -> Axes:
    """The way from a model's name to a job that is tuned, and the step that a notebook is.

    Args:
        here: the notebook's number, as `"03"`.
    """
    axes = new_axes(width=10.5, height=1.3)
    apart = 2.5
    for place, (number, does, takes) in enumerate(STEPS):
        is_here, x = number == here, apart * place
        box = {"boxstyle": "round,pad=0.6", "edgecolor": EDGE, "facecolor": SHADES[0 if is_here else 3][0]}
        color, weight = ("white", "bold") if is_here else ("black", "normal")
        axes.text(
            x,
            0,
            f"{number}\n{does}",
            ha="center",
            va="center",
            bbox=box,
            fontsize=9,
            color=color,
            weight=weight,
        )
        _arrow(axes, x - 1.8, x - 0.72, takes)
    _arrow(axes, apart * (len(STEPS) - 1) + 0.72, apart * (len(STEPS) - 1) + 1.8, RESULT)
    axes.set_xlim(-1.9, apart * (len(STEPS) - 1) + 1.9)
    axes.set_ylim(-1, 1)
    axes.axis("off")
    return axes


def _arrow(axes: Axes, start: float, end: float, label: str) -> None:
    axes.annotate("", (end, 0), (start, 0), arrowprops={"arrowstyle": "->", "color": EDGE})
    axes.text((start + end) / 2, 0.12, label, ha="center", va="bottom", fontsize=8, color=EDGE)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share`, 0 to 1, of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
