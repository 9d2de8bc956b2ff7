"""The part of Cloud Storage's XML API that Google's clients use: objects, and multipart uploads of big ones.

https://cloud.google.com/storage/docs/xml-api/overview
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from ..front.http_server import HttpError, MalformedError, Request, Response, Router
from .downloads import media
from .fields import QUERIES, check_headers, check_query
from .names import check_object_name
from .object_store import ObjectStore
from .partial_object import PartialObject, read_chunks
from .preconditions import Preconditions
from .uploads import sent_hashes

HOST = "storage.googleapis.com"
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
# https://cloud.google.com/storage/quotas#requests
MIN_PART_BYTES = 5 << 20
MAX_PARTS = 10_000
MAX_UPLOADS = 1000
ERROR_CODES = {400: "InvalidArgument", 404: "NoSuchKey", 409: "Conflict", 412: "PreconditionFailed"}
ERROR_CODES |= {501: "NotImplemented"}


@dataclass
class Upload:
    """A multipart upload: its parts by number."""

    bucket: str
    name: str
    fields: dict
    parts: dict[int, PartialObject] = field(default_factory=dict)

    def discard(self) -> None:
        """Removes the parts."""
        for part in self.parts.values():
            part.discard()


class XmlApi:
    """Serves /BUCKET/OBJECT from a store. Uploads live in this process."""

    def __init__(self, store: ObjectStore):
        self._store = store
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def routes(self, router: Router) -> None:
        """Adds the paths, which match almost anything: call this last."""
        add = router.route
        path = "/{bucket}/{name:path}"
        for methods, handler in (
            ("GET HEAD", self._get),
            ("PUT", self._put),
            ("POST", self._post),
            ("DELETE", self._delete),
        ):
            add(methods, path, HOST)(_in_xml(handler))

    def _get(self, request: Request, bucket: str, name: str) -> Response:
        return media(self._store, request, bucket, name, Preconditions.of_headers(request.headers))

    def _put(self, request: Request, bucket: str, name: str) -> Response:
        if "uploadId" in request.query:
            return self._put_part(request, self._upload(request, bucket, name))
        content = self._store.partial()
        try:
            _receive(request, content)
            conditions = Preconditions.of_headers(request.headers)
            resource = self._store.put(bucket, name, content, _fields(request), conditions)
        finally:
            content.discard()
        return Response(headers=_hashes(content) | {"X-Goog-Generation": resource["generation"]})

    def _delete(self, request: Request, bucket: str, name: str) -> None:
        if "uploadId" in request.query:
            self._upload(request, bucket, name)
            with self._lock:
                self._uploads.pop(request.query["uploadId"]).discard()
            return
        self._store.delete(bucket, name, Preconditions.of_headers(request.headers))

    # Multipart uploads

    def _post(self, request: Request, bucket: str, name: str) -> Response:
        if "uploads" in request.query:
            return self._begin(request, bucket, name)
        if "uploadId" in request.query:
            return self._complete(request, self._upload(request, bucket, name))
        raise HttpError(501, "Form uploads are not imitated by the local cloud.")

    def _begin(self, request: Request, bucket: str, name: str) -> Response:
        self._store.buckets.get(bucket)
        upload_id = uuid.uuid4().hex
        with self._lock:
            if len(self._uploads) >= MAX_UPLOADS:
                raise HttpError(400, "Too many multipart uploads are open: complete or abort some.")
            self._uploads[upload_id] = Upload(bucket, check_object_name(name), _fields(request))
        return _xml("InitiateMultipartUploadResult", Bucket=bucket, Key=name, UploadId=upload_id)

    def _upload(self, request: Request, bucket: str, name: str) -> Upload:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None or (upload.bucket, upload.name) != (bucket, name):
            raise HttpError(404, "The requested upload was not found.", "NoSuchUpload")
        return upload

    def _put_part(self, request: Request, upload: Upload) -> Response:
        number = request.query.get("partNumber", "")
        if not number.isdecimal() or not 1 <= int(number) <= MAX_PARTS:
            raise HttpError(400, f"Part numbers are 1 to {MAX_PARTS}, not '{number}'.")
        part = self._store.partial()
        try:
            _receive(request, part)
        except BaseException:
            part.discard()
            raise
        with self._lock:
            if before := upload.parts.get(int(number)):
                before.discard()
            upload.parts[int(number)] = part
        return Response(headers=_hashes(part) | {"ETag": _etag(part)})

    def _complete(self, request: Request, upload: Upload) -> Response:
        parts = list(_named_parts(request, upload))
        whole = self._store.partial(components=len(parts))
        try:
            for part in parts:
                with part.path.open("rb") as file:
                    whole.append(read_chunks(file))
            conditions = Preconditions.of_headers(request.headers)
            resource = self._store.put(upload.bucket, upload.name, whole, upload.fields, conditions)
        finally:
            whole.discard()
        with self._lock:
            self._uploads.pop(request.query["uploadId"], None)
        upload.discard()
        response = _xml(
            "CompleteMultipartUploadResult",
            Location=f"https://{HOST}{request.path}",
            Bucket=upload.bucket,
            Key=upload.name,
            ETag=f'"{resource["etag"]}"',
        )
        response.headers |= _hashes(whole) | {"X-Goog-Generation": resource["generation"]}
        return response


def _named_parts(request: Request, upload: Upload) -> Iterator[PartialObject]:
    """The parts that the request's body names, checked against those that arrived."""
    try:
        named = [
            (int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "").strip())
            for part in ElementTree.fromstring(request.read(8 << 20)).findall("{*}Part")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise HttpError(400, f"The list of parts cannot be read: {error}", "MalformedXML") from None
    numbers = [number for number, _ in named]
    if not named or numbers != sorted(set(numbers)):
        raise HttpError(400, "Name one or more parts, in the order of their numbers.", "InvalidPartOrder")
    for number, etag in named:
        part = upload.parts.get(number)
        if part is None or etag.strip('"') != _etag(part).strip('"'):
            raise HttpError(400, f"Part {number} did not arrive, or its ETag differs.", "InvalidPart")
        if part.size < MIN_PART_BYTES and number != numbers[-1]:
            raise HttpError(400, f"Part {number} has fewer than {MIN_PART_BYTES} bytes.", "EntityTooSmall")
        yield part


