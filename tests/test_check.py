"""`make check` finds nothing in this repository, and each of its checks finds what is broken on purpose."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check  # noqa: E402

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = 'project: str = ""  # a project\nn: int = 3  # how many'


def good() -> nbformat.NotebookNode:
    """A small notebook with nothing wrong in it."""
    cells = [
        new_markdown_cell("# Title\n\n<!-- badges notebooks/00_good.ipynb --><!-- /badges -->"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}, execution_count=1),
        new_markdown_cell("What follows prints."),
        new_code_cell(
            "from helpers import notebook\nnotebook.connect(project)",
            execution_count=2,
            outputs=[new_output("stream", name="stdout", text="gs://bucket/path is in place\n")],
        ),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def found(notebook: nbformat.NotebookNode) -> list[str]:
    return [problem for one in check.NOTEBOOK_CHECKS for problem in one(notebook)]


def test_nothing_is_wrong_in_this_repository():
    assert list(check.problems(ROOT)) == []


def test_a_good_notebook_has_no_problem():
    assert found(good()) == []


def set_output(notebook, **output):
    notebook.cells[3].outputs = [new_output(**output)]


def printing(text: str):
    return lambda n: set_output(n, output_type="stream", name="stdout", text=text)


def set_source(notebook, number: int, source: str):
    notebook.cells[number].source = source


BROKEN = {
    "not executed": (lambda n: n.cells[3].update(execution_count=None), "not executed from top"),
    "executed out of order": (lambda n: n.cells[1].update(execution_count=7), "not executed from top"),
    "an error": (
        lambda n: set_output(n, output_type="error", ename="KeyboardInterrupt", evalue="", traceback=[]),
        "ended in KeyboardInterrupt",
    ),
    "stderr": (
        lambda n: set_output(n, output_type="stream", name="stderr", text="a line of a log"),
        "wrote to stderr",
    ),
    "a warning": (printing("UserWarning: this\nWarning: that"), "shows 'Warning'"),
    "a path": (printing("written to /home/someone/out"), "shows a path of the machine: /home/someone/out"),
    "a path in Colab": (printing("in /content/streaming-llm"), "/content/streaming-llm"),
    "a blob": (
        lambda n: set_output(n, output_type="display_data", data={"image/png": "A" * 300_000}),
        "has an output of 300,",
    ),
    "a widget": (
        lambda n: set_output(n, output_type="display_data", data={check.WIDGET: {"model_id": "x"}}),
        "has a widget",
    ),
    "no Python": (lambda n: set_source(n, 3, "%pip list"), "is no Python"),
    "metadata of a run": (lambda n: n.metadata.update(widgets={}), "metadata of a run: widgets"),
    "no parameters": (lambda n: n.cells[1].metadata.clear(), "0 cells with the tag parameters"),
    "a parameter without a type": (lambda n: set_source(n, 1, PARAMETERS + "\nx = 3  # x"), "without a type"),
    "a derived parameter": (lambda n: set_source(n, 1, PARAMETERS + "\nx: int = n + 1  # x"), "no literal"),
    "a parameter without a comment": (lambda n: set_source(n, 1, PARAMETERS + "\nx: int = 3"), "a comment"),
    "no project": (lambda n: set_source(n, 1, "n: int = 3  # how many"), "no parameter `project: str`"),
    "no title": (lambda n: set_source(n, 0, "Some prose."), "does not begin with a title"),
    "code without prose": (
        lambda n: n.cells.extend([new_code_cell("n", execution_count=i) for i in (3, 4)]),
        "3 code cells in a row",
    ),
    "a long cell": (lambda n: set_source(n, 3, "n\n" * 26), "has 26 lines"),
    "a function": (lambda n: set_source(n, 3, "def f():\n    pass"), "defines f"),
    "a deep import": (lambda n: set_source(n, 3, "from helpers.sizing.sizes import x"), "from the step"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_of_a_notebook_can_fail(name):
    breaks, problem = BROKEN[name]
    notebook = good()
    breaks(notebook)
    assert any(problem in one for one in found(notebook)), found(notebook)


def test_set_up_cells_that_differ_are_found():
    other = good()
    other.cells[3].source += "  # otherwise"
    [problem] = check.same_set_up({"one": good(), "two": other})
    assert problem == "the set-up cells of one and two differ"
    other.cells.pop(3)
    assert list(check.same_set_up({"two": other})) == ["two: 0 set-up cells"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "a link to missing.md, which is not there"),
        ("[a](#no-such-part)", "no such heading"),
        ("[a](other.md#nothing)", "no such heading"),
        ("[a](http://cloud.google.com/x)", "can't be right"),
        ("[a](https://githubcom/x)", "can't be right"),
        ("[a](https://github.com/OWNER/REPO)", "place-holder"),
        ("[a]: missing.md", "a link to missing.md"),
    ],
)
def test_a_dead_link_is_found(tmp_path, text, problem):
    (tmp_path / "other.md").write_text("# Something")
    texts = {tmp_path / "page.md": text, tmp_path / "other.md": "# Something"}
    [one] = check.links(tmp_path / "page.md", text, texts)
    assert problem in one


def test_good_links_are_none(tmp_path):
    (tmp_path / "other.md").write_text("")
    text = "## Two words, `code`\n[a](#two-words-code) [b](other.md#c-d) [c](https://cloud.google.com/a?b=c)"
    texts = {tmp_path / "other.md": "### C d"}
    assert list(check.links(tmp_path / "page.md", text, {tmp_path / "page.md": text} | texts)) == []


# Put together here, so that this file has no error of spelling.
MISSPELT = "sep" + "erate"


@pytest.fixture
def repository(tmp_path) -> Path:
    """A small repository with nothing wrong in it."""
    for folder in ("helpers", "tools", "tests", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.ruff.lint]\nselect = ["F"]\nignore = ["F821"]\n')
    (tmp_path / "README.md").write_text("# Words\n\n[the notebook](notebooks/00_good.ipynb)\n")
    notebook = good()
    notebook.cells[3].source = 'REPOSITORY = ""\nREVISION = "main"\nnotebook.connect(project)'
    nbformat.write(notebook, tmp_path / "notebooks" / "00_good.ipynb")
    (tmp_path / "helpers" / "good.py").write_text('"""A module."""\n')
    return tmp_path


def run_check(root: Path) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tools" / "check.py", "--root", root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_repository_is_checked_as_a_whole(repository):
    assert run_check(repository) == (0, "Nothing is wrong.\n")
    (repository / "README.md").write_text(f"# Words\n\nThis is {MISSPELT}.\n")
    (repository / "helpers" / "good.py").write_text(f'"""It is {MISSPELT}."""\nimport os\n')
    code, said = run_check(repository)
    assert code == 1
    assert f"README.md: {MISSPELT} ==> separate" in said
    assert f"helpers/good.py:1: {MISSPELT} ==> separate" in said
    assert "F401" in said


def test_a_tool_that_fails_is_a_problem(repository):
    (repository / "pyproject.toml").write_text('[tool.ruff.lint]\nselect = ["NOSUCH"]\n')
    (repository / "README.md").write_text("# Words\n\nMEASURED\n\nTODO: more.\n")
    code, said = run_check(repository)
    assert code == 1
    assert "ruff failed" in said
    assert "README.md: a reminder: MEASURED" in said
    assert "README.md: a reminder: TODO" in said
