"""This package as a wheel, for the machines that run it: Dataflow's workers and Vertex AI's custom jobs.

A wheel rather than a source archive, because it installs without a build step, so a worker without
internet access can install it too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

DISTRIBUTION = "streaming-llm-helpers"
WHEEL_METADATA = (
    "Wheel-Version: 1.0\nGenerator: helpers.files.package\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)
# Machines in the cloud have no use for a cloud of their own.
LEFT_OUT = {"__pycache__", "local_cloud"}


def build_wheel(folder: str | Path, extras: Iterable[str] = ()) -> Path:
    """Writes the running package, edits included, as a wheel into `folder`.

    The same files give the same bytes, so that a wheel can be stored under its checksum.

    Args:
        folder: where to.
        extras: those of the package's extras whose packages are to be installed with the wheel, wherever it
            is installed by its file's name alone.

    Returns:
        The path of the wheel, for instance `streaming_llm_helpers-0.1.0-py3-none-any.whl`.

    Raises:
        RuntimeError: the package is not installed, so its version and dependencies are unknown.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"{DISTRIBUTION} is not installed: run `pip install --no-deps -e .` in the repository's folder."
        ) from None
    # A checkout that was installed for development may have the second one beside it instead.
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    if not metadata:
        raise RuntimeError(f"The installation of {DISTRIBUTION} is damaged: install it again.")
    for extra in extras:
        metadata, found = re.subn(rf"""; extra == ["']{extra}["']$""", "", metadata, flags=re.MULTILINE)
        if not found:
            raise RuntimeError(
                f"The installation of {DISTRIBUTION} is older than its code, and lacks {extra}: run "
                "`pip install --no-deps -e .` in the repository's folder."
            )
    source = Path(__file__).parents[1]
    stem = f"{DISTRIBUTION.replace('-', '_')}-{distribution.version}"
    path = Path(folder) / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {
        f"{source.name}/{file.relative_to(source).as_posix()}": file.read_bytes()
        for file in sorted(source.rglob("*"))
        if file.is_file()
        and not LEFT_OUT.intersection(file.relative_to(source).parts)
        and file.suffix != ".pyc"
    }
    files[f"{stem}.dist-info/METADATA"] = metadata.encode()
    if entry_points := distribution.read_text("entry_points.txt"):
        files[f"{stem}.dist-info/entry_points.txt"] = entry_points.encode()
    files[f"{stem}.dist-info/WHEEL"] = WHEEL_METADATA.encode()
    record = f"{stem}.dist-info/RECORD"
    files[record] = _record(files, record)
    # The `wheel` package's writer gives RECORD the time of writing, so two wheels of the same files differ.
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _record(files: dict[str, bytes], record: str) -> bytes:
    """RECORD: the name, SHA-256 and size of every file, and its own name alone (packaging.python.org)."""
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{record},,", ""]).encode()
