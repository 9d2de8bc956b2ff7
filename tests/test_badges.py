"""Badges follow from the repository's address and the notebook's path, and from nothing else."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A git repository with what has badges, and no remote."""
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    badges.write(root, "", "main")  # where this repository is published, it has badges
    return root


def make_badges(root: Path, *arguments: str) -> str:
    said = io.StringIO()
    command = ["badges.py", "--root", str(root), *arguments]
    with patch.object(sys, "argv", command), contextlib.redirect_stdout(said):
        assert badges.main() == 0
    return said.getvalue()


def remote(root: Path, address: str) -> None:
    subprocess.run(["git", "-C", root, "remote", "add", "origin", address], check=True)


def first_cell(root: Path, name: str = "03_try_it_interactively.ipynb") -> str:
    return nbformat.read(root / "notebooks" / name, 4).cells[0].source


def contents(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in badges.documents(root)}


def test_what_is_committed_holds_no_wrong_badge():
    assert badges.problems(ROOT) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/someone/streaming.git",
        "git@github.com:someone/streaming.git",
        "ssh://git@github.com/someone/streaming",
        "ssh://git@ssh.github.com:443/someone/streaming.git",
        "ssh://git@github.com:22/someone/streaming",
        "git@github.com-work:someone/streaming.git",
        "https://a-user:a-token@github.com/someone/streaming",
    ],
)
def test_a_clone_with_a_remote_gets_the_remotes_badges(clone, address):
    remote(clone, address)
    assert "from the git remote" in make_badges(clone)
    text = first_cell(clone)
    at = "someone/streaming/blob/main/notebooks/03_try_it_interactively.ipynb"
    assert f"(https://colab.research.google.com/github/{at})" in text
    assert f"(https://github.com/{at})" in text
    raw = "raw.githubusercontent.com/someone/streaming/main/notebooks/03_try_it_interactively.ipynb"
    assert f"download_url=https://{raw})" in text
    assert f"colab/import/https:%2F%2F{raw.replace('/', '%2F')})" in text
    assert "cloudshell/open?git_repo=https://github.com/someone/streaming&" in contents(clone)["README.md"]
    assert 'REPOSITORY = "https://github.com/someone/streaming"\n' in set_up_address(clone)
    assert "a-token" not in "".join(contents(clone).values())
    assert badges.problems(clone) == []
    assert "Changed: nothing" in make_badges(clone)


def test_a_forks_workflow_makes_its_badges(clone, monkeypatch):
    make_badges(clone, "--repository", "someone/streaming")
    monkeypatch.setenv("GITHUB_REPOSITORY", "another/fork")
    assert "from GITHUB_REPOSITORY" in make_badges(clone)
    assert "someone" not in "".join(contents(clone).values())
    assert "colab.research.google.com/github/another/fork/blob/main/" in first_cell(clone)


def test_the_setting_comes_first_and_the_argument_before_it(clone, monkeypatch):
    monkeypatch.setenv("GITHUB_REPOSITORY", "another/fork")
    project = clone / "pyproject.toml"
    project.write_text(project.read_text().replace('repository = ""', 'repository = "the/setting"'))
    make_badges(clone)
    assert "github/the/setting/" in first_cell(clone)
    make_badges(clone, "--repository", "the/argument", "--branch", "v1.2")
    assert "github/the/argument/blob/v1.2/" in first_cell(clone)


def test_without_an_address_there_are_no_badges(clone):
    before = contents(clone)
    make_badges(clone, "--repository", "someone/streaming")
    assert contents(clone) != before
    assert "No address is known" in make_badges(clone)
    assert contents(clone) == before


@pytest.mark.parametrize("path", ["/srv/git/streaming.git", "../up", "file:///srv/git/streaming", "C:/git/x"])
def test_a_clone_of_a_folder_is_published_nowhere_unless_it_is_said(clone, path):
    remote(clone, path)
    assert "No address is known" in make_badges(clone)
    assert 'REPOSITORY = ""' in set_up_address(clone)
    make_badges(clone, "--repository", "file:///srv/git/streaming")
    assert 'REPOSITORY = "file:///srv/git/streaming"' in set_up_address(clone)


def test_what_is_published_passes_the_checks(clone):
    make_badges(clone, "--repository", "some-organisation-with-a-name/streaming-llm-inference-notebooks")
    ruff = [sys.executable, "-m", "ruff"]
    # Without the helpers beside them, ruff sorts imports otherwise.
    for command in (["check", "--ignore=I001"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, clone / "notebooks"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_another_host_gets_the_set_up_cells_address_alone(clone):
    remote(clone, "https://git.example.com/group/streaming.git")
    assert "not on GitHub" in make_badges(clone)
    assert "](" not in first_cell(clone).partition("<!-- /badges")[0]
    assert 'REPOSITORY = "https://git.example.com/group/streaming"' in set_up_address(clone)
    assert badges.problems(clone) == []


def set_up_address(root: Path) -> str:
    cells = nbformat.read(root / "notebooks" / "01_size_the_model.ipynb", 4).cells
    [source] = [cell.source for cell in cells if "REPOSITORY =" in cell.source]
    return source


def test_an_address_that_is_none_is_refused(clone):
    command = [sys.executable, ROOT / "tools" / "badges.py", "--root", clone, "--repository", "not one"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'not one' is not a repository's address" in done.stderr


def test_only_the_badges_and_the_address_change(clone):
    before = nbformat.read(clone / "notebooks" / "04_deploy_the_stream.ipynb", 4)
    make_badges(clone, "--repository", "someone/streaming")
    after = nbformat.read(clone / "notebooks" / "04_deploy_the_stream.ipynb", 4)
    changed = [old for old, new in zip(before.cells, after.cells, strict=True) if old != new]
    assert len(changed) == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("README.md", "/blob/main/notebooks/01_", "/blob/main/notebooks/02_", "do not lead to"),
        ("README.md", "github/someone/streaming", "github/someone/else", "do not lead to"),
        ("README.md", "# Streaming", "https://colab.research.google.com/github/x\n# Streaming", "outside"),
        ("01_size_the_model.ipynb", "badges notebooks/01_size", "badges notebooks/02_size", "not there"),
        ("01_size_the_model.ipynb", 'REVISION = \\"main', 'REVISION = \\"dev', "more than one address"),
    ],
)
def test_a_wrong_badge_is_found(clone, name, old, new, problem):
    make_badges(clone, "--repository", "someone/streaming")
    [path] = [path for path in badges.documents(clone) if path.name == name]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert any(problem in found for found in badges.problems(clone))
