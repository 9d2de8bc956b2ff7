"""The body of a multipart upload, read as it arrives: a part of JSON, then a part of any size."""

import json
import re
from collections.abc import Iterator
from email.parser import BytesParser

from ..front.http_server import HttpError, Request

MAX_METADATA_BYTES = 1 << 20


def related_parts(request: Request) -> tuple[dict, str | None, Iterator[bytes]]:
    """The JSON part, and the other part's content type and content.

    Raises HttpError 400, also from the iterator.
    """
    boundary = request.headers.get_boundary()
    if not boundary:
        raise _invalid("its Content-Type names no boundary")
    mark = b"--" + boundary.encode()
    chunks = request.chunks()
    buffer = b""
    # Lines end in CR LF, but from some clients in LF alone.
    line = re.escape(mark) + rb"(?P<eol>\r?\n)"
    headers = rb"(?:[^\r\n]+\r?\n)*"
    head = re.compile(
        line + headers + rb"\r?\n(?P<json>.*?)(?P=eol)" + re.escape(mark) + rb"(?P=eol)"
        rb"(?P<headers>" + headers + rb")\r?\n",
        re.DOTALL,
    )
    while not (match := head.search(buffer)):
        chunk = next(chunks, b"")
        if not chunk or len(buffer) > MAX_METADATA_BYTES:
            raise _invalid("it does not begin with two parts")
        buffer += chunk
    try:
        fields = json.loads(match["json"])
    except ValueError as error:
        raise _invalid(f"its first part is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _invalid("its first part is not a JSON object")
    content_type = BytesParser().parsebytes(match["headers"] + b"\n")["Content-Type"]
    return fields, content_type, _until(match["eol"] + mark + b"--", buffer[match.end() :], chunks)


def _until(end: bytes, buffer: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes before the last `end`, which a line break may follow."""
    held = len(end) + 4
    for chunk in chunks:
        buffer += chunk
        if len(buffer) > held:
            yield buffer[:-held]
            buffer = buffer[-held:]
    at = buffer.rfind(end)
    if at < 0:
        raise _invalid("its closing boundary is missing")
    yield buffer[:at]


def _invalid(reason: str) -> HttpError:
    return HttpError(400, f"Invalid multipart upload: {reason}.", "invalid")
