"""Files by their path, on this machine or in Cloud Storage (`gs://BUCKET/NAME`), whole and checked.

Google's client is imported when the first `gs://` path is used: local paths need neither it nor credentials.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.files import access
from helpers.files.names import inside
from helpers.files.transfer import (
    CHUNK_BYTES,
    Progress,
    StorageError,
    block_by_block,
    crc32c_of,
    delete_parts,
    download_object,
    upload_object,
)
from helpers.files.whole_file import whole_or_absent

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client


class BucketNotFoundError(FileNotFoundError):
    """There is no such bucket."""


def is_cloud(path: str | os.PathLike) -> bool:
    """Whether `path` names an object in Cloud Storage."""
    return str(path).startswith("gs://")


def parse(uri: str) -> tuple[str, str]:
    """Splits `gs://BUCKET/NAME` into bucket and object name.

    Raises:
        ValueError: it is not such a path, or one of the two is empty.
    """
    bucket, _, name = str(uri).removeprefix("gs://").partition("/")
    if not is_cloud(uri) or not bucket or not name:
        raise ValueError(f"{uri!r} is not an object in Cloud Storage: write it as gs://BUCKET/FOLDER/NAME")
    return bucket, name


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or object at `path`. A bucket that does not exist is an error, not False.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError, StorageError: Cloud Storage could not be queried.
    """
    if not is_cloud(path):
        return Path(path).is_file()
    with _explained(path):
        return _lookup(path) is not None


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole content of a small file.

    Raises:
        FileNotFoundError, PermissionError, StorageError: it could not be read; the message says what to do.
    """
    if not is_cloud(path):
        return Path(path).read_bytes()
    bucket, name = parse(str(path))
    with _explained(path):
        # In one request, for which the client decompresses what is stored compressed.
        return _client().bucket(bucket).blob(name).download_as_bytes()


def size_and_crc32c(path: str | os.PathLike) -> tuple[int, str]:
    """The size in bytes and the CRC-32C (base64): computed for a local file, looked up in Cloud Storage.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `read_bytes`.
    """
    if not is_cloud(path):
        return Path(path).stat().st_size, crc32c_of(path)
    with _explained(path):
        blob = _blob(path)
        blob.reload()
        return blob.size, blob.crc32c


def download(
    path: str | os.PathLike, local_file: str | os.PathLike, progress: Progress | None = None
) -> None:
    """Copies a file or an object to `local_file`, in parallel chunks, checked, whole or not at all.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `read_bytes`; also if the checksum differs.
        FileBusyError: another process is writing `local_file`.
    """
    if not is_cloud(path):
        return _copy(Path(path), local_file, progress)
    with _explained(path), whole_or_absent(local_file) as file:
        download_object(_blob(path), file.name, progress)
    return None


def download_folder(path: str, local_folder: str | os.PathLike, sub_folders: bool = False) -> Path:
    """Downloads the objects under `path/` that `local_folder` lacks, and returns that folder.

    Args:
        path: `gs://BUCKET/FOLDER`.
        local_folder: made if need be.
        sub_folders: whether to download what lies deeper too.

    Raises:
        FileNotFoundError: there are none, or the bucket does not exist.
        PermissionError, StorageError: as `read_bytes`.
        UnsafeNameError: an object's name would lead out of the folder.
    """
    folder = path.rstrip("/") + "/"
    with _explained(folder):
        bucket, prefix = parse(folder)
        delimiter = None if sub_folders else "/"
        names = [blob.name for blob in _client().list_blobs(bucket, prefix=prefix, delimiter=delimiter)]
    # The console marks a folder with an empty object of its name.
    names = [name for name in names if not name.endswith("/")]
    if not names:
        raise FileNotFoundError(f"{folder} holds nothing: check the path")
    for name in names:
        local_file = inside(local_folder, name.removeprefix(prefix))
        if not local_file.exists():  # files appear whole
            download(f"gs://{bucket}/{name}", local_file)
    return Path(local_folder)


def upload(
    local_file: str | os.PathLike,
    path: str | os.PathLike,
    overwrite: bool = False,
    progress: Progress | None = None,
    before: Callable[[], None] | None = None,
    skip_identical: bool = True,
) -> None:
    """Copies a local file to `path`, where it appears whole and checked or not at all.

    Args:
        local_file: the file to copy.
        path: where to.
        overwrite: whether to replace another file at `path`. This replaces only what is there when the call
            begins, not an object that comes meanwhile.
        progress: called as bytes are moved.
        before: called once it is known what would be replaced, and before it is; to stop, it raises.
        skip_identical: whether to leave an identical file or object at `path` as it is.

    Raises:
        FileExistsError: there is another file at `path`, and `overwrite` is False.
        FileNotFoundError: the local file, or the bucket, does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    if not is_cloud(path):
        if before:
            before()
        if skip_identical and Path(path).is_file() and size_and_crc32c(path) == size_and_crc32c(local_file):
            return None
        if Path(path).exists() and not overwrite:
            raise _exists_already(path)
        return _copy(Path(local_file), path, progress)
    content = size_and_crc32c(local_file)
    with _explained(path):
        found = _lookup(path)
        if before:
            before()
        if skip_identical and found and (found.size, found.crc32c) == content:
            return delete_parts(found, found.size)
        if found and not overwrite:
            raise _exists_already(path)
        upload_object(local_file, _blob(path), found.generation if found else 0, progress)
    return None


