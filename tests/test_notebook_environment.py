"""The set-up cell: it finds the helpers or fetches them, and replaces nothing that a runtime has."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_constraints import environment, pins

from helpers.notebook import environment as set_up

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def set_up_cell(path: Path) -> str:
    [cell] = [c.source for c in nbformat.read(path, 4).cells if "notebook.connect(" in c.source]
    return cell


def test_the_set_up_cell_is_the_same_in_every_notebook_and_short():
    [cell] = {set_up_cell(path) for path in NOTEBOOKS}
    assert len(cell.splitlines()) <= 25


# What Colab has


def colab() -> dict[str, str]:
    lines = (Path(__file__).parent / "colab_packages.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line[0] != "#")
    return {canonicalize_name(name): version for name, version in pairs}


def installed_in(runtime: dict[str, str]) -> set[str]:
    """What the set-up cell would install in a runtime with these packages, round after round."""
    taken: set[str] = set()
    while True:
        has = runtime | dict.fromkeys(taken, "1")
        # What a package asks for is read from its installation here, which has the version that is pinned.
        new = set_up.to_install(taken, has.get, set_up.requirements_of, environment("3.13"))
        if not new:
            return taken
        taken |= new


def test_in_colab_only_what_is_absent_is_installed():
    runtime = colab()
    taken = installed_in(runtime)
    assert {"apache-beam", "gguf", "google-cloud-pubsub", "fastavro"} <= taken
    assert not taken & runtime.keys(), "it would replace what is there"
    assert not taken & {"torch", "numpy", "protobuf", "ipython", "ipywidgets", "pandas"}
    assert len(taken) < 25
    assert taken <= pins("3.13").keys(), "each at the version that was tested"


def test_of_what_colab_has_only_what_was_tried_is_outside_of_what_is_asked_for():
    """The notebooks were run with these three; one more may break them."""
    runtime = colab()
    taken = installed_in(runtime)
    outside = set()
    for name in taken:
        for asked in map(Requirement, set_up.requirements_of(name)):
            found = runtime.get(canonicalize_name(asked.name))
            holds = asked.marker is None or asked.marker.evaluate(environment("3.13"))
            if found and holds and not asked.specifier.contains(found, prereleases=True):
                outside.add((name, asked.name))
    assert outside == {
        ("apache-beam", "pillow"),
        ("google-cloud-build", "protobuf"),
        ("google-cloud-pubsub", "protobuf"),
    }


def test_colabs_versions_are_within_the_ranges():
    assert set_up.wrong_versions(colab().get) == {}


def test_a_version_out_of_range_is_named_with_the_range():
    wrong = set_up.wrong_versions((colab() | {"transformers": "4.57.1", "torch": "2.5.0+cu124"}).get)
    assert wrong == {"transformers": "<6,>=5", "torch": ">=2.8"}


# What stops the set-up cell


def test_an_environment_that_lacks_a_package_is_told_the_command(monkeypatch):
    monkeypatch.setattr(set_up, "NEEDED", (*set_up.NEEDED, "no-such-package"))
    with pytest.raises(SystemExit, match=r"lacks no-such-package\. Run `%pip install .*requirements\.txt"):
        set_up.prepare()


def test_a_package_of_a_wrong_version_is_told_the_command(monkeypatch):
    monkeypatch.setattr(set_up, "wrong_versions", lambda _: {"transformers": "<6,>=5"})
    with pytest.raises(SystemExit, match=r'transformers 5.* Run `%pip install --quiet "transformers<6,>=5"`'):
        set_up.prepare()


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 15, 0)])
def test_a_python_that_is_too_old_or_too_new_is_told(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"the notebooks need 3\.11 to 3\.14"):
        set_up.prepare()


def test_where_pip_finds_nothing_one_sentence_says_so(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match=r"^pip could not install no-such-package: .*\. Check the network"):
        set_up._pip("--no-deps", "no-such-package")


def test_the_environment_of_these_tests_lacks_nothing(monkeypatch, tmp_path):
    set_up.prepare()
    monkeypatch.setattr(set_up, "ROOT", tmp_path)  # installed as a package, without its repository
    set_up.prepare()


# The cell on its own

# As a Python that has no helpers installed: these tests' own has them.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    """A git repository with the helpers in it, as on GitHub; its address."""
    folder = tmp_path_factory.mktemp("published") / "repository"
    shutil.copytree(ROOT / "helpers" / "notebook", folder / "helpers" / "notebook")
    shutil.copy(ROOT / "helpers" / "__init__.py", folder / "helpers")
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--message=all"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return f"file://{folder}"


def run_alone(folder: Path, repository: str, revision: str = "main") -> subprocess.CompletedProcess:
    """Runs the set-up cell, up to where the helpers are found, in a folder with nothing else."""
    cell = set_up_cell(NOTEBOOKS[0]).partition("notebook.prepare()")[0]
    for name, value in {"REPOSITORY": repository, "REVISION": revision}.items():
        cell, count = re.subn(rf'^{name} = "[^"]*"', f"{name} = {value!r}", cell, flags=re.MULTILINE)
        assert count == 1
    code = f"{ALONE}{cell}\nprint(notebook.__file__)"
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )


def test_a_notebook_on_its_own_fetches_the_helpers_once(published, tmp_path):
    for _ in range(2):
        done = run_alone(tmp_path, published)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(tmp_path / "streaming-llm")
    assert [path.name for path in tmp_path.iterdir()] == ["streaming-llm"]
    inside = tmp_path / "streaming-llm" / "notebooks"
    inside.mkdir()
    run_alone(inside, published)
    assert list(inside.iterdir()) == [], "no clone within the clone"


def test_a_notebook_in_a_copy_of_the_repository_fetches_nothing(tmp_path):
    done = run_alone(ROOT / "notebooks", f"file://{tmp_path}/nothing")
    assert Path(done.stdout.strip()) == ROOT / "helpers" / "notebook" / "__init__.py", done.stderr


@pytest.mark.parametrize(
    ("repository", "revision", "reason"),
    [
        ("", "main", "repository '' does not exist"),
        ("PUBLISHED", "gone", "Remote branch gone not found"),
        ("file:///no/such/repository", "main", "does not appear to be a git repository"),
        ("https://127.0.0.1:9/a/b", "main", "unable to access"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_a_sentence(published, tmp_path, repository, revision, reason):
    done = run_alone(tmp_path, repository.replace("PUBLISHED", published), revision)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(f"(?s)could not be fetched: .*{reason}.* Open this notebook in a copy", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_another_package_of_that_name_is_not_in_the_way(published, tmp_path):
    (tmp_path / "helpers.py").write_text("")
    done = run_alone(tmp_path, published)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "streaming-llm")


def test_a_folder_that_cannot_be_written_to_is_told(published, tmp_path):
    (tmp_path / "streaming-llm").write_text("in the way")
    done = run_alone(tmp_path, published)
    assert "already exists" in done.stderr
    assert "Open this notebook in a copy of its repository" in done.stderr
