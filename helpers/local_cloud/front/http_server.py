"""A small HTTP/1.1 server for REST services: routes, requests, responses, and errors in Google's format.

It owns no listening socket. The proxy hands it connections that are already accepted (and, for HTTPS, already
decrypted), each in a thread of its own.
"""

import contextlib
import errno
import functools
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 600  # a kept-alive connection that stays silent for this long is closed
MAX_JSON_BYTES = 64 << 20
MAX_BODY_BYTES = 5 << 40  # the largest object: https://cloud.google.com/storage/quotas#objects

# google.rpc.Code by HTTP status: https://cloud.google.com/apis/design/errors#handling_errors
STATUS_NAMES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
}


class HttpError(Exception):
    """What a handler raises to answer with an error: HTTP status, message, and a one-word reason."""

    def __init__(self, status: int, message: str, reason: str = ""):
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason


class MalformedError(HttpError):
    """A request that does not say where it ends: after the answer, the connection is of no more use."""

    def __init__(self, message: str):
        super().__init__(400, message, "badRequest")


class IncompleteBodyError(ConnectionError):
    """The client went away before the whole body had arrived."""


@dataclass
class Response:
    """An answer.

    `body` is bytes, or anything JSON can hold; or `length` bytes of `file` are sent, from its position.
    """

    body: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json; charset=UTF-8"
    file: BinaryIO | None = None
    length: int = 0

    def __post_init__(self):
        if self.file is None:
            if not isinstance(self.body, bytes):
                self.body = json.dumps(self.body).encode()
            self.length = len(self.body)


class Request:
    """A request whose body is still in the connection.

    `path` is as sent, percent-encoded; `query` is decoded.
    """

    def __init__(self, method: str, target: str, headers: Message, body: BinaryIO):
        try:
            url = urlsplit(target)
            self._query = parse_qsl(url.query, keep_blank_values=True, errors="strict")
        except ValueError as error:
            raise MalformedError(f"The request's address cannot be read: {error}") from None
        self.method = method
        self.path = url.path
        self.query = dict(self._query)
        self.headers = headers
        self.host = (headers.get("Host") or "").partition(":")[0].lower()
        self._chunks = self._receive(body, self._length())

    def _length(self) -> int | None:
        """How many bytes the body has; None if it comes in chunks."""
        lengths = self.headers.get_all("Content-Length", [])
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            if len(set(lengths)) > 1:
                raise MalformedError("The request has several lengths.")
            return _natural(lengths[0], 10) if lengths else 0
        if lengths:
            raise MalformedError("The request has both a length and chunks.")
        return None

    def _receive(self, body: BinaryIO, length: int | None) -> Iterator[bytes]:
        if length is not None:
            yield from _read_exactly(body, length)
            return
        while size := _natural(body.readline(100).partition(b";")[0], 16):
            yield from _read_exactly(body, size)
            body.readline(100)
        while body.readline(65536).strip():  # trailers
            pass

    def query_values(self, name: str) -> list[str]:
        """Every value of a query parameter that may occur more than once."""
        return [value for key, value in self._query if key == name]

    def chunks(self) -> Iterator[bytes]:
        """The part of the body that has not been read yet, in pieces of at most 1 MiB.

        Raises IncompleteBodyError.
        """
        return self._chunks

    def read(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """The whole body; raises HttpError 413 if it is longer than `limit` bytes."""
        pieces, size = [], 0
        for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                raise HttpError(413, f"The request's body is longer than {limit} bytes.", "uploadTooLarge")
            pieces.append(chunk)
        return b"".join(pieces)

    def json(self) -> dict:
        """The body as a JSON object; an empty body is an empty object."""
        body = self.read()
        try:
            value = json.loads(body) if body else {}
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"The request's body is not JSON: {error}", "parseError") from None
        if not isinstance(value, dict):
            raise HttpError(400, "The request's body is not a JSON object.", "parseError")
        return value


def natural(text: str, name: str) -> int:
    """The whole number, from 0 to the largest of 64 bits, that a field holds; raises HttpError 400."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise HttpError(
            400, f"Invalid value for {name}: {text[:40]!r} is not a whole number.", "invalidParameter"
        )
    return int(text)


def _natural(digits: str | bytes, base: int) -> int:
    digits = digits.decode("latin-1") if isinstance(digits, bytes) else digits
    allowed = "0123456789" if base == 10 else "0123456789abcdefABCDEF"
    digits = digits.strip()
    if not digits and base == 16:
        raise IncompleteBodyError("the connection closed before the end of the body")
    if not digits or digits.strip(allowed) or len(digits) > 18:
        raise MalformedError(f"{digits[:40]!r} is not the length of anything.")
    if (value := int(digits, base)) > MAX_BODY_BYTES:
        raise MalformedError(f"A body of {value} bytes is longer than any object may be.")
    return value


def _read_exactly(body: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = body.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise IncompleteBodyError(f"the connection closed {size} bytes before the end of the body")
        size -= len(chunk)
        yield chunk


@functools.lru_cache(maxsize=1000)
def warn_once(message: str) -> None:
    """Logs a warning only once, however often clients retry what caused it."""
    log.warning("%s", message)


def reason_phrase(status: int) -> str:
    """The words after a status; 499, which Cloud Storage uses, has none in HTTP."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Client Closed Request"


