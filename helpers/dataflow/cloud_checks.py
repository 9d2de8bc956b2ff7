"""Checks what a job needs from Google Cloud: each check yields what it found, and how to fix a miss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError

from helpers.files import storage

OK, MISS, SKIPPED = "ok", "miss", "skipped"
APIS = (
    "dataflow.googleapis.com",
    "pubsub.googleapis.com",
    "storage.googleapis.com",
    "compute.googleapis.com",
)
CALL_SECONDS = 20
# Needed by the account that submits. Creating a job starts workers under another account, hence actAs.
PROJECT_PERMISSIONS = (
    "dataflow.jobs.create",
    "dataflow.jobs.get",
    "dataflow.jobs.list",
    "dataflow.jobs.updateContents",
    "iam.serviceAccounts.actAs",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        subject: what was checked.
        result: `ok`, `miss` or `skipped`.
        detail: what is wrong, or why it was skipped.
        mend: the command, or the change, that fixes a miss.
    """

    subject: str
    result: str = OK
    detail: str = ""
    mend: str = ""

    def row(self) -> dict[str, object]:
        """As a row of a table."""
        return {"what": self.subject, "result": self.result, "detail": self.detail, "mend": self.mend}


def check_apis(project: str) -> Iterator[Finding]:
    subject = "APIs"
    try:
        import google.auth
        from google.auth.transport.requests import AuthorizedSession
        from requests import RequestException

        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        answer = AuthorizedSession(credentials).get(
            f"https://serviceusage.googleapis.com/v1/projects/{project}/services:batchGet",
            params={"names": [f"projects/{project}/services/{api}" for api in APIS]},
            timeout=CALL_SECONDS,
        )
        services = answer.json().get("services") if answer.ok else None
    except (GoogleAuthError, RequestException, ValueError) as error:
        yield Finding(subject, SKIPPED, f"Service Usage could not be asked: {error}")
        return
    if services is None:
        yield Finding(subject, SKIPPED, f"Service Usage could not be asked: status {answer.status_code}")
        return
    enabled = {one["name"].rpartition("/")[2] for one in services if one.get("state") == "ENABLED"}
    if missing := sorted(set(APIS) - enabled):
        command = f"gcloud services enable {' '.join(missing)} --project={project}"
        yield Finding(subject, MISS, f"not enabled: {', '.join(missing)}", command)
    else:
        yield Finding(subject)


def check_permissions(project: str) -> Iterator[Finding]:
    subject = f"permissions in {project}"
    try:
        from google.cloud import resourcemanager_v3

        granted = resourcemanager_v3.ProjectsClient().test_iam_permissions(
            resource=f"projects/{project}", permissions=list(PROJECT_PERMISSIONS), timeout=CALL_SECONDS
        )
    except (GoogleAPICallError, GoogleAuthError, ImportError) as error:
        yield Finding(subject, SKIPPED, f"Resource Manager could not be asked: {said(error)}")
        return
    if missing := sorted(set(PROJECT_PERMISSIONS) - set(granted.permissions)):
        roles = " and ".join(
            role
            for role, prefix in (("dataflow.developer", "dataflow"), ("iam.serviceAccountUser", "iam"))
            if any(one.startswith(prefix) for one in missing)
        )
        yield Finding(
            subject,
            MISS,
            f"the account in use lacks {', '.join(missing)}",
            f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=ROLE, "
            f"with {roles} (roles/...)",
        )
    else:
        yield Finding(subject)


def check_bucket(name: str, path: str, project: str, location: str) -> Iterator[Finding]:
    subject = f"bucket {name}"
    create = f"gcloud storage buckets create gs://{name} --project={project} --location={location}"
    try:
        from google.cloud import storage as client_library

        bucket = client_library.Client(project=project).get_bucket(name, timeout=CALL_SECONDS)
    except NotFound:
        yield Finding(subject, MISS, "it does not exist", create)
        return
    except (GoogleAPICallError, GoogleAuthError) as error:
        grant = f"gcloud storage buckets add-iam-policy-binding gs://{name} --member=user:YOU"
        yield Finding(subject, MISS, said(error), f"{grant} --role=roles/storage.admin")
        return
    if _holds(bucket.location, bucket.location_type, location):
        yield Finding(subject, detail=f"in {bucket.location}")
    else:
        yield Finding(
            subject,
            MISS,
            f"it is in {bucket.location}, and the job in {location}: starts are slow, and traffic is billed",
            f"gcloud storage buckets create gs://{name}-{location} --project={project} "
            f"--location={location}, and give that one; or run the job in {bucket.location.lower()}",
        )
    try:
        storage.check_writable(path if path.count("/") > 2 else f"{path}/x")
    except (OSError, ValueError) as error:
        grant = f"gcloud storage buckets add-iam-policy-binding gs://{name} --member=user:YOU"
        yield Finding(f"objects in {name}", MISS, str(error), f"{grant} --role=roles/storage.objectUser")


