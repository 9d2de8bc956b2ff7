"""Buckets as folders. A folder that was put there by hand, under a valid name, is a bucket too.

    ROOT/BUCKET/                    the objects whose names can be paths, as plain files
    ROOT/.cloud/buckets/BUCKET.json what was set on the bucket
    ROOT/.cloud/metadata/BUCKET/    a file for each object: its metadata
    ROOT/.cloud/objects/BUCKET/     the objects whose names cannot be paths
    ROOT/.cloud/locks/BUCKET        held by whoever changes the bucket or an object in it
    ROOT/.cloud/partial/            what is being written, until it is whole

Nothing is kept in memory, so several processes can share the folder.
"""

import base64
import contextlib
import datetime
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..front.accounts import PROJECT_NUMBER
from ..front.fields import says_nothing
from ..front.http_server import HttpError
from ..front.regions import REGIONS
from ..processes.scratch import Scratch
from .names import check_bucket_name

# https://cloud.google.com/storage/docs/locations
MULTI_REGIONS = ("US", "EU", "ASIA")
DUAL_REGIONS = ("ASIA1", "EUR4", "EUR5", "EUR7", "EUR8", "NAM4")
ACCESS_PREVENTIONS = (None, "inherited", "unspecified", "enforced")
READ_ONLY = ("kind", "id", "name", "selfLink", "projectNumber", "locationType", "metageneration", "etag")
READ_ONLY += ("timeCreated", "updated")
# The types of what a client may set; every other is an object.
TEXTS = ("name", "location", "storageClass")


class BucketStore:
    """The buckets below `root`. Methods raise HttpError: 400 for a bad name, 404, 409 or 412."""

    def __init__(self, root: Path):
        self.root = root
        self.own = root / ".cloud"
        for name in ("buckets", "metadata", "objects", "locks"):
            (self.own / name).mkdir(parents=True, exist_ok=True)
        self._scratch = Scratch(self.own / "partial")

    def stop(self) -> None:
        """Discards what was being written."""
        self._scratch.remove()

    def new_file(self) -> Path:
        """A path, on the objects' file system, where a file can be written and then moved into place."""
        return self._scratch.path / uuid.uuid4().hex

    def write_json(self, path: Path, content: dict) -> None:
        """Writes a file in one step, so that no reader sees a part of it. Raises OSError."""
        with self.new_json(path, content) as new:
            os.replace(new, path)

    @contextlib.contextmanager
    def new_json(self, path: Path, content: dict) -> Iterator[Path]:
        """A file that only needs to be moved to `path`; it is removed if that does not happen."""
        path.parent.mkdir(exist_ok=True)
        new = self.new_file()
        try:
            with new.open("w") as file:
                file.write(json.dumps(content))
                file.flush()
                os.fsync(file.fileno())
            yield new
        finally:
            new.unlink(missing_ok=True)

    def folder(self, bucket: str) -> Path:
        """The folder of a bucket, which need not exist."""
        return self.root / check_bucket_name(bucket)

    @contextlib.contextmanager
    def locked(self, bucket: str) -> Iterator[None]:
        """Keeps every other thread and process from changing the bucket."""
        # Each call opens the file anew, so the lock holds between threads as it does between processes.
        with (self.own / "locks" / check_bucket_name(bucket)).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def names(self) -> list[str]:
        """The buckets' names, sorted."""
        found = []
        for entry in os.scandir(self.root):
            with contextlib.suppress(HttpError):
                if entry.is_dir():
                    found.append(check_bucket_name(entry.name))
        return sorted(found)

    def get(self, bucket: str) -> dict:
        """The bucket's resource."""
        folder = self.folder(bucket)
        if not folder.is_dir():
            raise HttpError(404, f"The specified bucket does not exist: {bucket}.", "notFound")
        return read_json(self._file(bucket)) or _defaults(bucket, timestamp(folder.stat().st_ctime))

    def create(self, fields: dict) -> dict:
        """Makes a bucket from the resource that a client sent."""
        bucket = check_bucket_name(str(fields.get("name", "")))
        _check_types(fields)
        now = timestamp()
        with self.locked(bucket):
            if self.folder(bucket).exists():
                raise HttpError(409, f"The bucket {bucket} already exists, and you own it.", "conflict")
            self.folder(bucket).mkdir()
            resource = _defaults(bucket, now)
            try:
                return self._write(bucket, resource | {k: v for k, v in fields.items() if k not in READ_ONLY})
            except OSError:
                self.folder(bucket).rmdir()
                raise

    def delete(self, bucket: str) -> None:
        """Removes an empty bucket."""
        with self.locked(bucket):
            self.get(bucket)
            if any((self.own / "objects" / bucket).glob("*")) or not _remove_empty(self.folder(bucket)):
                raise HttpError(409, f"The bucket you tried to delete is not empty: {bucket}.", "conflict")
            for leftover in (self.own / "metadata" / bucket).glob("*"):
                leftover.unlink()
            _remove_empty(self.own / "metadata" / bucket)
            _remove_empty(self.own / "objects" / bucket)
            self._file(bucket).unlink(missing_ok=True)

    def _file(self, bucket: str) -> Path:
        return self.own / "buckets" / f"{bucket}.json"

    def _write(self, bucket: str, resource: dict) -> dict:
        resource["location"] = str(resource["location"]).upper()
        places = (*MULTI_REGIONS, *DUAL_REGIONS)
        if resource["location"] not in places and resource["location"].lower() not in REGIONS:
            raise HttpError(
                400, f"The specified location constraint is not valid: {resource['location']}.", "invalid"
            )
        if resource["location"] in DUAL_REGIONS:
            resource["locationType"] = "dual-region"
        else:
            resource["locationType"] = "multi-region" if resource["location"] in MULTI_REGIONS else "region"
        if not says_nothing(resource.get("softDeletePolicy")):
            resource["softDeletePolicy"].setdefault("effectiveTime", timestamp())
        resource["etag"] = etag(resource["metageneration"])
        self.write_json(self._file(bucket), resource)
        return resource


