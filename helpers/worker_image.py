"""The image of the Dataflow workers, built with Cloud Build; no Docker is needed here.

    python -m helpers.worker_image build --project P --region R --bucket B --torch-index-url INDEX
    python -m helpers.worker_image build --project P --region R --bucket B --variant gpu
    python -m helpers.worker_image requirements pyproject.toml constraints.txt

A job runs without an image, too: Beam's container then installs torch, transformers and the rest from the
network each time that a worker starts, and so whenever Dataflow adds one. What that takes has not been
measured for this project; it is a download of a few hundred MB, with CUDA of several GB, before the first
answer, and it needs workers that reach the package index. With the image, nothing is left to install but the
helpers themselves, which a job sends along.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import re
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from google.api_core.exceptions import Forbidden, GoogleAPICallError, MethodNotImplemented, NotFound
from google.auth.exceptions import GoogleAuthError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.files import storage

WORKER = Path(__file__).with_name("worker")
FILES = ("Dockerfile", "requirements.txt")
VARIANTS = ("cpu", "gpu")
REPOSITORY = "streaming-llm"
BUILDER = "gcr.io/cloud-builders/docker"
DISK_GB = 100

# Beam's image has it, and its documentation asks not to install it over that.
LEFT_OUT = {"apache-beam"}
WORKER_PLATFORM = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


class ImageError(RuntimeError):
    """The image cannot be built; the message says what to do."""


def build_image(
    *,
    project: str,
    location: str,
    bucket: str,
    variant: str = "cpu",
    torch_index_url: str = "",
    repository: str = REPOSITORY,
    timeout_minutes: int = 60,
) -> str:
    """Builds the workers' image with Cloud Build, and waits for it.

    Args:
        project: the id of the Google Cloud project.
        location: the region of the Artifact Registry repository; best the job's.
        bucket: a bucket's name, for the files that the build needs; they are removed afterwards.
        variant: ``cpu`` or ``gpu``.
        torch_index_url: for ``cpu``: the package index of torch without CUDA, which PyTorch's installation
            page (pytorch.org/get-started) names for Linux, pip, CPU.
        repository: the name of the Artifact Registry repository, of Docker's format.
        timeout_minutes: after which Cloud Build gives up.

    Returns:
        The image, for ``--sdk_container_image``; its tag is made of what it was built from.

    Raises:
        ImageError: the arguments make no image, or Cloud Build cannot build it.
    """
    if variant not in VARIANTS:
        raise ImageError(f"Unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    if variant == "cpu" and not torch_index_url:
        raise ImageError(
            "The CPU image needs torch_index_url, the package index of torch without CUDA: PyTorch's "
            "installation page (pytorch.org/get-started) names it for Linux, pip, CPU."
        )
    arguments = {"VARIANT": variant, "TORCH_INDEX_URL": torch_index_url}
    archive = source_archive()
    tag = hashlib.sha256(archive + repr(arguments).encode()).hexdigest()[:12]
    image = f"{location}-docker.pkg.dev/{project}/{repository}/worker-{variant}:{tag}"
    source = f"worker_image/{tag}.tar.gz"
    try:
        _upload(archive, f"gs://{bucket}/{source}")
        _run_build(project, bucket, source, image, arguments, timeout_minutes)
    except MethodNotImplemented as error:
        raise ImageError(
            "Cloud Build is not imitated by the local cloud, which knows no images either. Submit the job "
            "without one: its workers find the packages of this environment."
        ) from error
    except (Forbidden, NotFound) as error:
        raise ImageError(
            f"Cloud Build did not take the build ({error.message}): run\n"
            f"  gcloud services enable cloudbuild.googleapis.com artifactregistry.googleapis.com "
            f"--project={project}\n"
            f"  gcloud artifacts repositories create {repository} --repository-format=docker "
            f"--location={location} --project={project}"
        ) from error
    except GoogleAuthError as error:
        raise ImageError(f"No credentials: run `gcloud auth application-default login`. ({error})") from error
    except GoogleAPICallError as error:
        raise ImageError(
            f"The build failed ({error.message}): its log is at "
            f"https://console.cloud.google.com/cloud-build/builds?project={project}. If it says that the "
            f"repository is not there: gcloud artifacts repositories create {repository} "
            f"--repository-format=docker --location={location} --project={project}"
        ) from error
    finally:
        storage.delete(f"gs://{bucket}/{source}")
    return image


def build_request(
    bucket: str, source: str, image: str, arguments: Mapping[str, str], timeout_minutes: int = 60
) -> dict:
    """The build as Cloud Build takes it: one step of Docker, with the archive unpacked around it.

    Args:
        bucket: the bucket's name.
        source: the archive's name in it.
        image: to build and push.
        arguments: of the Dockerfile.
        timeout_minutes: after which Cloud Build gives up.
    """
    build_arguments = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    return {
        "source": {"storage_source": {"bucket": bucket, "object_": source}},
        "steps": [{"name": BUILDER, "args": ["build", *build_arguments, f"--tag={image}", "."]}],
        "images": [image],
        "timeout": {"seconds": timeout_minutes * 60},
        "options": {"disk_size_gb": DISK_GB},
        "tags": ["streaming-llm"],
    }


def source_archive() -> bytes:
    """The Dockerfile and the requirements, as .tar.gz; the same files give the same bytes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name in FILES:
            data = (WORKER / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), mtime=0)


