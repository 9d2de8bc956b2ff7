"""The workflows name what is there: targets, tools, commands and versions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_constraints import PYTHONS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def scripts() -> list[tuple[str, str]]:
    """Each shell script of a workflow, of the Cloud Build file and of the dev container, with its place."""
    found = []
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            found += [(path.name, step["run"]) for step in job["steps"] if "run" in step]
    for step in yaml.safe_load((ROOT / "cloudbuild.yaml").read_text())["steps"]:
        found.append(("cloudbuild.yaml", step["args"][-1].replace("$$", "$")))
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    return [*found, ("devcontainer.json", container["postCreateCommand"])]


@pytest.mark.parametrize(("place", "script"), scripts())
def test_a_script_is_valid_and_names_what_is_there(place, script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"\bmake ([a-z-]+)", script)) <= TARGETS
    for path in re.findall(r"\btools/\w+\.py", script):
        assert (ROOT / path).is_file()


def test_all_scripts_are_looked_at():
    assert {place for place, _ in scripts()} >= {path.name for path in WORKFLOWS}
    assert len(scripts()) > 9


def test_the_tests_run_on_the_pythons_that_are_promised():
    assert workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["python"] == list(PYTHONS)
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text()


def test_the_nightly_run_is_skipped_until_it_is_configured_and_cleans_up_always():
    job = workflow("nightly")["jobs"]["notebooks"]
    assert job["if"] == "vars.GCP_PROJECT != ''"
    run, keep, reap = job["steps"][-3:]
    assert "if" not in run
    assert keep["if"] == reap["if"] == "always()"
    assert "helpers.dataflow reap" in reap["run"]
    assert workflow("nightly")["permissions"]["id-token"] == "write"


@pytest.mark.parametrize("place", [".github/workflows/nightly.yml", "cloudbuild.yaml"])
def test_the_commands_take_the_arguments_that_they_are_given(place):
    text = (ROOT / place).read_text()
    helps = {
        "tools/run_notebooks.py": [sys.executable, "tools/run_notebooks.py", "--help"],
        "helpers.dataflow reap": [sys.executable, "-m", "helpers.dataflow", "reap", "--help"],
    }
    for command, show_help in helps.items():
        said = subprocess.run(show_help, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        [given] = re.findall(re.escape(command) + r"((?:.*\\\n)*[^|\n]*)", text)
        options = re.findall(r"(?<= )--?[a-z]+", given)
        assert options
        for option in options:
            assert option in said, f"{command} has no {option}"


def test_the_badges_workflow_needs_nothing_but_nbformat(tmp_path):
    code = "import sys; sys.path.insert(0, 'tools'); import badges; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "apache_beam", "helpers", "pandas"} & set(said.stdout.split())
