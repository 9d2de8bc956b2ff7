"""This package as a wheel, for the machines that run it: Dataflow's workers and Vertex AI's custom jobs.

A wheel rather than a source archive, because it installs without a build step, so a worker with no way to
the internet can install it too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

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
    files = {
        f"{source.name}/{file.relative_to(source).as_posix()}": file.read_bytes()
        for file in sorted(source.rglob("*"))
        if file.is_file() and not LEFT_OUT.intersection(file.parts) and file.suffix != ".pyc"
    }
    files[f"{stem}.dist-info/METADATA"] = metadata.encode()
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
