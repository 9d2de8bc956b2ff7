"""This package as a wheel, for the machines that run it: Dataflow's workers and Vertex AI's custom jobs.

A wheel rather than a source archive, because it installs without a build step, so a worker with no way to
the internet can install it too.
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path

from wheel.wheelfile import WheelFile

DISTRIBUTION = "streaming-llm-helpers"
WHEEL_METADATA = "Wheel-Version: 1.0\nGenerator: helpers.package\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
LEFT_OUT = {"__pycache__"}


def build_wheel(folder: str | Path) -> Path:
    """Writes the package that is running, edits included, as a wheel into ``folder``.

    The same files give the same bytes, so that a wheel can be stored under its checksum.

    Returns:
        The path of the wheel, for instance ``streaming_llm_helpers-0.1.0-py3-none-any.whl``.

    Raises:
        RuntimeError: the package is not installed, so that its version and dependencies are not known.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"{DISTRIBUTION} is not installed: run `pip install --no-deps -e .` in the repository's folder."
        ) from None
    # The second name is what a checkout that was installed for development may have beside it.
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    if not metadata:
        raise RuntimeError(f"The installation of {DISTRIBUTION} is damaged: install it again.")
    source = Path(__file__).parent
    stem = f"{DISTRIBUTION.replace('-', '_')}-{distribution.version}"
    path = Path(folder) / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # WheelFile writes RECORD, with the checksum of every file, as it closes.
    with WheelFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in sorted(source.rglob("*")):
            if file.is_file() and not LEFT_OUT.intersection(file.parts) and file.suffix != ".pyc":
                _add(wheel, f"{source.name}/{file.relative_to(source).as_posix()}", file.read_bytes())
        _add(wheel, f"{stem}.dist-info/METADATA", metadata.encode())
        _add(wheel, f"{stem}.dist-info/WHEEL", WHEEL_METADATA.encode())
    return path


def _add(wheel: WheelFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    wheel.writestr(entry, data)
