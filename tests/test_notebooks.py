"""The notebooks run under papermill from any folder, are committed as they ran, and fail loudly."""

import ast
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from conftest import BEFORE, wait_until
from tiny_models import save_checkpoint

from helpers import notebook
from helpers.models import DEFAULT_MODEL
from helpers.notebook import connection

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
RUN_NOTEBOOKS = REPOSITORY / "tools" / "run_notebooks.py"


def execute(name: str, folder: Path, **parameters) -> nbformat.NotebookNode:
    """Runs a notebook from another folder than its own, to an output with a name of its own."""
    [source] = [path for path in NOTEBOOKS if path.stem.startswith(name)]
    return papermill.execute_notebook(
        source,
        folder / f"my {name}.ipynb",
        parameters=parameters,
        kernel_name="python3",
        cwd=folder,
        progress_bar=False,
        execution_timeout=600,
    )


def shown(notebook: nbformat.NotebookNode, tag: str = "") -> str:
    """What the notebook's cells, or those with a tag, show as text."""
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code" and (not tag or tag in cell.metadata.get("tags", []))
        for output in cell.outputs
    ]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.fixture(scope="module", params=["llama", pytest.param("t5_distinct", marks=pytest.mark.slow)])
def tiny(request, tmp_path_factory, cloud) -> str:
    """A tiny model's folder: a causal one, and an encoder-decoder one."""
    folder = tmp_path_factory.mktemp("models") / f"tiny-{request.param.replace('_', '-')}"
    save_checkpoint(request.param, folder)
    return str(folder)


def test_01_sizes_a_model(tmp_path, cloud):
    text = shown(execute("01", tmp_path, model_name="google/flan-t5-xl", measure=[], price_per_hour=0.5))
    assert "2,849,757,184" in text
    assert "0.50 an hour" in text


def test_02_converts_in_a_vertex_ai_job(tmp_path, tiny):
    text = shown(execute("02", tmp_path, model_name=tiny))
    assert "succeeded after" in text
    assert f"run-inference/{Path(tiny).name}.pt" in text
    [here, there] = re.findall(r"^ *(?:here|on Vertex AI) .* (\S+==)$", text, re.MULTILINE)
    assert here == there, "the same bytes here and on Vertex AI"


def test_03_answers_every_prompt(tmp_path, tiny):
    # A tiny model's rates say nothing.
    answers_all(execute("03", tmp_path, model_name=tiny, batch_sizes=[1], **FEW))


def test_04_answers_every_prompt_and_can_be_run_again_with_another_model(tmp_path, tiny, packaged_checkpoint):
    answers_all(execute("04", tmp_path, model_name=tiny, **FEW))
    # It finds the topics of the first run.
    one = {"prompts": ["What is the capital of France?"], "max_response_tokens": 16}
    again = execute("04", tmp_path, model_name=DEFAULT_MODEL, **one)
    assert "Paris" in shown(again, tag="answers")


FEW = {"prompts": ["Hi", "a longer prompt than that one"], "max_response_tokens": 4}


def answers_all(notebook: nbformat.NotebookNode) -> None:
    answers = shown(notebook, tag="answers")
    assert all(prompt in answers for prompt in FEW["prompts"])
    assert "–" not in answers, "a prompt has no answer"


def test_05_predicts_measures_and_plans(tmp_path, cloud):
    checkpoint = tmp_path / "tiny"
    save_checkpoint("llama", checkpoint)
    shorter = {"rates": [5, 10], "sweep_seconds": 3, "burst_seconds": 3, "changes": [{"max_batch_size": 2}]}
    shorter |= {"target_seconds": 600}  # on a busy machine, too, something keeps up
    done = execute("05", tmp_path, model_name=str(checkpoint), max_response_tokens=4, **shorter)
    assert len(shown(done, "predicted").splitlines()) == 4, "a head, and a line for each of three rates"
    assert "gone" in shown(done, "burst")
    assert "Best within" in shown(done, "best")
    assert "num_workers" in shown(done)
    assert "The job: DRAINED" in shown(done)


def test_a_parameter_that_papermill_misreads_stops_the_notebook_before_it_does_anything(tmp_path, cloud):
    with pytest.raises(papermill.PapermillExecutionError, match="-p overwrite False") as caught:
        execute("02", tmp_path, overwrite="false")
    assert caught.value.exec_count <= 3, "the set-up cell"


def test_05_refuses_what_cannot_be_before_it_starts_a_job(tmp_path, cloud):
    with pytest.raises(papermill.PapermillExecutionError, match="changes = ") as caught:
        execute("05", tmp_path, changes=["int8"])
    assert caught.value.exec_count <= 4, "the cell that looks at the parameters"


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (partial(notebook.at_least, 1), [1, 7], [0, 1.5, True, "2", None]),
        (partial(notebook.at_least, 0.0), [0, 0.5], [-1, math.inf, math.nan, "a lot"]),
        (notebook.texts, [[], ["a"]], ["a", [""], [1], None]),
        (notebook.rising, [[1], [0.5, 2]], [[], [2, 1], [1, 1], [0, 1], [True], "12"]),
        (notebook.job_options, [[], [{"max_batch_size": 2}]], [["int8"], [{}], [{"size": 1}], {"seed": 1}]),
    ],
)
def test_parameters_that_cannot_be_are_named(check, right, wrong):
    for value in right:
        check(it=value)
    for value in wrong:
        with pytest.raises(ValueError, match="it"):
            check(it=value)