def error_response(status: int, message: str, reason: str = "") -> Response:
    """An error as Google's REST services write it."""
    error = {
        "code": status,
        "message": message,
        "status": STATUS_NAMES.get(status, "UNKNOWN"),
        "errors": [{"message": message, "domain": "global", "reason": reason}],
    }
    return Response({"error": error}, status)


Handler = Callable[..., Response | dict | None]


class Router:
    """Finds the handler of a request by method, path and, where a route names one, host."""

    def __init__(self):
        self._routes: list[tuple[frozenset[str], re.Pattern, str | None, Handler]] = []

    def route(self, methods: str, path: str, host: str | None = None) -> Callable[[Handler], Handler]:
        """A decorator: the function answers `methods` ("GET POST") on `path`, on any host or on `host`.

        `{name}` in the path stands for one segment and `{name:path}` for one or more; the function gets
        them by name, percent-decoded, after the request. It returns a Response, a dict (sent
        as JSON) or None (204).
        """
        pattern = re.escape(path).replace(r"\{", "{").replace(r"\}", "}")
        pattern = re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", pattern)
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)

        def add(handler: Handler) -> Handler:
            self._routes.append((frozenset(methods.split()), re.compile(pattern), host, handler))
            return handler

        return add

    def answer(self, request: Request) -> Response:
        """The handler's response, or an error in Google's format.

        Raises nothing but IncompleteBodyError and MalformedError.
        """
        for methods, pattern, host, handler in self._routes:
            if request.method not in methods or (host and host != request.host):
                continue
            if match := pattern.fullmatch(request.path):
                return self._call(handler, request, match)
        call = f"{request.method} {request.host}{request.path}"
        warn_once(f"not imitated by the local cloud: {call}")
        return error_response(501, f"{call} is not imitated by the local cloud.", "notImplemented")

    @staticmethod
    def _call(handler: Handler, request: Request, match: re.Match) -> Response:
        try:
            names = {name: unquote(value, errors="strict") for name, value in match.groupdict().items()}
            answer = handler(request, **names)
        except MalformedError:
            raise
        except HttpError as error:
            return error_response(error.status, error.message, error.reason)
        except UnicodeDecodeError:
            return error_response(400, f"The path is not UTF-8: {request.path}", "invalid")
        except IncompleteBodyError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return error_response(507, f"The local cloud's disk is full: {error}", "insufficientStorage")
            log.exception("%s %s failed", request.method, request.path)
            return error_response(500, f"The local cloud failed: {error!r}", "internalError")
        if answer is None:
            return Response(status=204)
        return answer if isinstance(answer, Response) else Response(answer)


class _Connection(BaseHTTPRequestHandler):
    """One connection. `server` is the Router: the base class only keeps it."""

    protocol_version = "HTTP/1.1"
    server_version = "local-cloud"
    timeout = IDLE_SECONDS

    def _answer(self) -> None:
        # A client behind a proxy may send the body only once its headers are acknowledged, which the system
        # puts off for 40 ms.
        if hasattr(socket, "TCP_QUICKACK"):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        try:
            request = Request(self.command, self.path, self.headers, self.rfile)
            response = self.server.answer(request)
            with response.file or contextlib.nullcontext():
                for _ in request.chunks():  # what a handler left unread comes before the next request
                    pass
                self._send(response)
        except MalformedError as error:
            self.close_connection = True
            self._send(error_response(error.status, error.message, error.reason))
        except IncompleteBodyError:
            self.close_connection = True

    def _send(self, response: Response) -> None:
        self.send_response(response.status, reason_phrase(response.status))
        has_body = response.status not in (204, 304)
        if has_body:
            self.send_header("Content-Type", response.content_type)
            self.send_header("Content-Length", str(response.length))
        for name, value in response.headers.items():
            self.send_header(name, value.encode().decode("latin-1"))
        self.end_headers()
        if self.command == "HEAD" or not has_body:
            return
        if response.file is None:
            self.wfile.write(response.body)
            return
        left = response.length
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(left, 1))))
        while left:
            size = response.file.readinto(buffer[: min(left, len(buffer))])
            if not size:  # cut short by hand while it was read: the client must see that something is missing
                self.close_connection = True
                return
            self.wfile.write(buffer[:size])
            left -= size

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, template: str, *arguments) -> None:
        log.debug(template, *arguments)


def serve_connection(connection: socket.socket, router: Router) -> None:
    """Answers the requests of one accepted connection until either side closes it."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Connection(connection, connection.getpeername(), router)
    except OSError as error:  # the client went away: nobody is left to tell
        log.debug("connection lost: %s", error)
