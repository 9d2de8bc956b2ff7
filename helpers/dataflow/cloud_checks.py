"""Checks what a job needs from Google Cloud: each check yields what it found, and how to fix a miss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError

from helpers.files import access, storage

OK, MISS, SKIPPED = "ok", "miss", "skipped"
# What a job cannot do without; the notebooks need more (`helpers.files.access`).
APIS = tuple(
    f"{name}.googleapis.com" for name in ("dataflow", "compute", "pubsub", "storage", "logging", "monitoring")
)
CALL_SECONDS = 20
# Of the account that submits, on the project; those for buckets and topics are tried on these. Creating a job
# starts workers under another account, hence actAs, which Google advises to grant on that account alone.
ACT_AS = "iam.serviceAccounts.actAs"
PROJECT_PERMISSIONS = (
    *(name for name in access.permissions(access.YOU, "series") if name.startswith("dataflow.")),
    ACT_AS,
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
        from requests import RequestException

        answer = access.session_of(project).get(
            f"https://serviceusage.googleapis.com/v1/projects/{project}/services:batchGet",
            params={"names": [f"projects/{project}/services/{api}" for api in APIS]},
            timeout=CALL_SECONDS,
        )
        services = answer.json().get("services") if answer.ok else None
    except (GoogleAuthError, RequestException, ValueError) as error:
        yield Finding(subject, SKIPPED, f"Service Usage could not be asked: {error}")
        return
    if services is None and answer.status_code == 501:
        yield Finding(subject, SKIPPED, "the local cloud has no Service Usage")
        return
    if services is None:
        yield Finding(subject, SKIPPED, f"Service Usage could not be asked: status {answer.status_code}")
        return
    enabled = {one["name"].rpartition("/")[2] for one in services if one.get("state") == "ENABLED"}
    if missing := sorted(set(APIS) - enabled):
        yield Finding(
            subject, MISS, f"not enabled: {', '.join(missing)}", access.enable_command(project, missing)
        )
    else:
        yield Finding(subject)


def check_permissions(project: str) -> Iterator[Finding]:
    subject = f"permissions in {project}"
    try:
        from google.cloud import resourcemanager_v3

        client = resourcemanager_v3.ProjectsClient(client_options={"quota_project_id": project})
        granted = client.test_iam_permissions(
            resource=f"projects/{project}", permissions=list(PROJECT_PERMISSIONS), timeout=CALL_SECONDS
        )
    except (GoogleAPICallError, GoogleAuthError, ImportError) as error:
        yield Finding(subject, SKIPPED, f"Resource Manager could not be asked: {said(error)}")
        return
    missing = [name for name in PROJECT_PERMISSIONS if name not in granted.permissions]
    if missing == [ACT_AS]:
        yield Finding(
            subject,
            SKIPPED,
            f"{ACT_AS} is not granted on the project; on the workers' account, not asked here, it is enough",
        )
    elif missing:
        commands = [access.grant_command(project, role) for role in access.roles_for(missing)]
        yield Finding(subject, MISS, f"the account in use lacks {', '.join(missing)}", " && ".join(commands))
    else:
        yield Finding(subject)


def check_compute(
    project: str, location: str, machine_type: str, gpu: str, has_network: bool
) -> Iterator[Finding]:
    """Asks Compute Engine for what fails a job minutes after it was submitted: a region without the machine,
    no quota for its GPU, no network.

    Args:
        project: the project's id.
        location: the region.
        machine_type: of the workers.
        gpu: the type of its GPU, or empty.
        has_network: whether the job names a network of its own.
    """
    root = f"https://compute.googleapis.com/compute/v1/projects/{project}"
    try:
        from requests import RequestException

        session = access.session_of(project)

        def ask(path: str, **parameters: str) -> dict | None:
            answer = session.get(f"{root}/{path}", params=parameters, timeout=CALL_SECONDS)
            if answer.status_code == 404:
                return None
            if not answer.ok:
                raise ValueError(f"status {answer.status_code}")
            return answer.json()

        found = ask("aggregated/machineTypes", filter=f"name={machine_type}") or {}
        quotas = (ask(f"regions/{location}") or {}).get("quotas", []) if gpu else []
        network = True if has_network else ask("global/networks/default")
    except (GoogleAuthError, RequestException, ValueError) as error:
        yield Finding("Compute Engine", SKIPPED, f"it could not be asked for {machine_type}: {error}")
        return
    zones = [name for name, zone in found.get("items", {}).items() if zone.get("machineTypes")]
    subject = f"{machine_type} in {location}"
    if "custom-" in machine_type:
        yield Finding(subject, SKIPPED, "types of one's own are in no list")
    elif any(name.startswith(f"zones/{location}-") for name in zones):
        yield Finding(subject)
    else:
        elsewhere = sorted({name.removeprefix("zones/").rpartition("-")[0] for name in zones})
        mend = f"choose another region, such as {', '.join(elsewhere[:3])}, or --machine_type=n2-standard-2"
        yield Finding(subject, MISS, "no zone of the region has it", mend if elsewhere else "choose another")
    if gpu:
        metric = f"{gpu.removeprefix('nvidia-').removeprefix('tesla-').replace('-', '_').upper()}_GPUS"
        limit = next(
            (one["limit"] for one in quotas if one.get("metric") in (metric, f"NVIDIA_{metric}")), None
        )
        if limit == 0:
            yield Finding(
                f"quota for {gpu}",
                MISS,
                f"it is 0 in {location}, as in every new project",
                f"https://console.cloud.google.com/iam-admin/quotas?project={project}: ask for {metric}",
            )
        else:
            yield Finding(f"quota for {gpu}", OK if limit else SKIPPED, f"{limit or 'not known'}")
    if network is None:
        yield Finding(
            "network default",
            MISS,
            "the project has none",
            "give --subnetwork=regions/REGION/subnetworks/NAME",
        )


def check_bucket(name: str, path: str, project: str, location: str) -> Iterator[Finding]:
    subject = f"bucket {name}"
    create = access.make_bucket_command(name, project, location)
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
            f"{access.make_bucket_command(f'{name}-{location}', project, location)}, and give that one; or "
            f"run the job in {bucket.location.lower()}",
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
        return Finding(subject, MISS, said(error), access.log_in())
    if isinstance(error, Forbidden):
        return Finding(subject, MISS, said(error), f"grant the account in use {role}")
    return Finding(subject, SKIPPED, f"it could not be checked: {said(error)}")


def said(error: Exception) -> str:
    return str(getattr(error, "message", None) or error)