def test_a_model_that_does_not_exist_stops_the_notebook_with_what_to_do(tmp_path, cloud):
    with pytest.raises(papermill.PapermillExecutionError, match="There is no folder /no/such/model"):
        execute("03", tmp_path, model_name="/no/such/model")


def series_of_one(folder: Path, *code: str) -> None:
    """A folder with a notebook of its own, and the script that runs the notebooks."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in code],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "00_test.ipynb")
    (folder / "tools").mkdir()
    (folder / "tools" / "run_notebooks.py").write_text(RUN_NOTEBOOKS.read_text())


COMMAND = [sys.executable, "tools/run_notebooks.py", "--out", "out"]


def test_a_broken_notebook_fails_the_run_and_says_where(tmp_path):
    series_of_one(tmp_path, "a = 1", "print(a)", "a / 0", "print('after')")
    run = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert "00_test failed in cell In [3]" in run.stdout
    assert "ZeroDivisionError: division by zero" in run.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00_test.failed.ipynb"]


def test_a_kernel_that_dies_fails_the_run_without_a_traceback(tmp_path):
    series_of_one(tmp_path, "a = 1", "import os; os.kill(os.getpid(), 9)")
    run = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert "00_test failed: DeadKernelError" in run.stdout
    assert "Traceback" not in run.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00_test.failed.ipynb"]


def test_a_kernel_stays_with_the_project_or_the_machine_it_is_connected_to(monkeypatch):
    monkeypatch.setattr(connection, "_google_project", "my-project")
    with pytest.raises(notebook.ConnectionFailed, match="connected to the project 'my-project'"):
        notebook.connect("")


def test_a_bucket_whose_name_cannot_be_is_told(cloud):
    with pytest.raises(notebook.ConnectionFailed, match="is not a valid bucket name"):
        notebook.connect(bucket="_No Name_")


def test_ctrl_c_leaves_no_process_and_nothing_half_written(tmp_path):
    series_of_one(
        tmp_path,
        "import os, pathlib, time\nfrom helpers.notebook import connection\nconnection.connect()",
        "pids = f'{os.getpid()} {connection._local.pid}'\n"
        "pathlib.Path('pids.partial').write_text(pids)\nos.rename('pids.partial', 'pids')\ntime.sleep(300)",
    )
    # Without the tests' own local cloud, so that the notebook starts one.
    run = subprocess.Popen(COMMAND, cwd=tmp_path, env=BEFORE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until((tmp_path / "pids").exists, "the notebook did not come to its second cell")
        processes = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 130
    assert "Interrupted in 00_test" in said
    wait_until(lambda: not any(p.is_running() for p in processes), "a process is left")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_notebook_that_is_not_there_is_named():
    command = [sys.executable, RUN_NOTEBOOKS, "09_missing"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 2
    assert "09_missing.ipynb" in run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCommitted:
    """What `make check` does not see: it reads, and runs nothing."""

    def test_papermill_explains_its_parameters(self, path):
        parameters = papermill.inspect_notebook(path)
        assert {"project", "location", "bucket"} <= parameters.keys()
        for parameter in parameters.values():
            assert parameter["help"], parameter["name"]
            assert parameter["inferred_type_name"] != "None", parameter["name"]

    def test_no_cell_leans_on_an_import_of_the_set_up_cell(self, path):
        [set_up] = [cell for cell in code_cells(path) if "notebook.connect(" in cell]
        hidden = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(set_up))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        } - {"notebook"}
        for cell in code_cells(path):
            tree = ast.parse(cell)
            own = {
                alias.asname or alias.name
                for node in ast.walk(tree)
                for alias in getattr(node, "names", ())
                if isinstance(alias, ast.alias)
            }
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert cell == set_up or not (used & hidden) - own, cell


def code_cells(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        yield path.name, ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    for path in (REPOSITORY / "helpers").rglob("*.py"):
        yield str(path.relative_to(REPOSITORY)), ast.parse(path.read_text())


def test_no_client_of_google_or_beam_is_patched():
    """No name that comes from their packages is assigned to, by attribute or with setattr."""
    foreign = ("google", "apache_beam", "grpc", "vertexai")
    for name, tree in sources():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {
                    (a.asname or a.name).split(".")[0] for a in node.names if a.name.startswith(foreign)
                }
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(foreign):
                imported |= {alias.asname or alias.name for alias in node.names}
        # Beam's documented way to set the options of interactive runs.
        imported.discard("ib")
        for node in ast.walk(tree):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                targets = [ast.Attribute(node.args[0])]
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name):
                    assert root.id not in imported, f"{name}:{node.lineno} patches {root.id}"
