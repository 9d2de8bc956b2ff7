"""Objects as files, with their metadata beside them.

An object whose name can be a path is the file ROOT/BUCKET/NAME, so that other programs can read it and a file
they put there is an object. Names that cannot be paths ('a//b', 'a/', '../a', or 'a/b' beside an object 'a')
have their bytes in another folder under a single file name (bucket_store.py draws the layout). On a
case-insensitive file system, names that differ only in case are one object.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..front.http_server import HttpError
from . import resource as resources
from .bucket_store import BucketStore, read_json
from .names import check_object_name, file_name, is_object_name, name_of_file, plain_path
from .partial_object import Checksums, PartialObject, read_chunks
from .preconditions import Preconditions

NO_CONDITIONS = Preconditions()
NO_RECORD = {"resource": {"name": ""}}


class ObjectStore:
    """The objects below `root`.

    Methods raise HttpError: 400 for a bad name or field, 404, 412 for a condition.
    """

    def __init__(self, root: Path):
        self.buckets = BucketStore(root)

    def stop(self) -> None:
        """Discards what was being written."""
        self.buckets.stop()

    def partial(self, components: int = 0) -> PartialObject:
        """An empty object in the making, for `put`; components: how many parts it is composed of, if any."""
        return PartialObject(self.buckets.new_file(), components)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names in a bucket that begin with the prefix, in the order of their UTF-8 bytes."""
        self.buckets.get(bucket)
        folder = self.buckets.folder(bucket)
        start = plain_path(folder, prefix.rpartition("/")[0]) or folder
        names = {path.relative_to(folder).as_posix() for path in _files(start)}
        kept = self.buckets.own / "objects" / bucket
        for path in _files(kept):
            record = self.buckets.own / "metadata" / bucket / path.name
            names.add(name_of_file(path.name) or (read_json(record) or NO_RECORD)["resource"]["name"])
        return sorted(name for name in names if name.startswith(prefix) and is_object_name(name))

    def find(self, bucket: str, name: str) -> dict | None:
        """The resource of the live object; None when there is none."""
        try:
            resource, file = self._open(bucket, name)
        except FileNotFoundError:
            self.buckets.get(bucket)
            return None
        file.close()
        return resource

    def open(self, bucket: str, name: str) -> tuple[dict, BinaryIO]:
        """The resource of the live object and its bytes, which belong together whatever others write."""
        try:
            return self._open(bucket, name)
        except FileNotFoundError:
            self.buckets.get(bucket)
            raise _no_such_object(bucket, name) from None

    def put(
        self,
        bucket: str,
        name: str,
        partial: PartialObject,
        fields: dict,
        conditions: Preconditions = NO_CONDITIONS,
    ) -> dict:
        """Makes the partial object the live one, in one step, and returns its resource.

        fields: what the client says about it: the writable fields of an object's resource.

        Raises OSError when the disk is full; the object that was there before still is.
        """
        own = resources.writable(fields)
        partial.finish()
        if conditions != NO_CONDITIONS:
            self.find(bucket, name)
        with self.buckets.locked(bucket):
            self.buckets.get(bucket)
            if conditions != NO_CONDITIONS:
                conditions.check(self._live(bucket, name))
            generation = self._next_generation(bucket, name, _now())
            resource = resources.new(bucket, name, generation, partial, own)
            record = {"resource": resource, "file": _signature(partial.path.stat())}
            record_path = self._record_path(bucket, name)
            # All that needs room on the disk is written before anything that is there is touched.
            with self.buckets.new_json(record_path, record) as new, self._kept(bucket, name) as put_back:
                try:
                    self._place(bucket, name, partial.path)
                    os.replace(new, record_path)
                except OSError:
                    put_back()
                    raise
        return resource

    @contextlib.contextmanager
    def _kept(self, bucket: str, name: str) -> Iterator[Callable[[], None]]:
        """Keeps the object that is there, if any, under a second name; yields what puts it back."""
        try:
            path = self._path(bucket, name)
        except FileNotFoundError:
            path = None
        second = self.buckets.new_file()
        try:
            if path:
                with contextlib.suppress(OSError):  # a file system without hard links
                    os.link(path, second)

            def put_back() -> None:
                if second.exists():
                    os.replace(second, path)
                elif not path:
                    for place in self._places(bucket, name):
                        place.is_file() and place.unlink()

            yield put_back
        finally:
            second.unlink(missing_ok=True)

    def delete(self, bucket: str, name: str, conditions: Preconditions = NO_CONDITIONS) -> None:
        """Removes the object."""
        self.find(bucket, name)
        with self.buckets.locked(bucket):
            resource = self._live(bucket, name)
            conditions.check(resource)
            if resource is None:
                raise _no_such_object(bucket, name)
            self._remove(self._path(bucket, name), self.buckets.folder(bucket))
            self._record_path(bucket, name).unlink(missing_ok=True)

    # Where an object is

    def _places(self, bucket: str, name: str) -> list[Path]:
        check_object_name(name)
        plain = plain_path(self.buckets.folder(bucket), name)
        kept = self.buckets.own / "objects" / bucket / file_name(name)
        return [plain, kept] if plain else [kept]

    def _path(self, bucket: str, name: str) -> Path:
        for path in self._places(bucket, name):
            if path.is_file():
                return path
        raise FileNotFoundError(name)

    def _place(self, bucket: str, name: str, new: Path) -> Path:
        """Moves a file to where the object belongs, and removes it from where it may have been before."""
        *plain, kept = self._places(bucket, name)
        for path in plain:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new, path)
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                continue  # another object's name is a part of this one's path, or the other way round
            kept.unlink(missing_ok=True)
            return path
        kept.parent.mkdir(exist_ok=True)
        os.replace(new, kept)
        return kept

    @staticmethod
    def _remove(path: Path, bucket_folder: Path) -> None:
        path.unlink()
        if bucket_folder in path.parents:
            for folder in path.parents:
                if folder == bucket_folder or any(folder.iterdir()):
                    break
                folder.rmdir()

    # What is known about it

    def _open(self, bucket: str, name: str) -> tuple[dict, BinaryIO]:
        file = self._path(bucket, name).open("rb")
        if resource := self._recorded(bucket, name, file):
            return resource, file
        file.close()
        with self.buckets.locked(bucket):  # a writer may have been between its two steps
            file = self._path(bucket, name).open("rb")
            resource = self._recorded(bucket, name, file)
        return resource or self._adopt(bucket, name, file), file

    def _live(self, bucket: str, name: str) -> dict | None:
        """The live object's resource, for a caller that holds the lock and has called `find` before."""
        try:
            with self._path(bucket, name).open("rb") as file:
                resource = self._recorded(bucket, name, file)
        except FileNotFoundError:
            return None
        if resource is None:
            raise HttpError(503, f"{bucket}/{name} is being changed by hand; try again.", "backendError")
        return resource

    def _adopt(self, bucket: str, name: str, file: BinaryIO) -> dict:
        """Gives a file that was put there by hand, perhaps not complete yet, its resource."""
        signature = _signature(os.fstat(file.fileno()))
        checksums = Checksums()
        for chunk in read_chunks(file):
            checksums.update(chunk)
        file.seek(0)
        modified = os.fstat(file.fileno()).st_mtime_ns // 1000
        with self.buckets.locked(bucket):
            generation = self._next_generation(bucket, name, min(modified, _now()))
            resource = resources.new(bucket, name, generation, checksums, {})
            if (
                _signature(self._path(bucket, name).stat())
                == signature
                == _signature(os.fstat(file.fileno()))
            ):
                self._write_record(bucket, resource, self._path(bucket, name))
        return resource

    def _record_path(self, bucket: str, name: str) -> Path:
        return self.buckets.own / "metadata" / bucket / file_name(name)

    def _recorded(self, bucket: str, name: str, file: BinaryIO) -> dict | None:
        """The recorded resource, if it is that of this very file."""
        record = read_json(self._record_path(bucket, name)) or {}
        return record["resource"] if record.get("file") == _signature(os.fstat(file.fileno())) else None

    def _write_record(self, bucket: str, resource: dict, path: Path) -> None:
        record = {"resource": resource, "file": _signature(path.stat())}
        self.buckets.write_json(self._record_path(bucket, resource["name"]), record)

    def _next_generation(self, bucket: str, name: str, wanted: int) -> int:
        """A generation, which is a time in microseconds, later than the last one known for the name."""
        previous = read_json(self._record_path(bucket, name))
        return max(wanted, int(previous["resource"]["generation"]) + 1 if previous else 0)


def _files(folder: Path) -> Iterator[Path]:
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            if file.is_file():
                yield file


def _signature(status: os.stat_result) -> list[int]:
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def _now() -> int:
    return time.time_ns() // 1000


def _no_such_object(bucket: str, name: str) -> HttpError:
    return HttpError(404, f"No such object: {bucket}/{name}", "notFound")
