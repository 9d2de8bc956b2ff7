"""Builds the Dataflow workers' image with Cloud Build; Docker is not needed here.

    python -m helpers.dataflow image build --project P --region R --bucket B --torch-index-url INDEX
    python -m helpers.dataflow image build --project P --region R --bucket B --variant gpu
    python -m helpers.dataflow image requirements pyproject.toml constraints.txt

A job also runs without an image: Beam's container then installs torch, transformers and the rest from the
network each time a worker starts, and so whenever Dataflow adds one. How long that takes has not been
measured for this project. It downloads a few hundred MB (several GB with CUDA) before the first answer, and
the workers must be able to reach the package index. With the image, only the helpers themselves are left to
install, which a job sends along.
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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from google.api_core.exceptions import Forbidden, GoogleAPICallError, MethodNotImplemented, NotFound
from google.auth.exceptions import GoogleAuthError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.files import access, storage
from helpers.load_state_dict.engine_file.description import ENGINE

WORKER = Path(__file__).with_name("worker")
FILES = ("Dockerfile", "requirements.txt")
VARIANTS = ("cpu", "gpu")
REPOSITORY = "streaming-llm"
BUILDER = "gcr.io/cloud-builders/docker"
DISK_GB = 100

# The image has Beam, and all that it needs, in the versions that Beam was tested with: a pin over one of them
# may contradict another.
BEAM = "apache-beam[gcp]"
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
        location: the region of the Artifact Registry repository; ideally the job's.
        bucket: a bucket's name, for the files that the build needs; they are removed afterwards.
        variant: `cpu` or `gpu`.
        torch_index_url: for `cpu`: the package index of torch without CUDA, which PyTorch's installation
            page (pytorch.org/get-started) names for Linux, pip, CPU.
        repository: the name of the Artifact Registry repository, in Docker format.
        timeout_minutes: minutes after which Cloud Build gives up.

    Returns:
        The image's name, for `--sdk_container_image`. It has the Python version of whoever builds it, as jobs
        need it that are submitted from there; its tag names that version, and holds a hash of what the image
        was built from.

    Raises:
        ImageError: the arguments are invalid, or Cloud Build cannot build the image.
    """
    if variant not in VARIANTS:
        raise ImageError(f"Unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    if variant == "cpu" and not torch_index_url:
        raise ImageError(
            "The CPU image needs torch_index_url, the package index of torch without CUDA: PyTorch's "
            "installation page (pytorch.org/get-started) names it for Linux, pip, CPU."
        )
    arguments = {"PYTHON_VERSION": python_here(), "VARIANT": variant, "TORCH_INDEX_URL": torch_index_url}
    archive = source_archive()
    content = hashlib.sha256(archive + repr(arguments).encode()).hexdigest()[:12]
    tag = f"py{python_here().replace('.', '')}-{content}"
    image = f"{location}-docker.pkg.dev/{project}/{repository}/worker-{variant}:{tag}"
    source = f"worker_image/{tag}.tar.gz"
    try:
        _upload(archive, f"gs://{bucket}/{source}")
        _run_build(project, bucket, source, image, arguments, timeout_minutes)
    except MethodNotImplemented as error:
        raise ImageError(
            "The local cloud imitates neither Cloud Build nor images. Submit the job "
            "without one: its workers use the packages of this environment."
        ) from error
    except (Forbidden, NotFound) as error:
        raise ImageError(
            f"Cloud Build rejected the build ({error.message}): run\n"
            f"  {access.enable_command(project, access.apis('image'))}\n"
            + "".join(
                f"  {access.grant_command(project, f'roles/{need.role}', _member(need.who))}"
                f"    # {need.who}\n"
                for need in access.TABLE
                if need.feature == "image"
            )
            + f"  gcloud artifacts repositories create {repository} --repository-format=docker "
            f"--location={location} --project={project}"
        ) from error
    except GoogleAuthError as error:
        raise ImageError(f"No credentials: {access.log_in()}. ({error})") from error
    except GoogleAPICallError as error:
        raise ImageError(
            f"The build failed ({error.message}): its log is at "
            f"https://console.cloud.google.com/cloud-build/builds?project={project}. If it says that the "
            f"repository does not exist: gcloud artifacts repositories create {repository} "
            f"--repository-format=docker --location={location} --project={project}"
        ) from error
    finally:
        storage.delete(f"gs://{bucket}/{source}")
    return image


def _member(who: str) -> str:
    return "user:YOU" if who == access.YOU else "serviceAccount:ACCOUNT"


def python_here() -> str:
    """The Python version, such as "3.11", that the workers of a job must have which is submitted from here:
    Beam refuses to run a pipeline that another version has built."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def python_of(image: str) -> str | None:
    """The Python version of an image that `build_image` or Beam has named; None if its name does not tell."""
    if match := re.search(r"(?::py|beam_python)(3)\.?(\d+)(?:-|_sdk)", image):
        return f"{match[1]}.{match[2]}"
    return None


def build_request(
    bucket: str, source: str, image: str, arguments: Mapping[str, str], timeout_minutes: int = 60
) -> dict:
    """The request for Cloud Build: a single Docker step, run in the unpacked archive.

    Args:
        bucket: the bucket's name.
        source: the archive's name in it.
        image: the image to build and push.
        arguments: the Dockerfile's build arguments.
        timeout_minutes: minutes after which Cloud Build gives up.
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
    """The text of the workers' requirements.txt: the helpers' dependencies, and theirs in turn, pinned.

    Left out are those that Beam's image has already, and CUDA's packages, whichever torch is installed here:
    the GPU variant's torch names the exact versions that it needs.

    Args:
        dependencies: the helpers' dependencies, as in pyproject.toml.
        constraints: the text of constraints.txt, whose versions are used.

    Raises:
        ImageError: the constraints lack a package that the helpers need.
    """
    pins = dict(_pins(constraints))
    wanted = [Requirement(text) for text in dependencies]
    if missing := [one.name for one in wanted if canonicalize_name(one.name) not in pins]:
        raise ImageError(f"constraints.txt has no {', '.join(missing)}: regenerate it first.")
    needed = closure(wanted, pins) - closure([Requirement(BEAM)], pins)
    lines = [
        "# What the workers' image has besides Apache Beam. To regenerate it:",
        "# python -m helpers.dataflow image requirements pyproject.toml constraints.txt > THIS_FILE",
        *(f"{name}=={pins[name]}" for name in sorted(needed)),
    ]
    return "\n".join(lines) + "\n"


def closure(wanted: Iterable[Requirement], pins: Container[str]) -> set[str]:
    """The names of packages and of all that they need in turn, on a worker.

    Args:
        wanted: the packages.
        pins: the names that count: a package that is not pinned belongs to another torch or system than the
            tested ones.
    """
    waiting, needed = list(wanted), dict[str, set[str]]()  # the extras of each
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins or needed.get(name, set()) >= requirement.extras | {""}:
            continue
        extras = needed[name] = needed.get(name, set()) | requirement.extras | {""}
        own = map(Requirement, importlib.metadata.requires(name) or ())
        waiting += [one for one in own if _is_for_workers(one, extras)]
    return set(needed)


def _pins(constraints: str) -> Iterator[tuple[str, str]]:
    for line in constraints.splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate(WORKER_PLATFORM):
            (version,) = (one.version for one in pin.specifier)
            yield canonicalize_name(pin.name), version


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
    """The command line: prints the image or the requirements.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.dataflow image", description="The image of the Dataflow workers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build it with Cloud Build")
    build.add_argument("--project", required=True)
    build.add_argument("--region", required=True, dest="location")
    build.add_argument("--bucket", required=True)
    build.add_argument("--variant", choices=VARIANTS, default="cpu")
    build.add_argument(
        "--torch-index-url", default="", help="index of torch without CUDA, for the CPU variant"
    )
    build.add_argument("--repository", default=REPOSITORY)
    pinned = commands.add_parser("requirements", help="make its requirements from constraints.txt")
    pinned.add_argument("pyproject", type=Path)
    pinned.add_argument("constraints", type=Path)
    arguments = vars(parser.parse_args(argv))
    try:
        if arguments.pop("command") == "build":
            print(build_image(**arguments))
        else:
            project = tomllib.loads(arguments["pyproject"].read_text())["project"]
            dependencies = [*project["dependencies"], *project["optional-dependencies"][ENGINE]]
            print(requirements(dependencies, arguments["constraints"].read_text()), end="")
    except (ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
