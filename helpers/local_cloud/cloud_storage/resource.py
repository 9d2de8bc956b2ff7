"""An object's resource: what the JSON API says of it
(https://cloud.google.com/storage/docs/json_api/v1/objects)."""

from urllib.parse import quote

from ..front.http_server import HttpError
from .bucket_store import etag, timestamp
from .partial_object import Checksums

API = "https://storage.googleapis.com"
DEFAULT_CONTENT_TYPE = "application/octet-stream"
# What a client may set; everything else is the store's.
TEXT_FIELDS = (
    "contentType",
    "contentEncoding",
    "contentDisposition",
    "contentLanguage",
    "cacheControl",
    "customTime",
    "storageClass",
)


def new(bucket: str, name: str, generation: int, content: Checksums, own: dict) -> dict:
    """The resource of a new generation of an object; own: the client's fields, from `writable`.

    An object that is composed of others has no content type unless it is given one."""
    now = timestamp()
    path = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
    resource = {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "selfLink": f"https://www.googleapis.com{path}",
        "mediaLink": f"{API}/download{path}?generation={generation}&alt=media",
        "name": name,
        "bucket": bucket,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(content.size),
        "crc32c": content.crc32c,
        "etag": etag(f"{generation}/1"),
        "timeCreated": now,
        "timeFinalized": now,
        "timeStorageClassUpdated": now,
        "updated": now,
        "contentType": DEFAULT_CONTENT_TYPE,
        "storageClass": "STANDARD",
    }
    if content.md5:
        resource["md5Hash"] = content.md5
    if content.components:
        resource["componentCount"] = content.components
        del resource["contentType"]
    return resource | own


def writable(fields: dict) -> dict:
    """Those of the fields sent by a client that it may set.

    Raises HttpError 400 for a wrong value.
    """
    own = {}
    for name in TEXT_FIELDS:
        if (value := fields.get(name)) is not None:
            own[name] = _header_value(name, value)
    metadata = fields.get("metadata")
    if metadata is not None:
        if not isinstance(metadata, dict):
            raise HttpError(400, "Invalid value for metadata: not an object.", "invalid")
        kept = {key: _header_value(key, value) for key, value in metadata.items() if value is not None}
        own |= {"metadata": kept} if kept else {}
    return own


def _header_value(name: str, value: object) -> str:
    """The value, checked because it will be sent in a header of its own."""
    if not isinstance(value, str) or any(character in value + name for character in "\r\n\0"):
        raise HttpError(400, f"Invalid value for {name[:100]!r}: not a single line of text.", "invalid")
    return value
