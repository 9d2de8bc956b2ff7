"""Files that appear whole or not at all: written beside their name, locked while written, then renamed."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no lock: the user must avoid two writers of one file.
    fcntl = None


# A link at the temporary name would be somebody else's way to have another file overwritten.
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class FileBusyError(OSError):
    """Another process is writing the same file."""


def partial_path(path: str | os.PathLike) -> Path:
    """The name that a file has while it is being written. It is always the same, so that an interrupted
    writer's leftover is found and replaced by the next one, whatever killed the first."""
    path = Path(path)
    return path.with_name(f"{path.name}.partial")


def free_bytes(path: str | os.PathLike) -> int:
    """The free space, in bytes, of the disk that `path` is on, or will be."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def whole_or_absent(path: str | os.PathLike, wait_seconds: float = 0) -> Iterator[BinaryIO]:
    """Opens `path` for writing; the file appears at `path` when the block succeeds, and not before.

    Args:
        path: the file to write. Its folder is created.
        wait_seconds: how long to wait for another process that is writing the same file.

    Yields:
        An empty file, open for reading and writing in binary mode, whose `.name` is its temporary path.

    Raises:
        FileBusyError: another process was still writing the file after `wait_seconds`.
        OSError: the folder cannot be made or written to, or its disk is full.
    """
    path, partial = Path(path), partial_path(path)
    with _explained(path):
        file = _open_locked(partial, wait_seconds)
    try:
        file.truncate(0)
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _explain_no_room(path, error)
        raise
    finally:
        file.close()


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears at `path` with all that the block writes into it, or not at all.

    Two writers of the same folder must be kept apart by a lock of their own. What an interrupted writer has
    left is deleted.

    Args:
        path: the folder, which replaces one that is there. The folder above it is created.

    Yields:
        An empty folder beside it.

    Raises:
        OSError: it cannot be made or written to, or its disk is full.
    """
    path, partial = Path(path), partial_path(path)
    with _explained(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        for name in [*partial.iterdir(), partial]:
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _explain_no_room(path, error)
        raise


@contextmanager
def only_writer(path: str | os.PathLike, wait_seconds: float = 0) -> Iterator[None]:
    """Keeps other processes of this machine from writing what belongs to `path`, for as long as the block
    takes: for files that are written one after the other, and must come from one writer.

    Args:
        path: what is written. Its folder is created.
        wait_seconds: how long to wait for another process that is within such a block.

    Raises:
        FileBusyError: another process still was within such a block.
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    lock = path.with_name(f"{path.name}.lock")
    with _explained(path):
        file = _open_locked(lock, wait_seconds)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is released: whoever waits for it sees that it is gone
        file.close()


def is_busy(path: str | os.PathLike) -> bool:
    """Whether another process is within a block of `only_writer` for `path`."""
    try:
        with only_writer(path):
            return False
    except FileBusyError:
        return True


def _explain_no_room(path: Path, error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(
            error.errno, f"no room for {path} ({error.strerror}): free some space, or use another disk"
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileBusyError:
        raise
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written ({error.strerror}): choose another folder, or make that one writable"
        ) from error


def _open_locked(partial: Path, wait_seconds: float) -> BinaryIO:
    deadline = time.monotonic() + wait_seconds
    while True:
        partial.parent.mkdir(parents=True, exist_ok=True)  # whoever had the lock may have removed it
        file = open(  # noqa: SIM115 - whole_or_absent closes it
            partial, "r+b", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o666)
        )
        if _lock(file):
            return file
        file.close()
        if time.monotonic() >= deadline:
            raise FileBusyError(
                f"another process is writing {partial}; wait until it has ended, then try again"
            )
        time.sleep(0.1)


def _lock(file: BinaryIO) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous writer may have renamed or removed this very file between our open and our lock: then
        # what we hold is its finished file, which must not be truncated.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False
