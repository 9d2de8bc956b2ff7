"""Cloud Storage's JSON API (https://cloud.google.com/storage/docs/json_api/v1) over a folder of files.

Uploads and batches have modules of their own.
"""

from dataclasses import replace
from pathlib import Path

from ..front.http_server import Handler, HttpError, Request, Response, Router, natural
from ..front.permissions import SOFT_DELETE, UNIFORM_ACCESS, Permissions
from . import resource as resources
from .batches import Batches
from .downloads import check_generation, media
from .fields import body, check_overwriting, checked
from .listing import Listing, decode_token, encode_token, page_size
from .object_store import ObjectStore
from .partial_object import read_chunks
from .preconditions import Preconditions
from .uploads import Uploads

API = "/storage/v1"
BUCKET = API + "/b/{bucket}"
OBJECT = BUCKET + "/o/{name}"
MAX_COMPONENTS = 32  # of one compose request


class CloudStorage:
    """Serves the buckets and objects below `root`."""

    def __init__(self, root: Path, permissions: Permissions):
        self._permissions = permissions
        self._store = ObjectStore(root)
        self._buckets = self._store.buckets

    def stop(self) -> None:
        """Discards uploads that were not finished."""
        self._store.stop()

    def routes(self, router: Router) -> None:
        """Adds the JSON API, uploads and batches."""

        def add(methods: str, path: str, call: str, handler: Handler) -> None:
            router.route(methods, path)(checked(call, handler, self._permissions))

        add("GET", API + "/b", "buckets.list", self._list_buckets)
        add("POST", API + "/b", "buckets.insert", self._create_bucket)
        add("GET", BUCKET, "buckets.get", self._get_bucket)
        add("DELETE", BUCKET, "buckets.delete", self._delete_bucket)
        add("GET", BUCKET + "/iam/testPermissions", "buckets.testIamPermissions", self._test_permissions)
        add("GET", BUCKET + "/o", "objects.list", self._list)
        add("GET", OBJECT, "objects.get", self._get)
        add("DELETE", OBJECT, "objects.delete", self._delete)
        add("POST", OBJECT + "/compose", "objects.compose", self._compose)
        add("POST", OBJECT + "/copyTo/b/{to_bucket}/o/{to_name}", "objects.copy", self._copy)
        add("GET", "/download" + OBJECT, "objects.get", self._download)
        Uploads(self._store, self._permissions).routes(router)
        Batches(router).routes(router)

    # Buckets

    def _list_buckets(self, request: Request) -> dict:
        _project(request)
        prefix, after = request.query.get("prefix", ""), decode_token(request.query.get("pageToken", ""))
        names = [name for name in self._buckets.names() if name.startswith(prefix) and name > after]
        shown = names[: page_size(request)]
        answer = {"kind": "storage#buckets", "items": [self._buckets.get(name) for name in shown]}
        return answer | ({"nextPageToken": encode_token(shown[-1])} if len(names) > len(shown) else {})

    def _create_bucket(self, request: Request) -> dict:
        _project(request)
        fields = body(request, "buckets.insert")
        access = (fields.get("iamConfiguration") or {}).get("uniformBucketLevelAccess") or {}
        if self._permissions.forbids(UNIFORM_ACCESS) and not access.get("enabled"):
            raise _violates(f"Request violates constraint 'constraints/{UNIFORM_ACCESS}'")
        seconds = (fields.get("softDeletePolicy") or {}).get("retentionDurationSeconds", "604800")
        if self._permissions.forbids(SOFT_DELETE) and str(seconds) != "604800":
            raise _violates(f"'{seconds}' violates constraint 'constraints/{SOFT_DELETE}'")
        return self._buckets.create(fields)

    def _get_bucket(self, request: Request, bucket: str) -> dict:
        return self._buckets.get(bucket)

    def _delete_bucket(self, request: Request, bucket: str) -> None:
        self._buckets.delete(bucket)

    def _test_permissions(self, request: Request, bucket: str) -> dict:
        self._buckets.get(bucket)
        account = self._permissions.account_of(request.headers.get("Authorization"))
        held = self._permissions.has(account, request.query_values("permissions"))
        return {"kind": "storage#testIamPermissionsResponse", "permissions": held}

    # Objects

    def _list(self, request: Request, bucket: str) -> dict:
        listing = Listing.of_request(request)
        page = listing.page(self._store.names(bucket, listing.prefix))
        resources = (self._store.find(bucket, name) for name in page.names)
        answer = {"kind": "storage#objects", "items": [resource for resource in resources if resource]}
        if page.prefixes:
            answer["prefixes"] = page.prefixes
        if page.next_token:
            answer["nextPageToken"] = page.next_token
        return answer

    def _get(self, request: Request, bucket: str, name: str) -> dict | Response:
        if request.query.get("alt") == "media":
            return self._download(request, bucket, name)
        resource, file = self._store.open(bucket, name)
        file.close()
        check_generation(resource, request.query.get("generation"))
        Preconditions.of(request).check(resource, reading=True)
        return resource

    def _download(self, request: Request, bucket: str, name: str) -> Response:
        return media(self._store, request, bucket, name, Preconditions.of(request))

    def _delete(self, request: Request, bucket: str, name: str) -> None:
        self._store.delete(bucket, name, self._conditions_of_live(request, bucket, name))

    def _conditions_of_live(self, request: Request, bucket: str, name: str) -> Preconditions:
        """The preconditions of a change; naming a generation adds one more."""
        conditions = Preconditions.of(request)
        if not (generation := request.query.get("generation")):
            return conditions
        if resource := self._store.find(bucket, name):
            check_generation(resource, generation)
        return replace(conditions, generation=natural(generation, "generation"))

    # Objects made of objects

    def _copy(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> dict:
        sent = body(request, "objects.copy")
        check_overwriting(request, self._store.find(to_bucket, to_name), self._permissions)
        source, file = self._store.open(bucket, name)
        with file:
            check_generation(source, request.query.get("sourceGeneration"))
            Preconditions.of_query(request.query, "ifSource").check(source)
            copy = self._store.partial()
            try:
                copy.copy(file, source)
                # If the client sends any fields, they replace all of the source's.
                fields = resources.writable(sent) or source
                conditions = Preconditions.of(request)
                return self._store.put(to_bucket, to_name, copy, fields, conditions)
            finally:
                copy.discard()

    def _compose(self, request: Request, bucket: str, name: str) -> dict:
        sent = body(request, "objects.compose")
        check_overwriting(request, self._store.find(bucket, name), self._permissions)
        sources = sent.get("sourceObjects") or []
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise HttpError(400, "Invalid value for sourceObjects: not a list of objects.", "invalid")
        if not 1 <= len(sources) <= MAX_COMPONENTS:
            message = f"Compose takes 1 to {MAX_COMPONENTS} source objects, not {len(sources)}."
            raise HttpError(400, message, "invalid")
        whole = self._store.partial(components=len(sources))
        try:
            components = 0
            for source in sources:
                resource, file = self._store.open(bucket, source.get("name"))
                with file:
                    check_generation(resource, source.get("generation"))
                    wanted = {k: str(v) for k, v in (source.get("objectPreconditions") or {}).items()}
                    Preconditions.of_query(wanted).check(resource)
                    whole.append(read_chunks(file))
                components += resource.get("componentCount", 1)
            whole.components = components
            return self._store.put(
                bucket, name, whole, sent.get("destination") or {}, Preconditions.of(request)
            )
        finally:
            whole.discard()


def _violates(message: str) -> HttpError:
    return HttpError(412, message, "conditionNotMet")


def _project(request: Request) -> str:
    if not request.query.get("project"):
        raise HttpError(400, "Required parameter: project", "required")
    return request.query["project"]
