"""Makes the README's picture from the committed notebooks: what was asked, answered and measured.

python tools/pictures.py
"""

import base64
import html
import io
import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "run.png"
MOST_CHARACTERS = 150  # of an answer


def outputs(name: str, marker: str) -> list[NotebookNode]:
    """The outputs of the notebook's one cell that has a text in its source."""
    [path] = (ROOT / "notebooks").glob(f"{name}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    [cell] = [cell for cell in cells if cell.cell_type == "code" and marker in cell.source]
    return cell.outputs


def rows(name: str, marker: str) -> list[list[str]]:
    """The cells of the table that a notebook's cell shows."""
    [table] = [o.data["text/html"] for o in outputs(name, marker) if "text/html" in o.get("data", {})]
    body = table.partition("<tbody>")[2]
    found = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [html.unescape(text) for text in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in found
    ]


def plot(name: str, marker: str):
    """The plot that a notebook's cell shows, as pixels."""
    [png] = [o.data["image/png"] for o in outputs(name, marker) if "image/png" in o.get("data", {})]
    return plt.imread(io.BytesIO(base64.b64decode(png)))


def main() -> None:
    """Writes the picture."""
    figure, parts = plt.subplot_mosaic(
        [["answers", "latency"], ["answers", "rates"]],
        figsize=(13, 6.4),
        width_ratios=(1, 1.15),
        height_ratios=(1, 1.9),
        dpi=100,
    )
    figure.subplots_adjust(left=0.02, right=0.99, top=0.95, bottom=0.01, wspace=0.04, hspace=0.14)
    lines = []
    for prompt, answer in rows("04", "answer_of.get("):
        short = textwrap.shorten(answer, MOST_CHARACTERS, placeholder=" …")
        lines += [(prompt, "bold"), *((line, "normal") for line in textwrap.wrap(short, 52)), ("", "normal")]
    for number, (line, weight) in enumerate(lines):
        parts["answers"].text(0, 0.98 - number * 0.055, line, weight=weight, fontsize=12, va="top")
    parts["answers"].set_title("Asked through Pub/Sub, answered by the job", loc="left", fontsize=11)
    parts["latency"].imshow(plot("04", "plots.latencies("))
    parts["latency"].set_title("Notebook 04: fifty more at once", loc="left", fontsize=11)
    parts["rates"].imshow(plot("03", "plots.grouped_bars("))
    for name in ("latency", "rates"):
        parts[name].set_anchor("W")
    parts["rates"].set_title(
        "Notebook 03: what batches, dtypes and engines are worth", loc="left", fontsize=11
    )
    for part in parts.values():
        part.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Software": None})
    print(f"Wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
