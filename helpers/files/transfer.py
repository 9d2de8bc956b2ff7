"""Moving one object to or from Cloud Storage: in parallel, in constant memory, every byte checked.

A large upload goes up as parts beside its destination (`NAME.parts/`), which Cloud Storage then composes into
one object. So the object appears whole, a precondition holds for all of it, and the next upload reuses the
parts of an interrupted one. (Google's own `transfer_manager` uploads parallel parts through the XML API,
which has no preconditions.)
"""

import base64
import gzip
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.cloud.storage import Blob
    from requests.adapters import HTTPAdapter

CHUNK_BYTES = 16 * 2**20
"""What one thread holds in memory while it transfers."""

PART_BYTES = 64 * 2**20
"""The smallest part worth an upload of its own: files up to this size go up in one request."""

MAX_PARTS = 32
"""How many parts Cloud Storage composes at once: https://cloud.google.com/storage/docs/composite-objects"""

THREADS = 4

TIMEOUT = (60, 300)
"""Seconds that one block of a request may take to be sent, and that an answer may take to come: over a slow
line, the system still has much to send when it has taken the last block."""

Progress = Callable[[int], object]
"""Called with the number of bytes moved since the last call."""


class StorageError(OSError):
    """A transfer that failed for a reason other than a missing file or permission."""


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


def crc32c_of_bytes(data: bytes) -> str:
    """The CRC-32C of some bytes, in base64."""
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def block_by_block() -> "HTTPAdapter":
    """An adapter for a client's session that sends the bodies of requests in small blocks.

    A body that is sent in one go has one time limit for all of it, and over a slow line it never arrives.
    This way the limit is one block's: it follows progress.
    """
    from requests.adapters import HTTPAdapter

    class BlockByBlock(HTTPAdapter):
        def send(self, request, *args, **kwargs):
            if isinstance(request.body, bytes):
                request.body = io.BytesIO(request.body)
            return super().send(request, *args, **kwargs)

    return BlockByBlock()


def download_object(blob: "Blob", file_name: str, progress: Progress | None = None) -> None:
    """Downloads an object into an existing file, and checks what arrived.

    An object that is stored compressed (with the encoding "gzip") is decompressed, as Google's client does.

    Raises:
        StorageError: the checksum differs.
        google.api_core.exceptions.GoogleAPIError: Cloud Storage refused.
    """
    blob.reload()
    # All chunks come from one generation, even if the object is replaced while they are read.
    fixed = blob.bucket.blob(blob.name, generation=blob.generation)
    os.truncate(file_name, blob.size)

    def download_chunk(start: int) -> None:
        size = min(CHUNK_BYTES, blob.size - start)
        with open(file_name, "r+b") as file:
            file.seek(start)
            # A chunk has no checksum of its own: the whole file's is checked below.
            fixed.download_to_file(file, start=start, end=start + size - 1, raw_download=True, checksum=None)
        if progress:
            progress(size)

    _in_parallel(partial(download_chunk, start) for start in range(0, blob.size, CHUNK_BYTES))
    if (found := crc32c_of(file_name)) != blob.crc32c:
        raise StorageError(
            f"{_uri(blob)} arrived damaged (crc32c {found}, not {blob.crc32c}): download it again"
        )
    if blob.content_encoding == "gzip":
        _decompress(file_name)


def _decompress(file_name: str) -> None:
    """Replaces the content of a file by what it is when decompressed."""
    with open(file_name, "r+b") as file, tempfile.TemporaryFile(dir=os.path.dirname(file_name)) as compressed:
        shutil.copyfileobj(file, compressed, CHUNK_BYTES)
        compressed.seek(0)
        file.seek(0)
        file.truncate()
        try:
            with gzip.open(compressed) as content:
                shutil.copyfileobj(content, file, CHUNK_BYTES)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise StorageError(
                f"{file_name} is not what its encoding says, gzip ({error}): upload it again"
            ) from error


def upload_object(
    local_file: str | os.PathLike, blob: "Blob", generation: int, progress: Progress | None = None
) -> None:
    """Uploads a file, as one object that appears whole, and checks what arrived.

    Args:
        local_file: the file to upload.
        blob: the destination.
        generation: the generation of the object that it may replace, or 0 if there must be none.
        progress: called as bytes are sent.

    Raises:
        StorageError: the checksum differs; the object is deleted again.
        google.api_core.exceptions.GoogleAPIError: Cloud Storage refused.
    """
    size, crc32c = os.path.getsize(local_file), crc32c_of(local_file)
    if size <= PART_BYTES:
        _upload_slice(local_file, blob, 0, size, generation, progress)
    else:
        _upload_in_parts(local_file, blob, size, crc32c, generation, progress)
    if (blob.size, blob.crc32c) != (size, crc32c):
        blob.delete(if_generation_match=blob.generation)
        raise StorageError(
            f"{_uri(blob)} arrived damaged (crc32c {blob.crc32c}, not {crc32c}) and was deleted: try again"
        )
    delete_parts(blob, size)


def delete_parts(blob: "Blob", size: int) -> None:
    """Deletes the parts of an object of `size` bytes, also those that interrupted uploads have left."""
    if size <= PART_BYTES:
        return
    for part in blob.client.list_blobs(blob.bucket, prefix=f"{blob.name}.parts/"):
        part.delete()


def _upload_in_parts(
    local_file: str | os.PathLike,
    blob: "Blob",
    size: int,
    crc32c: str,
    generation: int,
    progress: Progress | None,
) -> None:
    part_size = max(PART_BYTES, -(-size // MAX_PARTS))
    # Part names include the content's checksum: a part is reused only for the same content.
    folder = f"{blob.name}.parts/{crc32c.replace('/', '_')}-{size}"
    parts = [
        (
            blob.bucket.blob(f"{folder}/{index:02d}", chunk_size=CHUNK_BYTES),
            start,
            min(part_size, size - start),
        )
        for index, start in enumerate(range(0, size, part_size))
    ]

    def upload_part(part: "Blob", start: int, part_size: int) -> None:
        expected = (part_size, crc32c_of(local_file, start, part_size))
        if part.exists():
            part.reload()
        if (part.size, part.crc32c) == expected:
            if progress:
                progress(part_size)
            return
        _upload_slice(local_file, part, start, part_size, None, progress)
        if (part.size, part.crc32c) != expected:
            raise StorageError(f"{_uri(part)} arrived damaged: upload again")

    _in_parallel(partial(upload_part, *part) for part in parts)
    blob.content_type = "application/octet-stream"
    blobs = [part for part, _, _ in parts]
    generations = [part.generation for part in blobs]
    blob.compose(blobs, if_generation_match=generation, if_source_generation_match=generations)


def _upload_slice(
    local_file: str | os.PathLike,
    blob: "Blob",
    start: int,
    size: int,
    generation: int | None,
    progress: Progress | None,
) -> None:
    with _Slice(local_file, start, size, progress) as data:
        blob.upload_from_file(
            data, size=size, if_generation_match=generation, checksum="crc32c", timeout=TIMEOUT
        )


def _in_parallel(tasks: Iterable[Callable[[], object]]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _uri(blob: "Blob") -> str:
    return f"gs://{blob.bucket.name}/{blob.name}"


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own, which reports what is read from it."""

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
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
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
