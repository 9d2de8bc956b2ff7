"""Files by their path, on this machine or in Cloud Storage (`gs://BUCKET/NAME`), with every transfer checked.

Google's client is imported when the first `gs://` path is used: local paths need neither it nor credentials.
"""

import base64
import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.whole_file import whole_or_absent

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

CHUNK_BYTES = 16 * 2**20
"""What one thread holds in memory while it transfers."""

PART_BYTES = 64 * 2**20
"""The smallest part worth an upload of its own: files up to this size go up in one request."""

MAX_PARTS = 32
"""What Cloud Storage composes at once: https://cloud.google.com/storage/docs/composite-objects"""

THREADS = 4

Progress = Callable[[int], object]
"""Called with the number of bytes moved since the last call."""


class StorageError(OSError):
    """A transfer that did not succeed for a reason other than a missing file or a missing permission."""


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


def crc32c_of(path: str | os.PathLike, start: int = 0, size: int | None = None) -> str:
    """The CRC-32C of a local file, or of `size` bytes of it from `start`, in base64: what Cloud Storage calls
    an object's `crc32c`."""
    import google_crc32c

    checksum, left = google_crc32c.Checksum(), size
    with open(path, "rb") as file:
        file.seek(start)
        while data := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            checksum.update(data)
            left = None if left is None else left - len(data)
    return base64.b64encode(checksum.digest()).decode()


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or object at `path`. A bucket that does not exist is an error, not False.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError, StorageError: Cloud Storage could not be asked.
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
    with _explained(path):
        return _blob(path).download_as_bytes()


def size_and_crc32c(path: str | os.PathLike) -> tuple[int, str]:
    """The size in bytes and the CRC-32C (base64): read for a local file, asked for in Cloud Storage.

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
        FileNotFoundError, PermissionError, StorageError: as `read_bytes`; also for a checksum that differs.
        FileBusyError: another process is writing `local_file`.
    """
    if not is_cloud(path):
        return _copy(Path(path), local_file, progress)
    with _explained(path), whole_or_absent(local_file) as file:
        blob = _blob(path)
        blob.reload()
        # All chunks of one generation, although the object may be replaced while they are read.
        blob = blob.bucket.blob(blob.name, generation=blob.generation)
        blob.reload()
        file.truncate(blob.size)
        _in_parallel(
            partial(_download_chunk, blob, file.name, start, min(CHUNK_BYTES, blob.size - start), progress)
            for start in range(0, blob.size, CHUNK_BYTES)
        )
        if (found := crc32c_of(file.name)) != blob.crc32c:
            raise StorageError(
                f"{path} arrived damaged (crc32c {found}, should be {blob.crc32c}): download it again"
            )
    return None


