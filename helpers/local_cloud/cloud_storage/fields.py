"""Which parameters, headers and fields of Cloud Storage's requests are honoured here, and which have no
effect; every other is refused by name."""

from ..front.fields import REFUSED, Fields, fields, refused_in_json, says_nothing
from ..front.http_server import Handler, HttpError, Request, Response
from ..front.permissions import Permissions, denied_text, email

# Whole resources are sent, whatever parts of them are asked for, and nothing is billed or authorized. There
# are no ACLs, which a full projection would show: that one is refused.
_COMMON_IDLE = (
    "fields projection prettyPrint quotaUser userIp key userProject provisionalUserProject access_token "
    "oauth_token $.xgafv upload_protocol"
)
_CONDITIONS = "ifGenerationMatch ifGenerationNotMatch"
_SOURCE_CONDITIONS = "ifSourceGenerationMatch ifSourceGenerationNotMatch"
_PAGES = "pageToken maxResults"


def _query(honoured: str, idle: str = "") -> Fields:
    return fields(f"alt {honoured}", f"{_COMMON_IDLE} {idle}")


QUERIES = {
    "buckets.list": _query(f"project prefix {_PAGES}"),
    "buckets.insert": _query("project"),
    "buckets.get": _query(""),
    "buckets.delete": _query(""),
    "buckets.testIamPermissions": _query("permissions"),
    # Nothing is versioned, so all versions are the live ones.
    "objects.list": _query(f"prefix delimiter startOffset endOffset {_PAGES}", "versions"),
    "objects.get": _query(f"generation {_CONDITIONS}"),
    "objects.delete": _query(f"generation {_CONDITIONS}"),
    "objects.insert": _query(f"uploadType name upload_id contentEncoding {_CONDITIONS}"),
    "objects.compose": _query(_CONDITIONS),
    "objects.copy": _query(f"sourceGeneration {_CONDITIONS} {_SOURCE_CONDITIONS}"),
    "batch": _query(""),
}

# What the service itself sets: clients send it back with the rest of a resource.
_BUCKET_READ_ONLY = (
    "kind id selfLink projectNumber locationType metageneration etag timeCreated updated owner generation "
    "satisfiesPZS satisfiesPZI softDeleteTime hardDeleteTime"
)
BUCKET = fields(
    "name labels location iamConfiguration softDeletePolicy",
    # Stored. Classes and lifecycles change nothing here.
    f"{_BUCKET_READ_ONLY} storageClass lifecycle",
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

BODIES = {
    "buckets.insert": BUCKET,
    "objects.insert": OBJECT,
    "objects.compose": COMPOSE,
    "objects.copy": OBJECT,
}

# Of the headers that mean something to Cloud Storage.
HEADERS = fields(
    "x-goog-hash",
    "x-goog-api-client x-goog-user-project x-goog-request-params x-goog-gcs-idempotency-token x-goog-date "
    "x-goog-request-reason "
    "x-goog-api-version x-goog-resumable x-goog-allowed-resources",
)
_FREE_HEADERS = ("x-goog-meta-", "x-goog-custom-audit-")  # metadata, and notes for a log that is not here


def checked(call: str, handler: Handler, permissions: Permissions) -> Handler:
    """The handler of a call, which first refuses those who may not make it, and what it would ignore."""

    def answer(request: Request, **names: str) -> Response | dict | None:
        check_permission(request, call, permissions)
        check_query(request, QUERIES[call], call)
        check_headers(request)
        return handler(request, **names)

    return answer


def check_permission(request: Request, call: str, permissions: Permissions) -> None:
    """Raises HttpError 403 for an account that may not make a call."""
    account = permissions.account_of(request.headers.get("Authorization"))
    if missing := permissions.missing(account, call):
        address = email(account, permissions.project)
        raise HttpError(403, denied_text("storage", missing, permissions.project, address, ""), "forbidden")


def check_overwriting(request: Request, existing: dict | None, permissions: Permissions) -> None:
    """Raises HttpError 403 if there is an object already, and the account may not write another over it."""
    if existing:
        check_permission(request, "objects.overwrite", permissions)


def check_query(request: Request, table: Fields, call: str) -> None:
    """Raises HttpError 501 for a parameter that says something and would be ignored."""
    for name, value in request.query.items():
        is_idle = value != "" and says_nothing(value)
        # Google's client asks for a full projection with every change, and looks at it only in reads.
        asks_for_acl = (name, value) == ("projection", "full") and call.endswith((".get", ".list"))
        if (table.of(name) == REFUSED and not is_idle) or asks_for_acl:
            raise _refused(f"The parameter {name} of {call}")


def check_headers(request: Request) -> None:
    """Raises HttpError 501 for a header of Cloud Storage's own that would be ignored: an encryption key, say,
    without which the object would be readable here."""
    for header in request.headers:
        name = header.lower()
        is_own = name.startswith("x-goog-") and not name.startswith(_FREE_HEADERS)
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
