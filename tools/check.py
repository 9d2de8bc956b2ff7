"""Checks what a reader sees: the committed notebooks, the pages, their links and badges, spelling and style.

    python tools/check.py [--root DIR]

Each function yields a sentence for each problem that it finds; the exit code is 1 if there are any.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import badges
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
MOST_LINES = 25  # of a code cell
MOST_BYTES = 1_000_000  # of a notebook
MOST_OUTPUT_BYTES = 250_000  # of one output: a plot has some 30,000
MOST_CODE_CELLS = 2  # in a row, without prose between them
A_PATH = re.compile(r"(?<![\w./])/(?:work|tmp|root|home|opt|usr|content|Users|var)/\S+")
A_WARNING = re.compile(r"(?i)\bwarning\b|Traceback|KeyboardInterrupt")
A_REMINDER = re.compile(r"\b(TODO|FIXME|TBD|XXX)\b|^[A-Z]{4,}$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
SETTLED_METADATA = {"kernelspec", "language_info"}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
# What the spelling checker would take for errors: names, and hexadecimal digits.
WORDS = "abd,ans,ser,fo,te,nd"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook: NotebookNode) -> str:
    """The notebook's markdown cells."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def text_of(output: NotebookNode) -> str:
    """What an output shows as text."""
    data = output.get("data", {})
    return output.get("text") or "\n".join(data.get(kind, "") for kind in ("text/plain", "text/html"))


# Notebooks


def execution(notebook: NotebookNode) -> Iterator[str]:
    """Executed once, from top to bottom."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not executed from top to bottom: its cells have the numbers {counts}"


def outputs(notebook: NotebookNode) -> Iterator[str]:
    """No error, no warning, no path of the machine it ran on, and nothing large."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {number} ended in {output.ename}"
                continue
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {output.text[:80]!r}"
            text = text_of(output)
            if found := A_PATH.search(text):
                yield f"cell {number} shows a path of the machine: {found[0][:80]}"
            if found := A_WARNING.search(text):
                yield f"cell {number} shows {found[0]!r}"
            if WIDGET in output.get("data", {}):
                yield f"cell {number} has a widget, which needs a kernel"
            if (size := len(str(output))) > MOST_OUTPUT_BYTES:
                yield f"cell {number} has an output of {size:,} bytes"
    if (size := len(nbformat.writes(notebook))) > MOST_BYTES:
        yield f"it has {size:,} bytes"
    if extra := notebook.metadata.keys() - SETTLED_METADATA:
        yield f"metadata of a run: {', '.join(sorted(extra))}"