def download_folder(path: str, local_folder: str | os.PathLike) -> Path:
    """Downloads the objects right under `path/`, those that are not there already, and returns the folder.

    Raises:
        FileNotFoundError: there are none, or the bucket does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    folder = path.rstrip("/") + "/"
    with _explained(folder):
        bucket, prefix = parse(folder)
        names = [blob.name for blob in _client().list_blobs(bucket, prefix=prefix, delimiter="/")]
    if not names:
        raise FileNotFoundError(f"{folder} holds nothing: check the path")
    for name in names:
        local_file = Path(local_folder) / name.removeprefix(prefix)
        if not local_file.exists():  # files appear whole
            download(f"gs://{bucket}/{name}", local_file)
    return Path(local_folder)


def upload(
    local_file: str | os.PathLike,
    path: str | os.PathLike,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Copies a local file to `path`, where it appears whole and checked or not at all.

    A large file goes up as parts in parallel, under `PATH.parts/`, which Cloud Storage then composes; parts
    of an interrupted upload are used again by the next one. An identical object at `path` is left as it is.

    Raises:
        FileExistsError: there is another file at `path`, and `overwrite` is False.
        FileNotFoundError: the local file, or the bucket, does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    size = Path(local_file).stat().st_size
    if not is_cloud(path):
        if Path(path).exists() and not overwrite:
            raise _exists_already(path)
        return _copy(Path(local_file), path, progress)
    crc32c = crc32c_of(local_file)
    with _explained(path):
        found = _lookup(path)
        if found and (found.size, found.crc32c) == (size, crc32c):
            _delete_parts(path)
            return None
        if found and not overwrite:
            raise _exists_already(path)
        # Also where overwriting is asked for: what is replaced is what was seen, not what came since.
        generation = found.generation if found else 0
        if size <= PART_BYTES:
            blob = _upload_slice(local_file, _blob(path), 0, size, progress, generation)
        else:
            blob = _upload_in_parts(local_file, path, size, crc32c, progress, generation)
        if (blob.size, blob.crc32c) != (size, crc32c):
            blob.delete(if_generation_match=blob.generation)
            raise StorageError(
                f"{path} arrived damaged (crc32c {blob.crc32c}, not {crc32c}) and was deleted: try again"
            )
        _delete_parts(path)
    return None


def check_writable(path: str | os.PathLike) -> None:
    """Asks whether the bucket of a `gs://` path lets the account in use write, read and delete objects.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError: one of the permissions is missing; the message says which.
        StorageError: Cloud Storage could not be asked.
    """
    bucket, _ = parse(str(path))
    needed = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
    with _explained(path):
        granted = _client().bucket(bucket).test_iam_permissions(needed)
    if missing := sorted(set(needed) - set(granted)):
        raise PermissionError(f"no permission for {path} ({', '.join(missing)}): {_grant(bucket)}")


def delete(path: str | os.PathLike) -> None:
    """Deletes a file or an object, if there is one.

    Raises:
        FileNotFoundError: the bucket does not exist.
        PermissionError, StorageError: as `read_bytes`.
    """
    if not is_cloud(path):
        Path(path).unlink(missing_ok=True)
        return
    with _explained(path):
        if blob := _lookup(path):
            blob.delete()


def _client() -> "Client":
    # A forked process must not share its parent's connections, nor one account another's client.
    return _client_of(os.getpid(), os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))


@lru_cache(maxsize=1)
def _client_of(process_id: int, credentials_file: str | None) -> "Client":
    from google.cloud import storage

    # No project: objects are reached by their bucket, and a user's credentials may name none.
    return storage.Client(project=None)


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


def _in_parallel(tasks: Iterator[Callable[[], object]]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _download_chunk(blob: "Blob", file_name: str, start: int, size: int, progress: Progress | None) -> None:
    with open(file_name, "r+b") as file:
        file.seek(start)
        # The checksum that Cloud Storage sends is the whole object's; the caller checks it.
        blob.download_to_file(file, start=start, end=start + size - 1, raw_download=True, checksum=None)
    if progress:
        progress(size)


def _upload_in_parts(
    local_file: str | os.PathLike,
    path: str | os.PathLike,
    size: int,
    crc32c: str,
    progress: Progress | None,
    generation: int,
) -> "Blob":
    part_size = max(PART_BYTES, -(-size // MAX_PARTS))
    starts = range(0, size, part_size)
    # The content's checksum in their names: a part is only used again for the same content.
    folder = f"{_parts_folder(path)}{crc32c.replace('/', '_')}-{size}"
    parts = [_blob(f"{folder}/{index:02d}") for index in range(len(starts))]
    _in_parallel(
        partial(_upload_part, local_file, part, start, min(part_size, size - start), progress)
        for part, start in zip(parts, starts, strict=True)
    )
    blob = _blob(path)
    blob.content_type = "application/octet-stream"
    blob.compose(
        parts, if_generation_match=generation, if_source_generation_match=[part.generation for part in parts]
    )
    return blob


def _upload_part(
    local_file: str | os.PathLike, part: "Blob", start: int, size: int, progress: Progress | None
) -> None:
    crc32c = crc32c_of(local_file, start, size)
    found = part.exists() and (part.reload() or (part.size, part.crc32c) == (size, crc32c))
    if found:
        if progress:
            progress(size)
        return
    _upload_slice(local_file, part, start, size, progress, None)
    if (part.size, part.crc32c) != (size, crc32c):
        raise StorageError(f"{part.name} arrived damaged: upload again")


def _upload_slice(
    local_file: str | os.PathLike,
    blob: "Blob",
    start: int,
    size: int,
    progress: Progress | None,
    generation: int | None,
) -> "Blob":
    with _Slice(local_file, start, size, progress) as data:
        blob.upload_from_file(data, size=size, if_generation_match=generation, checksum="crc32c")
    return blob


def _parts_folder(path: str | os.PathLike) -> str:
    return f"{path}.parts/"


def _delete_parts(path: str | os.PathLike) -> None:
    """Deletes the parts of this and of interrupted uploads to `path`."""
    bucket, prefix = parse(_parts_folder(path))
    for blob in _client().list_blobs(bucket, prefix=prefix):
        blob.delete()


def _copy(source: Path, target: str | os.PathLike, progress: Progress | None) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: check the path")
    with open(source, "rb") as data, whole_or_absent(target) as file:
        shutil.copyfileobj(data, file, CHUNK_BYTES)
    if progress:
        progress(source.stat().st_size)


def _exists_already(path: str | os.PathLike) -> FileExistsError:
    return FileExistsError(f"{path} exists already: choose another path, or ask for overwriting")


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
            raise FileNotFoundError(
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
        raise PermissionError(
            f"no credentials for {path} ({error}): run `gcloud auth application-default login`"
        ) from error
    except (exceptions.GoogleAPIError, requests.RequestException) as error:
        raise StorageError(f"{path}: {error}; check the connection, then try again") from error


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own, which reports what is read of it."""

    def __init__(self, path: str | os.PathLike, start: int, size: int, progress: Progress | None) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed with this object
        self._start, self._size, self._progress = start, size, progress
        self._position, self._reported = 0, 0

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._position
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        if self._progress and self._position > self._reported:  # a retry reads the same bytes again
            self._progress(self._position - self._reported)
            self._reported = self._position
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
