"""The workers' image: all the places that name a version agree, and what cannot be built is reported."""

import gzip
import importlib.metadata
import io
import re
import sys
import tarfile
import tomllib
from pathlib import Path

import apache_beam
import pytest
from google.cloud.devtools import cloudbuild_v1
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.dataflow import worker_image
from helpers.dataflow.worker_image import (
    WORKER,
    ImageError,
    build_image,
    build_request,
    main,
    python_of,
    requirements,
    source_archive,
)

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DOCKERFILE = (WORKER / "Dockerfile").read_text()
REQUIREMENTS = (WORKER / "requirements.txt").read_text()


def pins(text: str) -> dict[str, str]:
    """The versions in constraints, as they hold for the Python that runs this."""
    found = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    return {
        one.name: next(iter(one.specifier)).version
        for one in found
        if one.marker is None or one.marker.evaluate()
    }


def argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(\S*)$", DOCKERFILE, re.MULTILINE)
    return value


def test_the_requirements_are_those_of_the_constraints():
    dependencies = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["ctranslate2"]]
    assert requirements(dependencies, CONSTRAINTS) == REQUIREMENTS, (
        "run: python -m helpers.dataflow image requirements pyproject.toml constraints.txt "
        "> helpers/dataflow/worker/requirements.txt"
    )
    tested = {name.lower().replace("_", "-"): version for name, version in pins(CONSTRAINTS).items()}
    assert pins(REQUIREMENTS).items() <= tested.items()


def test_the_image_has_every_dependency_of_the_helpers_in_its_range():
    """Its own, or one that comes with Beam."""
    tested = {name.lower().replace("_", "-"): version for name, version in pins(CONSTRAINTS).items()}
    beams = worker_image.closure([Requirement(worker_image.BEAM)], tested)
    versions = {name: tested[name] for name in beams} | pins(REQUIREMENTS)
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert versions[requirement.name] in requirement.specifier


def test_the_image_is_of_the_beam_and_the_python_that_submit():
    assert argument("BEAM_VERSION") == pins(CONSTRAINTS)["apache-beam"]
    (python,) = re.findall(r"tested together on Python (\d+\.\d+)", CONSTRAINTS)
    assert argument("PYTHON_VERSION") == python
    assert sys.version_info >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    # These tests must run on what make installs, or their pickles would prove nothing about the image.
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == python:
        assert argument("BEAM_VERSION") == apache_beam.__version__
    assert "FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}" in DOCKERFILE


def test_the_image_brings_neither_beam_nor_cuda_along():
    assert "apache-beam" not in pins(REQUIREMENTS)
    assert not [name for name in pins(REQUIREMENTS) if re.match("nvidia|cuda|triton", name)]


def test_a_missing_constraint_is_told():
    with pytest.raises(ImageError, match="no nonesuch"):
        requirements(["nonesuch>=1"], CONSTRAINTS)


def test_extras_bring_what_they_need():
    wanted = [Requirement("google-auth[requests,pyopenssl]")]
    assert "cryptography" in worker_image.closure(wanted, dict(worker_image._pins(CONSTRAINTS)))


def test_the_build_has_what_the_dockerfile_copies():
    plain = io.BytesIO(gzip.decompress(source_archive()))
    with tarfile.open(fileobj=plain) as archive:
        assert set(re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE)) < set(archive.getnames())
        assert archive.extractfile("Dockerfile").read().decode() == DOCKERFILE
    assert source_archive() == source_archive()


def test_the_build_is_one_that_cloud_build_takes():
    request = build_request("b", "s.tar.gz", "i:1", {"VARIANT": "gpu", "TORCH_INDEX_URL": ""}, 30)
    build = cloudbuild_v1.Build(request)
    assert (build.source.storage_source.bucket, build.source.storage_source.object_) == ("b", "s.tar.gz")
    (step,) = build.steps
    assert list(step.args) == [
        "build", "--build-arg=VARIANT=gpu", "--build-arg=TORCH_INDEX_URL=", "--tag=i:1", "."
    ]  # fmt: skip
    assert list(build.images) == ["i:1"]
    assert build.timeout.total_seconds() == 1800
    given = {name for name in ("VARIANT", "TORCH_INDEX_URL") if f"ARG {name}=" in DOCKERFILE}
    assert given == {"VARIANT", "TORCH_INDEX_URL"}


def test_a_cpu_image_wants_a_torch_without_cuda(capsys):
    with pytest.raises(ImageError, match=r"pytorch\.org/get-started"):
        build_image(project="p", location="us-central1", bucket="b")
    with pytest.raises(ImageError, match="choose one of cpu, gpu"):
        build_image(project="p", location="us-central1", bucket="b", variant="tpu")
    assert main(["build", "--project=p", "--region=r", "--bucket=b"]) == 1
    assert "error: The CPU image needs" in capsys.readouterr().err


def test_the_local_cloud_says_that_it_builds_no_images(cloud, bucket):
    with pytest.raises(ImageError, match="Submit the job without one"):
        build_image(project=cloud.project, location="us-central1", bucket=bucket.name, variant="gpu")
    assert not list(bucket.list_blobs()), "nothing of it stays in the bucket"


@pytest.mark.parametrize(
    ("image", "python"),
    [
        ("us-central1-docker.pkg.dev/p/streaming-llm/worker-cpu:py311-0123456789ab", "3.11"),
        ("us-central1-docker.pkg.dev/p/streaming-llm/worker-gpu:py313-0123456789ab", "3.13"),
        ("apache/beam_python3.12_sdk:2.77.0", "3.12"),
        ("gcr.io/p/mine:latest", None),
    ],
)
def test_an_images_name_tells_its_python(image, python):
    assert python_of(image) == python


def test_an_image_is_built_for_the_python_that_submits(monkeypatch):
    built = {}
    monkeypatch.setattr(worker_image, "_upload", lambda *_: None)
    monkeypatch.setattr(worker_image.storage, "delete", lambda *_: None)
    monkeypatch.setattr(worker_image, "_run_build", lambda *arguments: built.update(arguments[4]))
    monkeypatch.setattr(worker_image, "python_here", lambda: "3.13")
    image = build_image(project="p", location="us-central1", bucket="b", torch_index_url="https://index")
    assert built["PYTHON_VERSION"] == "3.13"
    assert python_of(image) == "3.13"


def test_no_pin_contradicts_what_beams_image_holds():
    """Every package that Beam needs is in its image, in a version of Beam's choice: none is pinned over it,
    and none of those asks for another version of one that is pinned."""
    pinned = dict(line.split("==") for line in REQUIREMENTS.splitlines() if "==" in line)
    pins = dict(worker_image._pins(CONSTRAINTS))
    beams = worker_image.closure([Requirement(worker_image.BEAM)], pins)
    assert not beams & pinned.keys()
    assert {"torch", "transformers", "ctranslate2"} <= pinned.keys()
    for name in beams:
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            other = canonicalize_name(requirement.name)
            if other in pinned and worker_image._is_for_workers(requirement, {""}):
                assert requirement.specifier.contains(pinned[other], prereleases=True), (name, text)