def _receive(request: Request, content: PartialObject) -> None:
    content.append(request.chunks())
    sent = sent_hashes(request)
    try:
        content.check(sent.get("crc32c"), sent.get("md5"))
    except HttpError as error:
        raise HttpError(400, error.message, "BadDigest") from None


def _fields(request: Request) -> dict:
    headers = request.headers
    prefix = "x-goog-meta-"
    return {
        "contentType": headers.get("Content-Type"),
        "contentEncoding": headers.get("Content-Encoding"),
        "contentDisposition": headers.get("Content-Disposition"),
        "contentLanguage": headers.get("Content-Language"),
        "cacheControl": headers.get("Cache-Control"),
        "customTime": headers.get("x-goog-custom-time"),
        "storageClass": headers.get("x-goog-storage-class"),
        "metadata": {
            name[len(prefix) :]: value for name, value in headers.items() if name.lower().startswith(prefix)
        },
    }


def _hashes(content: PartialObject) -> dict[str, str]:
    return {"X-Goog-Hash": f"crc32c={content.crc32c}" + (f",md5={content.md5}" if content.md5 else "")}


def _etag(part: PartialObject) -> str:
    return f'"{part.md5_hex}"'


def _in_xml(handler: Callable[..., Response | None]) -> Callable[..., Response | None]:
    """The handler, with its errors in the XML API's format; an error's reason becomes its code."""

    def answer(request: Request, bucket: str, name: str) -> Response | None:
        try:
            check_query(request, QUERIES["xml"], "the XML API")
            check_headers(request)
            return handler(request, bucket, name)
        except MalformedError:
            raise
        except HttpError as error:
            default = "NoSuchBucket" if "bucket does not exist" in error.message else None
            code = default or (error.reason if error.reason[:1].isupper() else ERROR_CODES.get(error.status))
            return _xml("Error", error.status, Code=code or "Error", Message=error.message)

    return answer


def _xml(root: str, status: int = 200, /, **texts: str) -> Response:
    inside = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in texts.items())
    namespace = "" if root == "Error" else f' xmlns="{NAMESPACE}"'
    body = f"<?xml version='1.0' encoding='UTF-8'?><{root}{namespace}>{inside}</{root}>"
    return Response(body.encode(), status, content_type="application/xml; charset=UTF-8")
