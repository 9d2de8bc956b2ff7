"""An object's bytes, whole or a range."""

import re

from ..front.http_server import HttpError, Request, Response
from .object_store import ObjectStore
from .preconditions import Preconditions
from .resource import DEFAULT_CONTENT_TYPE


def media(
    store: ObjectStore, request: Request, bucket: str, name: str, conditions: Preconditions
) -> Response:
    """The response to a download.

    Objects are sent as they are stored: what was stored compressed stays compressed.
    """
    resource, file = store.open(bucket, name)
    try:
        check_generation(resource, request.query.get("generation"))
        conditions.check(resource, reading=True)
        size, content_type = int(resource["size"]), resource.get("contentType", DEFAULT_CONTENT_TYPE)
        headers = _headers(resource)
        start, end = _range(request.headers.get("Range", ""), size)
        if start is None:
            return Response(b"", 200, headers, content_type, file, size)
        if start >= size:
            file.close()
            return Response(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
        file.seek(start)
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Response(b"", 206, headers, content_type, file, end - start + 1)
    except BaseException:
        file.close()
        raise


def _headers(resource: dict) -> dict[str, str]:
    hashes = [f"crc32c={resource['crc32c']}"]
    if "md5Hash" in resource:
        hashes.append(f"md5={resource['md5Hash']}")
    headers = {
        "X-Goog-Hash": ",".join(hashes),
        "X-Goog-Generation": resource["generation"],
        "X-Goog-Metageneration": resource["metageneration"],
        "X-Goog-Storage-Class": resource["storageClass"],
        "X-Goog-Stored-Content-Length": resource["size"],
        "X-Goog-Stored-Content-Encoding": resource.get("contentEncoding", "identity"),
        "ETag": resource["etag"],
        "Accept-Ranges": "bytes",
        "Cache-Control": resource.get("cacheControl", "no-cache"),
    }
    for header, field in (
        ("Content-Encoding", "contentEncoding"),
        ("Content-Disposition", "contentDisposition"),
        ("Content-Language", "contentLanguage"),
    ):
        if field in resource:
            headers[header] = resource[field]
    return headers | {f"X-Goog-Meta-{key}": value for key, value in resource.get("metadata", {}).items()}


def _range(header: str, size: int) -> tuple[int | None, int]:
    """The first and last byte of a Range header; (None, 0) if it asks for the whole, or makes no sense."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip())
    if not match or match.groups() == ("", ""):
        return None, 0
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)) if int(last) else size, size - 1
    if last and int(last) < int(first):
        return None, 0
    return int(first), min(int(last), size - 1) if last else size - 1


def check_generation(resource: dict, generation: object) -> None:
    """Raises HttpError 404 if a generation other than the live one is asked for: no other is kept."""
    if generation is not None and str(generation) != resource["generation"]:
        name = f"{resource['bucket']}/{resource['name']}"
        raise HttpError(404, f"No such object: {name}#{generation}", "notFound")
