"""Runs the notebooks in order, as their readers do.

    python tools/run_notebooks.py [--out DIR] [-p NAME VALUE]... [NOTEBOOK...]

Executed copies go to DIR. `--commit` writes them into notebooks/, without what only a live kernel can show.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ANSWERS_TAG = "answers"
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_SECONDS = 1800


def execute(source: Path, folder: Path, parameters: dict[str, object]) -> Path:
    """Executes a notebook; the copy appears in `folder` when it has run to its end.

    Raises:
        PapermillExecutionError: a cell failed; NAME.failed.ipynb in `folder` shows which, and why.
        DeadKernelError: the kernel died, perhaps for lack of memory.
        CellTimeoutError: a cell took longer than CELL_SECONDS.
    """
    target = folder / source.name
    running, failed = target.with_suffix(".running.ipynb"), target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            source,
            running,
            parameters=parameters,
            kernel_name="python3",
            progress_bar={"desc": source.stem, "leave": False},
            execution_timeout=CELL_SECONDS,
        )
        running.replace(target)
    except Exception:
        if running.is_file():
            running.replace(failed)
        raise
    finally:
        running.unlink(missing_ok=True)
    return target


def without_live_parts(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is committed: no widgets, which need a kernel, and no times or paths of this run."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_live(output)]
    return notebook


def _is_live(output: nbformat.NotebookNode) -> bool:
    data = output.get("data", {})
    # Beam's spinner, and the script that removes it.
    if "application/javascript" in data or "progress_indicator_" in data.get("text/html", ""):
        return True
    is_blank = set(data) == {"text/plain"} and not data["text/plain"].strip()
    return WIDGET in data or is_blank or output.get("name") == "stderr"


def answers(path: Path) -> str | None:
    """The table of prompts and answers that a notebook shows, as text."""
    for cell in nbformat.read(path, as_version=4).cells:
        if ANSWERS_TAG in cell.metadata.get("tags", []):
            return "\n".join(output.data["text/plain"] for output in cell.outputs if "data" in output)
    return None


def _tell_where(folder: Path, source: Path) -> None:
    print(f"The notebook up to that cell: {folder / source.stem}.failed.ipynb", file=sys.stderr)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs the notebooks in order.")
    parser.add_argument("notebooks", nargs="*", help="names, for instance 01_size_the_model; by default all")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where executed copies go")
    parser.add_argument("--commit", action="store_true", help="write the copies into notebooks/")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    names = [Path(name).stem for name in arguments.notebooks] or sorted(
        p.stem for p in NOTEBOOKS.glob("*.ipynb")
    )
    sources = [NOTEBOOKS / f"{name}.ipynb" for name in names]
    if missing := [str(source) for source in sources if not source.is_file()]:
        parser.error(f"there is no {', '.join(missing)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Silences a warning from the kernel's debugger that is of no use to a reader.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    # An empty value is an empty text, as papermill itself reads it; for YAML it is nothing.
    parameters = {name: yaml.safe_load(value) if value else "" for name, value in arguments.parameter}
    started, last = time.monotonic(), None
    for number, source in enumerate(sources, start=1):
        begun = time.monotonic()
        print(f"[{number}/{len(sources)}] {source.stem} ...", flush=True)
        try:
            done = execute(source, arguments.out, parameters)
        except PapermillExecutionError as error:
            print(f"{source.stem} failed in cell In [{error.exec_count}]:\n{error.ename}: {error.evalue}")
            _tell_where(arguments.out, source)
            return 1
        except (DeadKernelError, CellTimeoutError) as error:
            print(f"{source.stem} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
            _tell_where(arguments.out, source)
            return 1
        except KeyboardInterrupt:
            print(
                f"\nInterrupted in {source.stem}; what ran before it is in {arguments.out}.", file=sys.stderr
            )
            return 130
        if arguments.commit:
            notebook = nbformat.read(done, as_version=4)
            nbformat.write(without_live_parts(notebook), source)
        print(f"[{number}/{len(sources)}] {source.stem}: {time.monotonic() - begun:.0f} s", flush=True)
        last = answers(done) or last
    print(f"Finished in {time.monotonic() - started:.0f} s; the executed notebooks are in {arguments.out}/")
    if last:
        print(f"\n{last}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
