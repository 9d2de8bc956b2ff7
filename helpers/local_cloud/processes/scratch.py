"""Folders that live as long as the process that made them, however it ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class Scratch:
    """A private folder inside `parent`. Making one removes those that dead processes left there."""

    def __init__(self, parent: Path):
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.iterdir():
            _remove_if_abandoned(other)
        self.path = Path(tempfile.mkdtemp(dir=parent))
        # The lock shows that the owner is alive: the system drops it when the process ends. A child that
        # inherits no file descriptors (subprocess's default) does not keep it.
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Removes the folder and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _remove_if_abandoned(folder: Path) -> None:
    # A folder without a lock file is one that is just being made.
    with contextlib.suppress(OSError):
        lock = os.open(folder / "lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
