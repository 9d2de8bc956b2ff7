"""Cloud Storage's JSON API (https://cloud.google.com/storage/docs/json_api/v1) over a folder of files.

Uploads, batches and the XML API have modules of their own.
"""

from dataclasses import replace
from pathlib import Path

from ..front.accounts import PROJECT_NUMBER
from ..front.http_server import Handler, HttpError, Request, Response, Router, natural, warn_once
from . import resource as resources
from .batches import Batches
from .bucket_store import READ_ONLY
from .downloads import check_generation, media
from .fields import body, checked
from .listing import Listing, decode_token, encode_token, page_size
from .object_store import ObjectStore
from .partial_object import read_chunks
from .preconditions import Preconditions
from .uploads import Uploads
from .xml_api import XmlApi

API = "/storage/v1"
BUCKET = API + "/b/{bucket}"
OBJECT = BUCKET + "/o/{name}"
MAX_COMPONENTS = 32  # of one compose request


class CloudStorage:
    """Serves the buckets and objects below `root`."""

    def __init__(self, root: Path):
        self._store = ObjectStore(root)
        self._buckets = self._store.buckets

    def stop(self) -> None:
        """Discards uploads that were not finished."""
        self._store.stop()

    def routes(self, router: Router) -> None:
        """Adds the JSON API, uploads, batches and the XML API."""

        def add(methods: str, path: str, call: str, handler: Handler) -> None:
            router.route(methods, path)(checked(call, handler))

        add("GET", API + "/b", "buckets.list", self._list_buckets)
        add("POST", API + "/b", "buckets.insert", self._create_bucket)
        add("GET", BUCKET, "buckets.get", self._get_bucket)
        add("PATCH PUT", BUCKET, "buckets.patch", self._update_bucket)
        add("DELETE", BUCKET, "buckets.delete", self._delete_bucket)
        add("GET", BUCKET + "/iam", "buckets.getIamPolicy", self._policy)
        add("PUT", BUCKET + "/iam", "buckets.setIamPolicy", self._set_policy)
        add("GET", BUCKET + "/iam/testPermissions", "buckets.testIamPermissions", self._test_permissions)
        add("GET", BUCKET + "/o", "objects.list", self._list)
        add("GET", OBJECT, "objects.get", self._get)
        add("PATCH PUT", OBJECT, "objects.patch", self._update)
        add("DELETE", OBJECT, "objects.delete", self._delete)
        add("POST", OBJECT + "/compose", "objects.compose", self._compose)
        add("POST", OBJECT + "/rewriteTo/b/{to_bucket}/o/{to_name}", "objects.rewrite", self._rewrite)
        add("POST", OBJECT + "/copyTo/b/{to_bucket}/o/{to_name}", "objects.copy", self._copy)
        add("GET", "/download" + OBJECT, "objects.get", self._download)
        add(
            "GET",
            API + "/projects/{project}/serviceAccount",
            "projects.serviceAccount.get",
            _service_account,
        )
        Uploads(self._store).routes(router)
        Batches(router).routes(router)
        # The XML API would take the first part of such a path for a bucket.
        for start in (API, "/upload" + API, "/download" + API, "/resumable/upload" + API, "/batch/storage"):
            router.route("GET HEAD POST PUT PATCH DELETE", start + "/{rest:path}")(_not_imitated)
        XmlApi(self._store).routes(router)

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
        return self._buckets.create(body(request, "buckets.insert"))

    def _get_bucket(self, request: Request, bucket: str) -> dict:
        resource = self._buckets.get(bucket)
        Preconditions.of(request).check(resource, reading=True)
        return resource

    def _update_bucket(self, request: Request, bucket: str) -> dict:
        sent = {
            name: value for name, value in body(request, "buckets.patch").items() if name not in READ_ONLY
        }

        def change(resource: dict) -> None:
            if request.method == "PUT":
                for name in [name for name in resource if name not in (*READ_ONLY, "location")]:
                    del resource[name]
            _merge(resource, sent)

        return self._buckets.update(bucket, change, Preconditions.of(request))

    def _delete_bucket(self, request: Request, bucket: str) -> None:
        self._buckets.delete(bucket, Preconditions.of(request))

    def _policy(self, _: Request, bucket: str) -> dict:
        return self._buckets.policy(bucket)

    def _set_policy(self, request: Request, bucket: str) -> dict:
        return self._buckets.set_policy(bucket, body(request, "buckets.setIamPolicy"))

    def _test_permissions(self, request: Request, bucket: str) -> dict:
        self._buckets.get(bucket)
        permissions = request.query_values("permissions")
        return {"kind": "storage#testIamPermissionsResponse", "permissions": permissions}

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

    def _update(self, request: Request, bucket: str, name: str) -> dict:
        sent = body(request, "objects.patch")

        def change(fields: dict) -> dict:
            return sent if request.method == "PUT" else _merge(fields, sent)

        return self._store.update(bucket, name, change, self._conditions_of_live(request, bucket, name))

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

    def _rewrite(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> dict:
        resource = self._copy(request, bucket, name, to_bucket, to_name)
        return {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": resource["size"],
            "objectSize": resource["size"],
            "done": True,
            "resource": resource,
        }

    def _copy(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> dict:
        sent = body(request, "objects.rewrite")
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


def _merge(target: dict, patch: dict) -> dict:
    """Applies a JSON merge patch (RFC 7386): null removes, objects are merged, the rest is replaced."""
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            target[name] = _merge(target[name] if isinstance(target.get(name), dict) else {}, value)
        else:
            target[name] = value
    return target


def _project(request: Request) -> str:
    if not request.query.get("project"):
        raise HttpError(400, "Required parameter: project", "required")
    return request.query["project"]


def _not_imitated(request: Request, rest: str) -> Response:
    call = f"{request.method} {request.path}"
    warn_once(f"not imitated by the local cloud: {call}")
    raise HttpError(501, f"{call} is not imitated by the local cloud.", "notImplemented")


def _service_account(_: Request, project: str) -> dict:
    address = f"service-{PROJECT_NUMBER}@gs-project-accounts.iam.gserviceaccount.com"
    return {"kind": "storage#serviceAccount", "email_address": address}