def parameters(notebook: NotebookNode) -> Iterator[str]:
    """One cell with the tag `parameters`: literals, each with its type and a comment."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        yield f"{len(cells)} cells with the tag parameters"
        return
    lines = cells[0].source.splitlines()
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        yield f"the parameters are no Python: {error.msg}"
        return
    for statement in statements:
        line = lines[statement.lineno - 1]
        if not isinstance(statement, ast.AnnAssign):
            yield f"a parameter without a type: {line}"
            continue
        try:
            ast.literal_eval(statement.value)
        except (ValueError, TypeError):
            yield f"a parameter that is no literal: {line}"
        if "  # " not in lines[statement.end_lineno - 1]:
            yield f"a parameter without a comment: {line}"
    if not cells[0].source.count("project: str = "):
        yield "no parameter `project: str`"


def order(notebook: NotebookNode) -> Iterator[str]:
    """A title first, prose before code, short cells, and nothing defined that belongs in a module."""
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        yield "it does not begin with a title"
    row = 0
    for number, cell in enumerate(notebook.cells):
        row = row + 1 if cell.cell_type == "code" else 0
        if row == MOST_CODE_CELLS + 1:
            yield f"cell {number}: {row} code cells in a row, without prose"
        if cell.cell_type != "code":
            continue
        if (length := len(cell.source.splitlines())) > MOST_LINES:
            yield f"cell {number} has {length} lines"
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            yield f"cell {number} is no Python: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield f"cell {number} defines {node.name}, which belongs in a module"
            if isinstance(node, ast.ImportFrom) and re.match(r"helpers\.\w+\.", node.module or ""):
                yield f"cell {number} imports from {node.module}: import from the step"


def same_set_up(notebooks: dict[str, NotebookNode]) -> Iterator[str]:
    """The same set-up cell in all."""
    cells: dict[str, str] = {}
    for name, notebook in notebooks.items():
        found = [cell.source for cell in code_cells(notebook) if "notebook.connect(" in cell.source]
        if len(found) != 1:
            yield f"{name}: {len(found)} set-up cells"
        cells |= dict.fromkeys(found, name)
    if len(cells) > 1:
        yield f"the set-up cells of {' and '.join(cells.values())} differ"


NOTEBOOK_CHECKS = (execution, outputs, parameters, order)


# Pages


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    slugs = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slugs.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return slugs | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def links(path: Path, text: str, texts: dict[Path, str]) -> Iterator[str]:
    """Links that lead nowhere: files and anchors that are not there, addresses that cannot be.

    Args:
        path: of the page.
        text: its markdown.
        texts: the markdown of each page, for the anchors in it.
    """
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text) + REFERENCE.findall(text):
        parts = urlsplit(link)
        if parts.scheme == "mailto":
            continue
        if parts.scheme in ("http", "https"):
            if parts.scheme == "http" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.hostname or ""):
                yield f"a link that can't be right: {link}"
            if re.search(r"OWNER|REPO\b|<|example\.com|localhost", link):
                yield f"a link with a place-holder: {link}"
            continue
        target = (path.parent / unquote(parts.path)).resolve()
        if parts.path and not target.exists():
            yield f"a link to {link}, which is not there"
        elif parts.fragment and parts.fragment not in anchors(texts.get(target, "") if parts.path else text):
            yield f"a link to {link}: no such heading"


# The whole


def spelling(root: Path, pages: dict[Path, str]) -> Iterator[str]:
    """Words that codespell takes for errors, in pages and notebooks' prose, and in the code."""
    command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", WORDS]
    files = [str(path) for folder in ("helpers", "tools", "tests") for path in (root / folder).rglob("*.py")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    yield from (line.replace(f"{root}/", "") for line in done.stdout.splitlines())
    if done.returncode and not done.stdout:
        yield f"codespell failed: {done.stderr.strip()[-300:]}"
    for path, text in pages.items():
        done = subprocess.run([*command, "-"], input=text, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            if "==>" in line:
                yield f"{path.relative_to(root)}: {line.strip()}"


def style(root: Path) -> Iterator[str]:
    """What ruff finds."""
    for command in (["check", "--output-format", "concise"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(root)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [
                line for line in done.stdout.splitlines() if ":" in line and not line.startswith((" ", "|"))
            ]
            yield from lines or [f"ruff failed: {done.stderr.strip()[-300:]}"]


def problems(root: Path) -> Iterator[str]:
    """All that is wrong in a repository."""
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    pages = {path: prose(notebook) for path, notebook in notebooks.items()}
    for path in (
        *root.glob("*.md"),
        *(p for f in ("docs", "helpers", "notebooks") for p in (root / f).rglob("*.md")),
    ):
        pages[path] = path.read_text()
    for path, notebook in notebooks.items():
        for check in NOTEBOOK_CHECKS:
            yield from (f"{path.name}: {problem}" for problem in check(notebook))
    yield from same_set_up({path.name: notebook for path, notebook in notebooks.items()})
    for path, text in pages.items():
        found = [*links(path, text, {page.resolve(): other for page, other in pages.items()})]
        found += [f"a reminder: {match[0]}" for match in A_REMINDER.finditer(text)]
        yield from (f"{path.relative_to(root)}: {problem}" for problem in found)
    yield from badges.problems(root)
    yield from spelling(root, pages)
    yield from style(root)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks the notebooks, pages, links, badges and style.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository's folder")
    root = parser.parse_args().root.resolve()
    found = list(problems(root))
    print("\n".join([*found, f"{len(found)} problems." if found else "Nothing is wrong."]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