def requirements(dependencies: Iterable[str], constraints: str) -> str:
    """The text of the workers' requirements.txt: what the helpers need, and what that needs, pinned.

    CUDA's packages are not in it, whichever torch is installed here: the torch of the GPU variant names the
    exact versions of its own.

    Args:
        dependencies: of the helpers, as pyproject.toml has them.
        constraints: the text of constraints.txt, whose versions are taken.

    Raises:
        ImageError: the constraints lack a package that the helpers need.
    """
    pins = dict(_pins(constraints))
    waiting = [Requirement(text) for text in dependencies]
    if missing := [one.name for one in waiting if canonicalize_name(one.name) not in pins]:
        raise ImageError(f"constraints.txt has no {', '.join(missing)}: make it anew first.")
    needed: dict[str, set[str]] = {}  # the extras of each
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        # A package that is not pinned is of another torch, or another system, than what is tested.
        if name in LEFT_OUT or name not in pins or needed.get(name, set()) >= requirement.extras | {""}:
            continue
        extras = needed[name] = needed.get(name, set()) | requirement.extras | {""}
        own = map(Requirement, importlib.metadata.requires(name) or ())
        waiting += [one for one in own if _is_for_workers(one, extras)]
    lines = [
        "# What the workers' image has beside Apache Beam. To make it anew:",
        "# python -m helpers.worker_image requirements pyproject.toml constraints.txt > THIS_FILE",
        *(f"{name}=={pins[name]}" for name in sorted(needed)),
    ]
    return "\n".join(lines) + "\n"


def _pins(constraints: str) -> Iterator[tuple[str, str]]:
    for line in constraints.splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)(?:\s.*)?", line.strip()):
            yield canonicalize_name(match[1]), match[2]


def _is_for_workers(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate(WORKER_PLATFORM | {"extra": one}) for one in extras)


def _upload(data: bytes, path: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        storage.upload(file.name, path, overwrite=True)


def _run_build(
    project: str, bucket: str, source: str, image: str, arguments: Mapping[str, str], minutes: int
) -> None:
    from google.cloud.devtools import cloudbuild_v1

    build = cloudbuild_v1.Build(build_request(bucket, source, image, arguments, minutes))
    operation = cloudbuild_v1.CloudBuildClient().create_build(project_id=project, build=build)
    print(f"Building {image}\nIts log: {operation.metadata.build.log_url}", file=sys.stderr)
    operation.result(timeout=minutes * 60 + 600)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints the image, or the requirements; 2 and a line on stderr for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.worker_image", description="The image of the Dataflow workers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build it with Cloud Build")
    build.add_argument("--project", required=True)
    build.add_argument("--region", required=True, dest="location")
    build.add_argument("--bucket", required=True)
    build.add_argument("--variant", choices=VARIANTS, default="cpu")
    build.add_argument("--torch-index-url", default="", help="of torch without CUDA, for the CPU variant")
    build.add_argument("--repository", default=REPOSITORY)
    pinned = commands.add_parser("requirements", help="make its requirements from constraints.txt")
    pinned.add_argument("pyproject", type=Path)
    pinned.add_argument("constraints", type=Path)
    arguments = vars(parser.parse_args(argv))
    try:
        if arguments.pop("command") == "build":
            print(build_image(**arguments))
        else:
            dependencies = tomllib.loads(arguments["pyproject"].read_text())["project"]["dependencies"]
            print(requirements(dependencies, arguments["constraints"].read_text()), end="")
    except (ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
