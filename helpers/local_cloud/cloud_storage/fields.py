"""Which parameters, headers and fields of Cloud Storage's requests are honoured here, and which have no
effect; every other is refused by name."""

from ..front.fields import REFUSED, Fields, fields, refused_in_json, says_nothing
from ..front.http_server import Handler, HttpError, Request, Response

# Whole resources are sent, whatever parts of them are asked for, and nothing is billed or authorized. There
# are no ACLs, which a full projection would show: that one is refused.
_COMMON_IDLE = (
    "fields projection prettyPrint quotaUser userIp key userProject provisionalUserProject access_token "
    "oauth_token $.xgafv upload_protocol"
)
_CONDITIONS = "ifGenerationMatch ifGenerationNotMatch ifMetagenerationMatch ifMetagenerationNotMatch"
_SOURCE_CONDITIONS = (
    "ifSourceGenerationMatch ifSourceGenerationNotMatch ifSourceMetagenerationMatch "
    "ifSourceMetagenerationNotMatch"
)
_BUCKET_CONDITIONS = "ifMetagenerationMatch ifMetagenerationNotMatch"
_PAGES = "pageToken maxResults"


def _query(honoured: str, idle: str = "") -> Fields:
    return fields(f"alt {honoured}", f"{_COMMON_IDLE} {idle}")


QUERIES = {
    "buckets.list": _query(f"project prefix {_PAGES}"),
    "buckets.insert": _query("project"),
    "buckets.get": _query(_BUCKET_CONDITIONS),
    "buckets.patch": _query(_BUCKET_CONDITIONS),
    "buckets.delete": _query(_BUCKET_CONDITIONS),
    "buckets.getIamPolicy": _query("", "optionsRequestedPolicyVersion"),
    "buckets.setIamPolicy": _query(""),
    "buckets.testIamPermissions": _query("permissions"),
    # Nothing is versioned, so all versions are the live ones.
    "objects.list": _query(
        f"prefix delimiter startOffset endOffset matchGlob includeTrailingDelimiter versions {_PAGES}"
    ),
    "objects.get": _query(f"generation {_CONDITIONS}"),
    "objects.patch": _query(f"generation {_CONDITIONS}"),
    "objects.delete": _query(f"generation {_CONDITIONS}"),
    "objects.insert": _query(f"uploadType name upload_id contentEncoding {_CONDITIONS}"),
    "objects.compose": _query(_CONDITIONS),
    # A rewrite is done in one call.
    "objects.rewrite": _query(
        f"sourceGeneration {_CONDITIONS} {_SOURCE_CONDITIONS}", "maxBytesRewrittenPerCall rewriteToken"
    ),
    "objects.copy": _query(f"sourceGeneration {_CONDITIONS} {_SOURCE_CONDITIONS}"),
    "projects.serviceAccount.get": _query(""),
    "batch": _query(""),
    "xml": fields("uploads uploadId partNumber generation", "userProject"),
}

# What the service itself sets: clients send it back with the rest of a resource.
_BUCKET_READ_ONLY = (
    "kind id selfLink projectNumber locationType metageneration etag timeCreated updated owner generation "
    "satisfiesPZS satisfiesPZI softDeleteTime hardDeleteTime"
)
BUCKET = fields(
    "name labels location",
    # Stored. Classes, lifecycles, deletion, logs, browsers' and websites' settings and permissions change
    # nothing here, and nothing is billed.
    f"{_BUCKET_READ_ONLY} storageClass lifecycle softDeletePolicy logging cors website iamConfiguration "
    "billing rpo autoclass customPlacementConfig",
)

_OBJECT_READ_ONLY = (
    "kind id selfLink mediaLink bucket generation metageneration size etag timeCreated timeFinalized "
    "timeDeleted timeStorageClassUpdated updated componentCount owner retentionExpirationTime softDeleteTime "
    "hardDeleteTime restoreToken customerEncryption"
)
OBJECT = fields(
    "name contentType contentEncoding contentDisposition contentLanguage cacheControl customTime metadata "
    "crc32c md5Hash",
    f"{_OBJECT_READ_ONLY} storageClass",
)
COMPOSE = fields(
    "sourceObjects.name sourceObjects.generation sourceObjects.objectPreconditions.ifGenerationMatch "
    + " ".join(f"destination.{name}" for name in sorted(OBJECT.honoured)),
    "kind " + " ".join(f"destination.{name}" for name in sorted(OBJECT.without_effect)),
)
POLICY = fields("bindings etag version", "kind resourceId")

BODIES = {
    "buckets.insert": BUCKET,
    "buckets.patch": BUCKET,
    "buckets.setIamPolicy": POLICY,
    "objects.patch": OBJECT,
    "objects.insert": OBJECT,
    "objects.compose": COMPOSE,
    "objects.rewrite": OBJECT,
    "objects.copy": OBJECT,
}

_SIGNATURE = ("GoogleAccessId", "Expires", "Signature")  # of a signed URL: not checked

# Of the headers that mean something to Cloud Storage.
_HEADER_PREFIXES = ("x-goog-", "x-amz-")
HEADERS = fields(
    "x-goog-hash x-goog-if-generation-match x-goog-if-metageneration-match x-goog-custom-time",
    "x-goog-api-client x-goog-user-project x-goog-request-params x-goog-gcs-idempotency-token x-goog-date "
    "x-goog-request-reason x-goog-storage-class "
    "x-goog-api-version x-goog-resumable x-goog-allowed-resources",
)
_FREE_HEADERS = ("x-goog-meta-", "x-goog-custom-audit-")  # metadata, and notes for a log that is not here


def checked(call: str, handler: Handler) -> Handler:
    """The handler of a call, which first refuses what it would otherwise ignore."""

    def answer(request: Request, **names: str) -> Response | dict | None:
        check_query(request, QUERIES[call], call)
        check_headers(request)
        return handler(request, **names)

    return answer


def check_query(request: Request, table: Fields, call: str) -> None:
    """Raises HttpError 501 for a parameter that says something and would be ignored."""
    for name, value in request.query.items():
        is_idle = name in _SIGNATURE or name.startswith("X-Goog-") or (value != "" and says_nothing(value))
        # Google's client asks for a full projection with every change, and looks at it only in reads.
        asks_for_acl = (name, value) == ("projection", "full") and call.endswith((".get", ".list"))
        if (table.of(name) == REFUSED and not is_idle) or asks_for_acl:
            raise _refused(f"The parameter {name} of {call}")


def check_headers(request: Request) -> None:
    """Raises HttpError 501 for a header of Cloud Storage's own that would be ignored: an encryption key, say,
    without which the object would be readable here."""
    for header in request.headers:
        name = header.lower()
        is_own = name.startswith(_HEADER_PREFIXES) and not name.startswith(_FREE_HEADERS)
        if is_own and HEADERS.of(name) == REFUSED:
            raise _refused(f"The header {header}")


def body(request: Request, call: str) -> dict:
    """The body of a call; raises HttpError 501 for a field of it that would be ignored."""
    return check_body(request.json(), call)


def check_body(content: dict, call: str) -> dict:
    """The content; raises HttpError 501 for a field of it that would be ignored."""
    if path := refused_in_json(content, BODIES[call]):
        raise _refused(f"The field {path} of {call}")
    return content


def _refused(what: str) -> HttpError:
    return HttpError(501, f"{what} is not imitated by the local cloud.", "notImplemented")
