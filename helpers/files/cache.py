"""Where this package keeps on this machine what it has downloaded or made."""

import errno
import os
import shutil
import stat
from pathlib import Path


class CacheError(PermissionError):
    """A folder for what is kept that others could write to."""


def cache_folder(*parts: str) -> Path:
    """A folder of this package's own in the user's cache: `$XDG_CACHE_HOME/streaming-llm/PARTS`, by default
    under `~/.cache`. The hub's files stay in the hub's own cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("streaming-llm", *parts)


def private_folder(folder: str | Path) -> Path:
    """Makes a folder that only this user can write to, or checks that an existing one is such a folder.

    What is in it can then be used without being checked again: nobody else has put it there. A folder of
    this user's that others could write to until now, as a lenient umask makes it, is emptied and closed.

    Args:
        folder: the folder, which is made with those above it.

    Raises:
        CacheError: it cannot be made there; or another user owns the folder, or the one above it, and could
            put another in its place.
        OSError: the disk is full, or broken.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CacheError(
            f"{folder} cannot be made ({error.strerror}): name another place for copies with "
            "STATE_DICT_CACHE or XDG_CACHE_HOME"
        ) from error
    if not hasattr(os, "geteuid"):  # Windows has other permissions, and a user's folders are the user's
        return folder
    found, above = folder.lstat(), folder.parent.stat()
    advice = "remove it, or have copies kept elsewhere: STATE_DICT_CACHE or XDG_CACHE_HOME names the place"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise CacheError(f"{folder} is not a folder of this user's own, and may hold anything: {advice}")
    is_open = above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX
    if is_open or above.st_uid not in (0, os.geteuid()):
        raise CacheError(f"Others can replace what is in {folder.parent}: {advice}")
    if found.st_mode & 0o022:
        folder.chmod(0o700)
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return folder
