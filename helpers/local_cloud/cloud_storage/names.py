"""What Cloud Storage allows as a name, and where an object of that name lies in a folder.

Rules: https://cloud.google.com/storage/docs/buckets#naming and
https://cloud.google.com/storage/docs/objects#naming
"""

import hashlib
import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from ..front.http_server import HttpError

MAX_NAME_BYTES = 1024
# Limits of common file systems; macOS has the shortest paths.
MAX_SEGMENT_BYTES = 255
MAX_PATH_BYTES = 1000
HASHED = "%sha256-"  # no percent-encoded name begins like this


def check_bucket_name(name: str) -> str:
    """The name; raises HttpError 400 if Cloud Storage would not allow it."""
    parts = name.split(".")
    length = 3 <= len(name) <= (63 if len(parts) == 1 else 222) and all(len(part) <= 63 for part in parts)
    characters = re.fullmatch(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", name, re.ASCII) and ".." not in name
    reserved = name.startswith("goog") or "google" in name or "g00gle" in name
    if not length or not characters or reserved or _is_ip_address(name):
        raise HttpError(
            400,
            f"Invalid bucket name: '{name}'. Use 3 to 63 lower-case letters, digits, '-', '_' and '.', "
            "with a letter or digit at both ends, and not the word google.",
            "invalid",
        )
    return name


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def check_object_name(name: object) -> str:
    """The name; raises HttpError 400 if Cloud Storage would not allow it."""
    if not name or not isinstance(name, str):
        raise HttpError(400, "Required: the object's name.", "required")
    if not is_object_name(name):
        raise HttpError(
            400,
            f"Invalid object name: {name[:100]!r}. Use 1 to {MAX_NAME_BYTES} bytes of UTF-8 without line "
            "breaks, and neither '.' nor '..'.",
            "invalid",
        )
    return name


def is_object_name(name: str) -> bool:
    """Whether an object may have this name."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    reserved = name in (".", "..") or name.startswith(".well-known/acme-challenge/")
    return 0 < size <= MAX_NAME_BYTES and not reserved and "\n" not in name and "\r" not in name


def plain_path(bucket_folder: Path, name: str) -> Path | None:
    """The path below the bucket's folder that reads like the object's name; None if no path can."""
    segments = name.split("/")
    if "\0" in name or any(segment in ("", ".", "..") for segment in segments):
        return None
    if any(len(os.fsencode(segment)) > MAX_SEGMENT_BYTES for segment in segments):
        return None
    path = bucket_folder / name
    return path if len(os.fsencode(path)) <= MAX_PATH_BYTES else None


def file_of(storage_root: Path, uri: str) -> Path | None:
    """The file of an object, gs://BUCKET/NAME; None if there is none, or its name reads like no path."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    try:
        path = plain_path(storage_root / check_bucket_name(bucket), name)
    except HttpError:
        return None
    return path if uri.startswith("gs://") and path and path.is_file() else None


def file_name(name: str) -> str:
    """A single file name for any object's name, readable if it is short enough."""
    quoted = quote(name, safe=" ")
    # A leading dot would make a hidden file, or name the folder itself.
    quoted = "%2E" + quoted[1:] if quoted.startswith(".") else quoted
    if len(quoted) <= MAX_SEGMENT_BYTES:
        return quoted
    return HASHED + hashlib.sha256(name.encode()).hexdigest()


def name_of_file(file: str) -> str | None:
    """The object's name from its file name; None when that is a hash."""
    return None if file.startswith(HASHED) else unquote(file)