def _holds(bucket_location: str, location_type: str | None, region: str) -> bool:
    """Whether a bucket keeps its objects in a region: it is there, or in a multi-region around it.

    Dual-regions always pass: of those that Google defines, only the name is known here.
    """
    place, region = bucket_location.lower(), region.lower()
    if location_type == "dual-region":
        return True
    return place == region or {"us": "us", "eu": "europe", "asia": "asia"}.get(place) == region.split("-")[0]


def check_topic(path: str) -> Iterator[Finding]:
    from google.cloud import pubsub_v1

    subject, name = f"topic {path}", path.rpartition("/")[2]
    if not _is_path(path, "topics"):
        yield Finding(subject, MISS, "it is not a topic's path", "write it as projects/PROJECT/topics/TOPIC")
        return
    project = path.split("/")[1]
    try:
        pubsub_v1.PublisherClient().get_topic(topic=path, timeout=CALL_SECONDS, retry=None)
        yield Finding(subject)
    except NotFound:
        command = f"gcloud pubsub topics create {name} --project={project}"
        yield Finding(subject, MISS, "it does not exist", command)
    except (GoogleAPICallError, GoogleAuthError) as error:
        yield not_asked(subject, error, f"--role=roles/pubsub.editor to projects/{project}")


def check_subscription(path: str) -> Iterator[Finding]:
    from google.cloud import pubsub_v1

    subject, name = f"subscription {path}", path.rpartition("/")[2]
    if not _is_path(path, "subscriptions"):
        mend = "write it as projects/PROJECT/subscriptions/SUBSCRIPTION"
        yield Finding(subject, MISS, "it is not a subscription's path", mend)
        return
    project = path.split("/")[1]
    create = f"gcloud pubsub subscriptions create {name} --project={project} --topic=TOPIC"
    try:
        with pubsub_v1.SubscriberClient() as client:
            found = client.get_subscription(subscription=path, timeout=CALL_SECONDS, retry=None)
    except NotFound:
        yield Finding(subject, MISS, "it does not exist", create)
        return
    except (GoogleAPICallError, GoogleAuthError) as error:
        yield not_asked(subject, error, f"--role=roles/pubsub.editor to projects/{project}")
        return
    delete = f"gcloud pubsub subscriptions delete {name} --project={project}; {create}"
    if found.topic == "_deleted-topic_" or found.detached:
        yield Finding(subject, MISS, "its topic is gone: no message will ever come", delete)
    elif found.push_config.push_endpoint or found.bigquery_config.table or found.cloud_storage_config.bucket:
        yield Finding(subject, MISS, "it delivers elsewhere: a job can only read a pull subscription", delete)
    elif found.dead_letter_policy.dead_letter_topic or "retry_policy" in found:
        clear = f"gcloud pubsub subscriptions update {name} --project={project}"
        yield Finding(
            subject,
            MISS,
            "its dead-letter or retry policy does not work with Dataflow; the job has its own dead letters",
            f"{clear} --clear-dead-letter-policy --clear-retry-policy",
        )
    else:
        yield Finding(subject, detail=f"of {found.topic}")


def _is_path(path: str, kind: str) -> bool:
    parts = path.split("/")
    return len(parts) == 4 and parts[0] == "projects" and parts[2] == kind and all(parts)


def not_asked(subject: str, error: Exception, role: str) -> Finding:
    if isinstance(error, GoogleAuthError):
        return Finding(subject, MISS, said(error), "gcloud auth application-default login")
    if isinstance(error, Forbidden):
        return Finding(subject, MISS, said(error), f"grant the account in use {role}")
    return Finding(subject, SKIPPED, f"it could not be checked: {said(error)}")


def said(error: Exception) -> str:
    return str(getattr(error, "message", None) or error)
