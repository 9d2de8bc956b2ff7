"""The set-up cell's work: this kernel gets what the notebooks need, and nothing that it has is replaced.

In Colab the packages that are absent are installed, each alone, without what it asks for: what it asks for is
there already, or is absent too and installed the same way. So pip never comes to replace the runtime's torch,
numpy, protobuf or IPython, which would need a restart. Anywhere else nothing is installed: what is missing is
named, with the command that mends it.
"""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ((3, 11), (3, 14))  # the first and the last one

OWN = "streaming-llm-helpers"  # this repository's own package

# What the helpers import, and what Beam imports for them: of its extras `gcp` and `interactive`, which ask
# for newer versions of IPython and ipywidgets than Colab has, these parts are enough.
NEEDED = (
    "accelerate",
    "apache-beam",
    "certifi",
    "cryptography",
    "ctranslate2",
    "facets-overview",
    "filelock",
    "gguf",
    "google-apitools",
    "google-cloud-aiplatform",
    "google-cloud-build",
    "google-cloud-dataflow-client",
    "google-cloud-monitoring",
    "google-cloud-pubsub",
    "google-cloud-resource-manager",
    "google-cloud-storage",
    "google-crc32c",
    "ipython",
    "ipywidgets",
    "jinja2",
    "matplotlib",
    "pandas",
    "psutil",
    "safetensors",
    "scipy",
    "timeloop",
    "torch",
    "tqdm",
    "transformers",
)


def prepare() -> None:
    """Makes the helpers importable in this kernel, and in Colab installs the packages that are absent.

    Raises:
        SystemExit: this Python, a package's version or a missing package stands in the way; its message says
            what to do.
    """
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise SystemExit(
            f"This kernel's Python is {sys.version.split()[0]}, and the notebooks need 3.11 to 3.14: "
            "apache-beam supports no later one yet. Choose another kernel."
        )
    absent = to_install((), version, requirements_of) | ({OWN} if version(OWN) is None else set())
    if absent and "google.colab" in sys.modules:
        _install(absent)
    elif absent:
        install = f'%pip install --quiet --requirement "{ROOT / "requirements.txt"}" --editable "{ROOT}"'
        raise SystemExit(
            f"This kernel's environment lacks {', '.join(sorted(absent))}. Run `{install}` in a cell, "
            "restart the kernel, and run the notebook from the top."
        )
    if wrong := wrong_versions(version):
        found = ", ".join(f"{name} {version(name)}" for name in wrong)
        needed = " ".join(f'"{name}{versions}"' for name, versions in wrong.items())
        raise SystemExit(
            f"This kernel's environment has {found}, which the notebooks can't use. Run `%pip install "
            f"--quiet {needed}` in a cell, restart the kernel, and run the notebook from the top."
        )


def version(name: str) -> str | None:
    """The version of a package that this kernel can import; None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements_of(name: str) -> list[str]:
    """What an installed package asks for, as its metadata say."""
    return importlib.metadata.requires(name) or []


def to_install(
    taken: Iterable[str],
    version: Callable[[str], str | None],
    requirements_of: Callable[[str], list[str]],
    environment: dict[str, str] | None = None,
) -> set[str]:
    """The packages to install next: those that are needed, or that one installed here asks for, and absent.

    Args:
        taken: the packages that were installed here so far.
        version: the version of a package, or None.
        requirements_of: what an installed package asks for.
        environment: the values of markers that differ from this Python's, as `{"python_version": "3.13"}`.
    """
    from packaging.requirements import Requirement

    waiting = [Requirement(name) for name in NEEDED]
    waiting += [Requirement(text) for name in taken for text in requirements_of(name)]
    absent: set[str] = set()
    seen = set()
    while waiting:
        asked = waiting.pop()
        if asked.marker and not asked.marker.evaluate((environment or {}) | {"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", asked.name).lower()
        if version(name) is None:
            absent.add(name)
            continue
        for extra in asked.extras - {one for other, one in seen if other == name}:
            seen.add((name, extra))
            for text in requirements_of(name):
                more = Requirement(text)
                of_extra = more.marker and "extra" in str(more.marker)
                if of_extra and more.marker.evaluate((environment or {}) | {"extra": extra}):
                    more.marker = None
                    waiting.append(more)
    return absent


def _install(absent: set[str]) -> None:
    """Installs packages, and what they ask for and is absent."""
    started, taken, size = time.monotonic(), set(), 0
    while names := sorted(absent - {OWN, *taken}):
        print(f"Installing what this runtime lacks: {', '.join(names)} ...", flush=True)
        _pip("--no-deps", "--constraint", str(ROOT / "constraints.txt"), *names)
        taken |= set(names)
        size += sum(_bytes(name) for name in names)
        absent = to_install(taken, version, requirements_of)
    if version(OWN) is None:  # Dataflow's workers get it as a package
        _pip("--no-deps", "--editable", str(ROOT))
    seconds = time.monotonic() - started
    print(f"{len(taken)} packages, {size / 1e6:.0f} MB, in {seconds:.0f} s. What was there is unchanged.")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise SystemExit(
            f"pip could not install {arguments[-1]}: {reason.removeprefix('ERROR: ')}. Check the network and "
            "the disk's free space, and run this cell again."
        )


def _bytes(name: str) -> int:
    """What an installed package takes on the disk."""
    files = importlib.metadata.files(name) or []
    return sum(path.stat().st_size for file in files if (path := Path(file.locate())).is_file())


def wrong_versions(version: Callable[[str], str | None]) -> dict[str, str]:
    """The needed packages whose version is outside the range of requirements.txt, and that range.

    Args:
        version: the version of a package, or None.
    """
    from packaging.requirements import Requirement

    if not (ROOT / "requirements.txt").is_file():  # installed as a package: pip has seen to its versions
        return {}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wrong = {}
    for asked in map(Requirement, filter(None, lines)):
        found = version(asked.name) if asked.name in NEEDED else None
        if found and not asked.specifier.contains(found, prereleases=True):
            wrong[asked.name] = str(asked.specifier)
    return wrong
