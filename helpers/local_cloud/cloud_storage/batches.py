"""Batches: up to a hundred calls of the JSON API in one request
(https://cloud.google.com/storage/docs/batch)."""

import io
import uuid
from email.message import Message
from email.parser import BytesParser

from ..front.http_server import HttpError, Request, Response, Router, reason_phrase

MAX_CALLS = 100
MAX_BATCH_BYTES = 10 << 20


class Batches:
    """Takes a batch apart and lets a router answer each of its calls."""

    def __init__(self, router: Router):
        self._router = router

    def routes(self, router: Router) -> None:
        """Adds the batch path."""
        router.route("POST", "/batch/storage/v1")(self._batch)

    def _batch(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers.get('Content-Type')}\r\n\r\n".encode()
        message = BytesParser().parsebytes(head + request.read(MAX_BATCH_BYTES))
        if not message.is_multipart():
            raise HttpError(400, "A batch must be multipart/mixed.", "badRequest")
        calls = message.get_payload()
        if len(calls) > MAX_CALLS:
            raise HttpError(400, f"A batch has at most {MAX_CALLS} calls, not {len(calls)}.", "badRequest")
        boundary = f"batch_{uuid.uuid4().hex}"
        parts = [self._answer(call, request.host) for call in calls]
        body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts)
        return Response(
            body + f"--{boundary}--\r\n".encode(), content_type=f"multipart/mixed; boundary={boundary}"
        )

    def _answer(self, call: Message, host: str) -> bytes:
        response = self._router.answer(_inner_request(call, host))
        if response.file:
            response.file.close()
            raise HttpError(400, "A batch cannot download objects.", "badRequest")
        content_id = call.get("Content-ID", "").strip("<>")
        head = (
            f"Content-Type: application/http\r\nContent-ID: <response-{content_id}>\r\n\r\n"
            f"HTTP/1.1 {response.status} {reason_phrase(response.status)}\r\n"
            f"Content-Type: {response.content_type}\r\nContent-Length: {response.length}\r\n\r\n"
        )
        return head.encode() + response.body


def _inner_request(call: Message, host: str) -> Request:
    """The request in one part of a batch."""
    text = call.get_payload(decode=True) or b""
    line, _, rest = text.replace(b"\r\n", b"\n").lstrip(b"\n").partition(b"\n")
    head, _, body = rest.partition(b"\n\n")
    words = line.decode("latin-1").split(" ")
    if len(words) != 3:
        raise HttpError(400, f"Not a request: {line[:100]!r}", "badRequest")
    headers = BytesParser().parsebytes(head + b"\n\n")
    body = body.strip()
    for name, value in (("Host", host), ("Content-Length", str(len(body)))):
        del headers[name]
        headers[name] = value
    return Request(words[0], words[1], headers, io.BytesIO(body))