def names_in(folder: str | os.PathLike) -> list[str]:
    """The names of the files in a folder and below it, relative to the folder; none if there is no such
    folder. Links to folders are not followed.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    if not is_cloud(folder):
        root = Path(folder)
        files = (Path(place) / name for place, _, names in os.walk(root) for name in names)
        return sorted(file.relative_to(root).as_posix() for file in files)
    with _explained(f"{folder}/"):
        bucket, prefix = parse(f"{folder}/")
        names = [blob.name.removeprefix(prefix) for blob in _client().list_blobs(bucket, prefix=prefix)]
    return [name for name in names if name and not name.endswith("/")]


def delete_folder(path: str | os.PathLike, older_than_seconds: float | None = None) -> None:
    """Deletes every file or object under `path/`.

    Args:
        path: a folder on this machine, or `gs://BUCKET/FOLDER`.
        older_than_seconds: leaves what is younger.

    Raises:
        FileNotFoundError, PermissionError, StorageError: as `delete`.
    """
    if not is_cloud(path):
        for name in names_in(path):
            file = Path(path, name)
            if older_than_seconds is None or time.time() - file.lstat().st_mtime > older_than_seconds:
                file.unlink(missing_ok=True)
        for place, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):  # not empty
                os.rmdir(place)
        return
    folder = str(path).rstrip("/") + "/"
    with _explained(folder):
        bucket, prefix = parse(folder)
        for blob in _client().list_blobs(bucket, prefix=prefix):
            if older_than_seconds is None or time.time() - blob.updated.timestamp() > older_than_seconds:
                _delete_if_there(blob)


def check_writable(path: str | os.PathLike) -> None:
    """Checks that the bucket of a `gs://` path lets the account in use write, read and delete objects.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError: one of the permissions is missing; the message says which.
        StorageError: Cloud Storage could not be queried.
    """
    bucket, _ = parse(str(path))
    needed = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
    with _explained(path):
        granted = _client().bucket(bucket).test_iam_permissions(needed)
    if missing := sorted(set(needed) - set(granted)):
        raise PermissionError(f"no permission for {path} ({', '.join(missing)}): {_grant(bucket)}")


def delete(path: str | os.PathLike, before: Callable[[], None] | None = None) -> None:
    """Deletes a file or an object, if there is one.

    Args:
        path: the file or object. Of an object, what is there when the call begins is deleted, and not one
            that comes meanwhile.
        before: called once it is known what would be deleted, and before it is; to stop, it raises.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    if not is_cloud(path):
        if before:
            before()
        Path(path).unlink(missing_ok=True)
        return
    with _explained(path):
        if blob := _lookup(path):
            if before:
                before()
            _delete_if_there(blob, blob.generation)


def _client() -> "Client":
    # A forked process must not share its parent's connections, nor one account use another's client.
    return _client_of(os.getpid(), os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))


@lru_cache(maxsize=1)
def _client_of(process_id: int, credentials_file: str | None) -> "Client":
    from google.cloud import storage

    # No project: objects are reached by their bucket, and a user's credentials may name none.
    client = storage.Client(project=None)
    client._http.mount("https://", block_by_block())
    return client


def _blob(path: str | os.PathLike) -> "Blob":
    bucket, name = parse(str(path))
    return _client().bucket(bucket).blob(name, chunk_size=CHUNK_BYTES)


def _lookup(path: str | os.PathLike) -> "Blob | None":
    """The object at `path` with its metadata, or None where its bucket has no such object."""
    from google.api_core.exceptions import NotFound

    blob = _blob(path)
    try:
        blob.reload()
    except NotFound as error:
        if _names_the_bucket(error):
            raise
        return None
    return blob


def _delete_if_there(blob: "Blob", generation: int | None = None) -> None:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    with suppress(NotFound, PreconditionFailed):
        blob.delete(if_generation_match=generation)


def _copy(source: Path, target: str | os.PathLike, progress: Progress | None) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: check the path")
    with open(source, "rb") as data, whole_or_absent(target) as file:
        shutil.copyfileobj(data, file, CHUNK_BYTES)
    if progress:
        progress(source.stat().st_size)


def _exists_already(path: str | os.PathLike) -> FileExistsError:
    return FileExistsError(f"{path} already exists: choose another path, or overwrite it")


def _grant(bucket: str) -> str:
    return f"give the account in use the role roles/storage.objectUser on {bucket!r}, or use another bucket"


def _names_the_bucket(error: Exception) -> bool:
    return "bucket does not exist" in str(error)


@contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    """Turns the client's errors into the built-in exceptions that the public functions name."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    bucket, _ = parse(str(path))
    try:
        yield
    except exceptions.NotFound as error:
        if _names_the_bucket(error):
            raise BucketNotFoundError(
                f"bucket {bucket!r} of {path} does not exist: create it, or correct the path"
            ) from error
        raise FileNotFoundError(f"{path} does not exist: check the path, or write it first") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise PermissionError(f"no permission for {path} ({error.message}): {_grant(bucket)}") from error
    except exceptions.PreconditionFailed as error:
        raise FileExistsError(
            f"{path} was written by somebody else in the meantime: look at it first"
        ) from error
    except GoogleAuthError as error:
        raise PermissionError(f"no credentials for {path} ({error}): {access.log_in()}") from error
    except (exceptions.GoogleAPIError, requests.RequestException) as error:
        raise StorageError(f"{path}: {error}; check the connection, then try again") from error
