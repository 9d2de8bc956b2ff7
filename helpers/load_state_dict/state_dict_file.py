"""Writing a state dict tensor by tensor into an ordinary PyTorch file, in constant memory.

`torch.save` lays out the file with an empty place for every tensor; the bytes are then written into their
places. The result is what `torch.save` would have written, including the checksums of its records.
"""

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Place = tuple[torch.Size, torch.dtype, Sequence[str]]
"""The shape and dtype of a tensor, and the names that share it."""

_LOCAL_HEADER = struct.Struct("<26xHH")
_CENTRAL_HEADER = struct.Struct("<4s12xI8xHHH12x")
_CHECKSUM = struct.Struct("<I")


class StateDictFile:
    """A PyTorch file of a state dict, whose tensors are written one at a time.

    Args:
        file: open for writing; what it holds is replaced.
        names: the state dict's names, in order.
        places: its tensors, every name in exactly one of them.
    """

    def __init__(self, file: BinaryIO, names: Sequence[str], places: Sequence[Place]) -> None:
        self._file = file
        self._checksums: dict[str, int] = {}
        _write_empty(file.name, names, places)
        self._records = _find_records(file)
        # torch numbers the storages as it meets them: in the order of the names.
        position = {name: index for index, (_, _, shared) in enumerate(places) for name in shared}
        met = dict.fromkeys(position[name] for name in names)
        self._record_of = {index: f"data/{number}" for number, index in enumerate(met)}
        for index, (shape, dtype, shared) in enumerate(places):
            if self._records[self._record_of[index]][1] != shape.numel() * dtype.itemsize:
                raise RuntimeError(f"torch put {shared[0]} elsewhere: report this, with torch's version")

    def write(self, index: int, chunks: Iterable[torch.Tensor]) -> int:
        """Fills place number `index` with one-dimensional tensors of its dtype, one after the other.

        Several threads may write at once, each to a place of its own.

        Returns:
            The bytes written.

        Raises:
            ValueError: they do not fill the place exactly.
            OSError: the disk is full, or failed.
        """
        record = self._record_of[index]
        start, size = self._records[record]
        position, checksum = start, 0
        for chunk in chunks:
            data = memoryview(chunk.contiguous().view(torch.uint8).numpy())
            if position + len(data) > start + size:
                position += len(data)
                break
            checksum = zlib.crc32(data, checksum)
            while data:
                written = os.pwrite(self._file.fileno(), data, position)
                position, data = position + written, data[written:]
        if position != start + size:
            raise ValueError(f"{position - start} bytes given for a tensor of {size}")
        self._checksums[record] = checksum
        return size

    def finish(self) -> None:
        """Writes the checksums of the tensors' records, so that any zip tool finds the file whole."""
        with zipfile.ZipFile(self._file) as archive:
            entry = archive.start_dir
            for info in archive.infolist():
                self._file.seek(entry)
                _, _, *lengths = _CENTRAL_HEADER.unpack(self._file.read(_CENTRAL_HEADER.size))
                record = info.filename.partition("/")[2]
                if record in self._checksums:
                    checksum = _CHECKSUM.pack(self._checksums[record])
                    start, size = self._records[record]
                    for place in (entry + 16, start + size + 4):  # its directory entry, its data descriptor
                        self._file.seek(place)
                        self._file.write(checksum)
                entry += _CENTRAL_HEADER.size + sum(lengths)
        self._file.flush()


def _write_empty(file_name: str, names: Sequence[str], places: Sequence[Place]) -> None:
    """Writes the state dict with empty tensors. torch calls `skip_data` a prototype; it is used only here."""
    with FakeTensorMode():
        tensors = {}
        for shape, dtype, shared in places:
            tensors |= dict.fromkeys(shared, torch.empty(shape, dtype=dtype))
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({name: tensors[name] for name in names}, file_name)
    except RuntimeError as error:  # torch turns an operating system's error into this, and loses its number
        raise OSError(errno.EFBIG, "a file of that size cannot be laid out") from error


def _find_records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where the data of each record of a PyTorch file starts, and its size in bytes."""
    records = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise RuntimeError("torch compressed a tensor: report this, with torch's version")
            file.seek(info.header_offset)
            lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
            records[info.filename.partition("/")[2]] = (start, info.file_size)
    return records
