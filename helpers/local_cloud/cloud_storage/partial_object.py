"""Bytes on their way to becoming an object: a file of their own, and checksums that grow as they arrive."""

import base64
import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from ..front.http_server import CHUNK_BYTES, HttpError


class Checksums:
    """The size and the checksums of a sequence of bytes, as Cloud Storage writes them: in base64.

    components: how many parts an object is composed of, if any; a composed object has no MD5 hash.
    """

    def __init__(self, components: int = 0):
        self.components = components
        self.size = 0
        self._crc32c = google_crc32c.Checksum()
        self._md5 = None if components else hashlib.md5(usedforsecurity=False)
        self._known: tuple[str, str | None] | None = None

    def update(self, chunk: bytes) -> None:
        """Updates the size and checksums with more bytes."""
        self.size += len(chunk)
        self._crc32c.update(chunk)
        if self._md5:
            self._md5.update(chunk)

    @property
    def crc32c(self) -> str:
        """The CRC32C checksum of the bytes so far."""
        return self._known[0] if self._known else _base64(self._crc32c.digest())

    @property
    def md5(self) -> str | None:
        """The MD5 hash of the bytes so far."""
        if self._known:
            return self._known[1]
        return _base64(self._md5.digest()) if self._md5 else None

    @property
    def md5_hex(self) -> str:
        """The MD5 hash in hexadecimal digits; "" if there is none."""
        return base64.b64decode(self.md5 or "").hex()

    def check(self, crc32c: str | None, md5: str | None) -> None:
        """Raises HttpError 400 if a checksum that a client sent does not match the bytes that arrived."""
        for name, sent, computed in (("CRC32C", crc32c, self.crc32c), ("MD5", md5, self.md5)):
            if sent and computed and sent != computed:
                raise HttpError(
                    400, f"Provided {name} '{sent}' doesn't match calculated {name} '{computed}'.", "invalid"
                )


class PartialObject(Checksums):
    """A file that nobody sees until the store puts it in place."""

    def __init__(self, path: Path, components: int = 0):
        super().__init__(components)
        self.path = path
        path.touch(exist_ok=False)

    def append(self, chunks: Iterable[bytes]) -> None:
        """Adds bytes at the end. What had arrived before an exception in `chunks` stays.

        Raises OSError when the disk is full; what of the last chunk was written does not count.
        """
        with self.path.open("r+b", buffering=0) as file:
            for chunk in chunks:
                file.seek(self.size)
                left = memoryview(chunk)
                while left:  # one call may write a part only
                    left = left[file.write(left) :]
                self.update(chunk)

    def copy(self, source: BinaryIO, resource: dict) -> None:
        """Takes over a whole object, whose checksums are known. Raises OSError when the disk is full."""
        with self.path.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
            self.size = file.tell()
        self._known = resource["crc32c"], resource.get("md5Hash")
        self.components = resource.get("componentCount", 0)

    def finish(self) -> None:
        """Has the system write it all out, so that it is safe to say that it is there. Raises OSError."""
        with self.path.open("r+b") as file:
            file.truncate(self.size)
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Removes the file, if it was not put in place."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """What is left of a file, in pieces."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
