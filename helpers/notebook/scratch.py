"""A notebook's files on this machine, for as long as its kernel runs."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def scratch_folder() -> Path:
    """A folder for files that this notebook needs while it runs; it goes with the kernel, or by
    `clean_up`."""
    return Path(_temporary_folder())


@cache
def keep_temporary_files() -> None:
    """Puts this kernel's temporary files into one folder that goes with it: Beam leaves a folder of each
    pipeline that a notebook makes."""
    tempfile.tempdir = _temporary_folder()


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="streaming-llm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def clean_up() -> None:
    """Removes what is in the scratch folder."""
    for path in scratch_folder().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
