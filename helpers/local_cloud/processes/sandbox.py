"""A throw-away Python environment that stands in for a container made from an image.

The image is this environment's installed packages, except the project itself: what a job or a worker needs of
it must be staged and installed, as in a container on Google Cloud. Whatever is installed in a sandbox, and
whatever its processes do with pip, stays in its folder.

In it, pip works as the clients expect in a container, with three differences: it never uses the network, it
installs no dependencies (the image has them), and `--user` is accepted but installs into the sandbox.

It is a Python environment, not a container: its processes see the machine's files and the user's home folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import site
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROJECT = __name__.partition(".")[0]  # the package that a sandbox must not see

# A user's own pip configuration may name other sources. "0" turns build isolation off here: pip reads the
# value of a negative option as that of its positive counterpart.
_PIP_SETTINGS = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}

# A virtual environment's pip refuses --user, which the Vertex AI SDK's commands contain.
_ACCEPT_USER_OPTION = (
    "import sys; sys.orig_argv[1:3] == ['-m', 'pip'] and '--user' in sys.argv and sys.argv.remove('--user')"
)

_HOST_ONLY = {
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
    "PYTHONPYCACHEPREFIX",
    "__PYVENV_LAUNCHER__",
}


@dataclass(frozen=True)
class Sandbox:
    """A sandbox's folder, and the folder of the interpreter and pip that belong to it."""

    folder: Path
    programs: Path

    @property
    def python(self) -> Path:
        return self.programs / "python"

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment variables of a process in the sandbox, made from the host's."""
        kept = {k: v for k, v in environment.items() if k not in _HOST_ONLY and not k.startswith("PIP_")}
        path = kept.get("PATH", os.defpath).split(os.pathsep)
        if sys.prefix != sys.base_prefix:
            path = [p for p in path if p != sysconfig.get_path("scripts")]
        kept |= {
            "PATH": os.pathsep.join([str(self.programs), *path]),
            "VIRTUAL_ENV": str(self.folder / "python"),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # else it would write into the host's packages, which it sees
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.folder / "tmp"),
        }
        return kept | _PIP_SETTINGS

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def create(folder: Path, packages: Iterable[Path] = ()) -> Sandbox:
    """Makes a sandbox.

    Args:
      folder: where to make it; it must not exist yet, and the caller removes it.
      packages: folders of Python packages that the image has besides this environment's.
    """
    folder = folder.absolute()
    image = folder / "image"
    image.mkdir(parents=True)
    (folder / "tmp").mkdir()
    prefix = folder / "python"
    has_pip = importlib.util.find_spec("pip") is not None
    venv.create(prefix, with_pip=not has_pip, symlinks=True)

    # The image lies outside the environment's prefix, so pip uninstalls nothing from it.
    seen = []
    for number, packages_folder in enumerate(_site_folders()):
        seen.append(image / str(number))
        _link_packages(packages_folder, seen[-1])
    seen.append(image / "more")
    seen[-1].mkdir()
    for package in packages:
        (seen[-1] / package.name).symlink_to(package.absolute(), target_is_directory=True)

    scheme = {"base": str(prefix), "platbase": str(prefix)}
    own_packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    lines = [f"import site; site.addsitedir({str(path)!r})" for path in seen]
    (own_packages / "image.pth").write_text("\n".join([*lines, _ACCEPT_USER_OPTION, ""]))

    sandbox = Sandbox(folder, prefix / "bin")
    for name in ("pip", "pip3"):
        program = sandbox.programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(str(sandbox.python))} -m pip "$@"\n')
        program.chmod(0o755)
    return sandbox


def _site_folders() -> list[Path]:
    """The folders of installed packages that this interpreter uses, in the order of its path."""
    candidates = {os.path.realpath(p) for p in [*site.getsitepackages(), site.getusersitepackages()]}
    used = dict.fromkeys(os.path.realpath(p) for p in sys.path)
    return [Path(p) for p in used if p in candidates and os.path.isdir(p)]


def _link_packages(packages: Path, links: Path) -> None:
    links.mkdir()
    left_out = _entries_of_project(packages)
    for entry in packages.iterdir():
        if entry.name in left_out or entry.name == "__pycache__":
            continue
        if entry.suffix == ".pth":
            kept = [line for line in entry.read_text().splitlines() if not _leads_to_project(packages, line)]
            (links / entry.name).write_text("\n".join([*kept, ""]))
        else:
            (links / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def _entries_of_project(packages: Path) -> set[str]:
    """The names in a folder of packages that belong to the project, installed normally or as editable."""
    names = {_PROJECT}
    for distribution in importlib.metadata.distributions(path=[str(packages)]):
        record = distribution.read_text("RECORD") or ""
        provided = (distribution.read_text("top_level.txt") or "").split()
        if _PROJECT in provided or f"\n{_PROJECT}/" in "\n" + record:
            names |= {file.parts[0] for file in distribution.files or ()}
    return names


def _leads_to_project(packages: Path, line: str) -> bool:
    """Whether a line of a .pth file names a folder that holds the project, as in old editable installs."""
    line = line.strip()
    return bool(line) and not line.startswith(("#", "import")) and (packages / line / _PROJECT).is_dir()