def _defaults(bucket: str, created: str) -> dict:
    return {
        "kind": "storage#bucket",
        "id": bucket,
        "name": bucket,
        "selfLink": f"https://www.googleapis.com/storage/v1/b/{bucket}",
        "projectNumber": PROJECT_NUMBER,
        "location": "US",
        "locationType": "multi-region",
        "storageClass": "STANDARD",
        "metageneration": "1",
        "etag": etag("1"),
        "timeCreated": created,
        "updated": created,
        "iamConfiguration": {
            "uniformBucketLevelAccess": {"enabled": False},
            "publicAccessPrevention": "inherited",
        },
        "softDeletePolicy": {"retentionDurationSeconds": "604800"},
    }


def _check_types(fields: dict) -> None:
    for name, value in fields.items():
        if name in READ_ONLY or value is None or isinstance(value, bool):
            continue
        wanted = str if name in TEXTS else dict
        is_wrong = not isinstance(value, wanted)
        if is_wrong or (name == "labels" and not all(isinstance(label, str) for label in value.values())):
            raise HttpError(400, f"Invalid value for {name}: {str(value)[:100]!r}.", "invalid")
    prevention = (fields.get("iamConfiguration") or {}).get("publicAccessPrevention")
    if prevention not in ACCESS_PREVENTIONS:
        raise HttpError(400, f"Invalid value for publicAccessPrevention: {prevention!r}.", "invalid")


def _remove_empty(folder: Path) -> bool:
    """Removes a folder that holds only folders; if it holds a file, keeps every file and returns False."""
    if any(files for _, _, files in os.walk(folder)):
        return False
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:  # a file, or a link, was put there by hand
            return False
    return True


def timestamp(seconds: float | None = None) -> str:
    """A time, by default now, as Google's APIs write it."""
    now = datetime.datetime.now(datetime.UTC)
    moment = now if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def etag(version: str) -> str:
    """An entity tag, which tells versions of a resource apart."""
    return base64.b64encode(version.encode()).decode()


def read_json(path: Path) -> dict | None:
    """The content of a file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
