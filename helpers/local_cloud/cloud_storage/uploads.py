"""The JSON API's three ways to upload: media, multipart and resumable.

https://cloud.google.com/storage/docs/uploads-downloads
"""

import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..front.http_server import HttpError, Request, Response, Router
from ..front.permissions import Permissions
from .fields import body, check_body, check_overwriting, checked
from .multipart import related_parts
from .names import check_object_name
from .object_store import ObjectStore
from .partial_object import PartialObject
from .preconditions import Preconditions

MAX_SESSIONS = 1000  # the oldest makes room for a new one


@dataclass
class Session:
    """A resumable upload. `resource` is the finished object's, for a client that missed the final answer."""

    bucket: str
    name: str
    fields: dict
    conditions: Preconditions
    content: PartialObject
    resource: dict | None = None
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Uploads:
    """Serves uploads into a store.

    Sessions live in this process; what they hold becomes an object only at the end.
    """

    def __init__(self, store: ObjectStore, permissions: Permissions):
        self._store = store
        self._permissions = permissions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def routes(self, router: Router) -> None:
        """Adds the upload paths."""
        for path in ("/upload/storage/v1/b/{bucket}/o", "/resumable/upload/storage/v1/b/{bucket}/o"):
            router.route("POST PUT DELETE", path)(checked("objects.insert", self._upload, self._permissions))

    def _upload(self, request: Request, bucket: str) -> dict | Response:
        if session_id := request.query.get("upload_id"):
            return self._continue(request, bucket, session_id)
        kind = request.query.get("uploadType")
        if request.method != "POST" or kind not in ("media", "multipart", "resumable"):
            raise HttpError(400, f"Invalid upload: {request.method} with uploadType={kind}.", "invalid")
        self._store.buckets.get(bucket)
        if kind == "resumable":
            return self._begin(request, bucket)
        if kind == "media":
            fields: dict = {"contentType": request.headers.get("Content-Type")}
            chunks = request.chunks()
        else:
            fields, content_type, chunks = related_parts(request)
            check_body(fields, "objects.insert")
            fields.setdefault("contentType", content_type)
        check_overwriting(request, self._store.find(bucket, _name(request, fields)), self._permissions)
        content = self._store.partial()
        try:
            content.append(chunks)
            return self._finish(bucket, _name(request, fields), content, _described(request, fields), request)
        finally:
            content.discard()

    def _finish(self, bucket: str, name: str, content: PartialObject, fields: dict, request: Request) -> dict:
        _check(content, fields, request)
        return self._store.put(bucket, name, content, fields, Preconditions.of(request))

    # Resumable

    def _begin(self, request: Request, bucket: str) -> Response:
        fields = body(request, "objects.insert")
        fields.setdefault("contentType", request.headers.get("X-Upload-Content-Type"))
        name = _name(request, fields)
        conditions = Preconditions.of(request)
        if conditions != Preconditions():
            conditions.check(self._store.find(bucket, name))
        check_overwriting(request, self._store.find(bucket, name), self._permissions)
        session = Session(bucket, name, _described(request, fields), conditions, self._store.partial())
        session_id = uuid.uuid4().hex
        with self._lock:
            self._sessions[session_id] = session
            oldest = self._sessions.popitem(last=False)[1] if len(self._sessions) > MAX_SESSIONS else None
        if oldest:
            with oldest.lock:
                self._cancel(oldest)
        location = f"https://{request.host}{request.path}?uploadType=resumable&upload_id={session_id}"
        return Response(headers={"Location": location, "X-GUploader-UploadID": session_id})

    def _continue(self, request: Request, bucket: str, session_id: str) -> dict | Response:
        session = self._sessions.get(session_id)
        if session is None or session.bucket != bucket:
            raise HttpError(
                404, "No such upload session: it may belong to a local cloud that has ended.", "notFound"
            )
        with session.lock:
            if session.cancelled:
                raise HttpError(410, "The upload session was cancelled.", "gone")
            if request.method == "DELETE":
                return self._cancel(session)
            if session.resource:
                return session.resource
            total = _receive(request, session.content)
            if total is None or session.content.size < total:
                kept = session.content.size
                return Response(b"", 308, {"Range": f"bytes=0-{kept - 1}"} if kept else {})
            if session.content.size > total:
                raise HttpError(
                    400, f"{session.content.size} bytes arrived, but {total} were announced.", "invalid"
                )
            return self._complete(request, session)

    def _complete(self, request: Request, session: Session) -> dict:
        try:
            _check(session.content, session.fields, request)
            session.resource = self._store.put(
                session.bucket, session.name, session.content, session.fields, session.conditions
            )
        except HttpError:
            self._cancel(session)
            raise
        return session.resource

    @staticmethod
    def _cancel(session: Session) -> Response:
        session.cancelled = session.resource is None
        session.content.discard()
        return Response(b"", 499)


def _receive(request: Request, content: PartialObject) -> int | None:
    """Adds what a request brings, and returns the size that the whole will have; None if it is unknown."""
    header = request.headers.get("Content-Range")
    if header is None:  # the body is the whole
        content.append(_unknown(request.chunks(), content.size))
        return content.size
    match = re.fullmatch(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)", header.strip())
    if not match:
        raise HttpError(400, f"Invalid Content-Range: {header}", "invalid")
    first, last, total = (None if text in (None, "*") else int(text) for text in match.groups())
    if first is not None:
        if first > content.size:
            raise HttpError(400, f"The next byte is number {content.size}, not {first}.", "invalid")
        content.append(_unknown(_at_most(request.chunks(), last - first + 1), content.size - first))
    return total


def _unknown(chunks: Iterator[bytes], known: int) -> Iterator[bytes]:
    """The bytes after the first `known`, which arrived with an earlier request."""
    for chunk in chunks:
        if known < len(chunk):
            yield chunk[known:]
        known = max(0, known - len(chunk))


def _at_most(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    for chunk in chunks:
        size -= len(chunk)
        if size < 0:
            raise HttpError(400, "The body is longer than its Content-Range says.", "invalid")
        yield chunk


def _name(request: Request, fields: dict) -> str:
    return check_object_name(fields.get("name") or request.query.get("name"))


def _described(request: Request, fields: dict) -> dict:
    """The fields, with the encoding that the query names."""
    fields = dict(fields)
    if encoding := request.query.get("contentEncoding"):
        fields.setdefault("contentEncoding", encoding)
    return fields


def _check(content: PartialObject, fields: dict, request: Request) -> None:
    """Raises HttpError 400 if what arrived has another checksum than the fields or the headers say."""
    content.check(fields.get("crc32c"), fields.get("md5Hash"))
    sent = sent_hashes(request)
    content.check(sent.get("crc32c"), sent.get("md5"))


def sent_hashes(request: Request) -> dict[str, str]:
    """The checksums of the X-Goog-Hash headers, "crc32c" and "md5", and of Content-MD5."""
    sent = {"md5": request.headers["Content-MD5"]} if request.headers.get("Content-MD5") else {}
    for header in request.headers.get_all("X-Goog-Hash", []):
        for item in header.split(","):
            name, _, value = item.strip().partition("=")
            if name in ("crc32c", "md5"):
                sent[name] = value
    return sent
