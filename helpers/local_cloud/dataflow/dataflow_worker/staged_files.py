"""What the job's submitter staged: fetched from Cloud Storage and installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from apache_beam.internal import pickler
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.portability.api import beam_runner_api_pb2
from packaging.requirements import Requirement

from .service import Service

# The names under which Beam's clients stage files (apache_beam.runners.portability.stager).
REQUIREMENTS = "requirements.txt"
EXTRA_PACKAGES = "extra_packages.txt"
WORKFLOW = "workflow.tar.gz"
MAIN_SESSION = "pickled_main_session"


def fetch(pipeline: Any, folder: Path) -> None:
    """Copies the artifacts of a pipeline's environments into a folder that does not exist yet."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for environment in pipeline.components.environments.values():
        for artifact in environment.dependencies:
            url = beam_runner_api_pb2.ArtifactUrlPayload.FromString(artifact.type_payload).url
            role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(artifact.role_payload)
            # "Uncompressed" means as it is; otherwise Beam would unpack a .tar.gz.
            with (
                FileSystems.open(url, compression_type=CompressionTypes.UNCOMPRESSED) as source,
                (partial / _plain(role.staged_name or Path(url).name)).open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy, 1 << 20)
    partial.rename(folder)


def install(folder: Path, service: Service) -> None:
    """Installs the packages among the fetched files into the sandbox."""
    packages = []
    if (folder / EXTRA_PACKAGES).exists():
        packages += (folder / EXTRA_PACKAGES).read_text().split()
    if (folder / WORKFLOW).exists():
        packages.append(WORKFLOW)
    for package in packages:
        # As in Beam's images: what was staged takes the place of the same version that may be there already;
        # then comes what it needs and is not there.
        for how in (["--force-reinstall", "--no-deps"], []):
            command = [sys.executable, "-m", "pip", "install", "--quiet", *how, str(folder / _plain(package))]
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout, done.stderr, file=sys.stderr, flush=True)
            if done.returncode:
                raise RuntimeError(f"The staged package {package} could not be installed:\n{done.stderr}")
    if (folder / REQUIREMENTS).exists() and (others := _others((folder / REQUIREMENTS).read_text())):
        service.message(
            "WARNING",
            "The requirements file is not installed here, where the worker has the packages of the "
            f"environment in which the local cloud was started. Others here: {', '.join(others)}.",
        )
    importlib.invalidate_caches()


def _others(requirements: str) -> list[str]:
    """The requirements that this environment's packages do not meet."""
    found = []
    for line in requirements.splitlines():
        text = line.partition("#")[0].strip()
        if not text or text.startswith("-"):
            continue
        wanted = Requirement(text)
        try:
            is_met = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            is_met = False
        if not is_met and (wanted.marker is None or wanted.marker.evaluate()):
            found.append(text)
    return found


def load_main_session(folder: Path) -> None:
    """Restores the submitting program's `__main__`, if it was staged."""
    if (folder / MAIN_SESSION).exists():
        pickler.load_session(str(folder / MAIN_SESSION))


def _plain(name: str) -> str:
    """The name, if it is a file's in a folder: a submitter's files go nowhere else."""
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or not name.isprintable():
        raise RuntimeError(f"{name!r} is not the name of a staged file.")
    return name
