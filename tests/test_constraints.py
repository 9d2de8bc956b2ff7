"""constraints.txt holds together on every Python that the project supports, by the packages' own metadata."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BEFORE
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def pins(python: str, text: str | None = None) -> dict[str, str]:
    """The version of each package that the constraints name for a Python."""
    found = {}
    for line in (text or (ROOT / "constraints.txt").read_text()).splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment(python)):
                assert canonicalize_name(pin.name) not in found, f"two pins of {pin.name} on Python {python}"
                (found[canonicalize_name(pin.name)],) = (one.version for one in pin.specifier)
    return found


def conflicts(python: str, pinned: dict[str, str]) -> list[str]:
    """What the packages that requirements.txt leads to ask for, and do not get, on a Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    waiting = [("requirements.txt", Requirement(line)) for line in lines if line]
    seen, found = set(), []
    while waiting:
        asker, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in pinned:
            continue  # of another system, or of a torch with CUDA
        if pinned[name] not in requirement.specifier:
            found.append(f"{asker} asks for {requirement}, pinned is {pinned[name]}")
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                try:
                    metadata = importlib.metadata.metadata(name)
                except importlib.metadata.PackageNotFoundError:
                    continue
                if f"{python}.0" not in SpecifierSet(metadata.get("Requires-Python") or ""):
                    found.append(f"{name} {pinned[name]} does not support Python {python}")
                for text in importlib.metadata.requires(name) or ():
                    one = Requirement(text)
                    if one.marker is None or one.marker.evaluate(environment(python) | {"extra": extra}):
                        waiting.append((f"{name} {pinned[name]}", one))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_hold_together(python):
    assert conflicts(python, pins(python)) == []


def test_the_pin_that_kept_python_3_13_out_is_found():
    pinned = pins("3.13") | {"google-apitools": "0.5.31"}
    (conflict,) = conflicts("3.13", pinned)
    assert re.search(r"apache-beam .* asks for google-apitools.*0\.5\.35", conflict)
    assert conflicts("3.12", pins("3.12")) == []


def resolve(python: str, constraints: Path) -> subprocess.CompletedProcess:
    """Resolves all that `make` installs from the package index, for a Python that need not be here."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--constraint", constraints, ROOT / "requirements.txt"]
    # Not by way of the tests' local cloud, which refuses every host.
    return subprocess.run(command, env=BEFORE, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_package_index_has_what_the_constraints_name(python):
    done = resolve(python, ROOT / "constraints.txt")
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    pinned = pins(python)
    assert {name: pinned.get(name) for name in ("apache-beam", "torch", "transformers")} == {
        name: resolved[name] for name in ("apache-beam", "torch", "transformers")
    }
    assert resolved["google-apitools"] == pinned["google-apitools"]


def test_the_pin_that_kept_python_3_13_out_does_not_resolve(tmp_path):
    wrong = tmp_path / "constraints.txt"
    wrong.write_text((ROOT / "constraints.txt").read_text().replace("0.5.35", "0.5.31"))
    done = resolve("3.13", wrong)
    assert done.returncode != 0
    assert "google-apitools" in done.stderr


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ((3, 10, 9), "Python 3.11 to 3.14 is needed; found 3.10.9"),
        ((3, 15, 0), "found 3.15.0"),
        ((3, 14, 2), ""),
    ],
)
def test_a_python_that_is_too_old_or_too_new_is_refused_at_the_start(version, reason):
    (check,) = re.findall(r"@\$\(PYTHON\) -c '(.*)'$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    program = (
        f"import sys; sys.version_info = {version}; sys.version = '{'.'.join(map(str, version))} x'\n" + check
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode == 0) == (not reason)
    assert reason in done.stderr
