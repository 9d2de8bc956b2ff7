"""Access that the series needs on Google Cloud: APIs, permissions, and the roles that grant them.

One table. The README shows it, the preflight asks for it, and errors quote it. Permissions by role are those
of Google's predefined roles as of 2026-08; which call needs which is documented at
https://cloud.google.com/dataflow/docs/concepts/access-control and the services' own pages.

Three kinds of accounts take part: *you* (whoever runs a notebook or a command), the *workers'* account (by
default the project's Compute Engine account), and the accounts of *builds* and of Vertex AI's jobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.auth.transport.requests import AuthorizedSession

YOU, WORKERS, BUILD = "you", "the workers' account", "Cloud Build's account"


@dataclass(frozen=True)
class Need:
    """One role, and what it is for.

    Attributes:
        who: whose role: `YOU`, `WORKERS` or `BUILD`.
        role: its name, without `roles/`.
        purpose: what it lets them do.
        permissions: those of the role's that are needed.
        api: the service to be enabled for it; empty if another row names it.
        feature: what needs it: `series` for the notebooks, `topic` for jobs that read a topic or take their
            times from an attribute, `image` for images of one's own, `check` for the preflight.
    """

    who: str
    role: str
    purpose: str
    permissions: tuple[str, ...]
    api: str = ""
    feature: str = "series"


TABLE = (
    Need(
        YOU,
        "dataflow.developer",
        "submit, watch, update, drain and cancel jobs",
        (
            *(f"dataflow.jobs.{name}" for name in ("create", "get", "list", "updateContents", "cancel")),
            "dataflow.messages.list",
            "dataflow.metrics.get",
        ),
        "dataflow.googleapis.com",
    ),
    Need(YOU, "iam.serviceAccountUser", "start workers under their account", ("iam.serviceAccounts.actAs",)),
    Need(
        YOU,
        "storage.admin",
        "make the bucket, and read and write its objects",
        (
            "storage.buckets.create",
            "storage.buckets.get",
            *(f"storage.objects.{name}" for name in ("create", "delete", "get", "list")),
        ),
        "storage.googleapis.com",
    ),
    Need(
        YOU,
        "pubsub.editor",
        "make topics and subscriptions, send messages and read answers",
        (
            *(
                f"pubsub.topics.{name}"
                for name in ("create", "get", "delete", "publish", "attachSubscription")
            ),
            *(f"pubsub.subscriptions.{name}" for name in ("create", "get", "delete", "consume")),
        ),
        "pubsub.googleapis.com",
    ),
    Need(
        YOU,
        "aiplatform.user",
        "convert in a Vertex AI job",
        tuple(f"aiplatform.customJobs.{name}" for name in ("create", "get", "cancel")),
        "aiplatform.googleapis.com",
    ),
    Need(
        YOU,
        "logging.viewer",
        "read a failed job's log",
        ("logging.logEntries.list",),
        "logging.googleapis.com",
    ),
    Need(
        YOU,
        "monitoring.viewer",
        "see how many messages wait",
        ("monitoring.timeSeries.list",),
        "monitoring.googleapis.com",
    ),
    Need(
        YOU,
        "serviceusage.serviceUsageConsumer",
        "bill calls to the project, and ask which APIs are enabled",
        ("serviceusage.services.use", "serviceusage.services.get"),
        "serviceusage.googleapis.com",
    ),
    Need(
        YOU,
        "browser",
        "learn the project's number, and your own permissions",
        ("resourcemanager.projects.get",),
        "cloudresourcemanager.googleapis.com",
        "check",
    ),
    Need(
        YOU,
        "compute.viewer",
        "ask whether the region has the machines, and the quota for them",
        ("compute.machineTypes.list", "compute.regions.get"),
        "compute.googleapis.com",
        "check",
    ),
    Need(
        WORKERS,
        "dataflow.worker",
        "run a job's workers",
        ("dataflow.workItems.lease", "storage.buckets.get", "storage.objects.create", "storage.objects.get"),
    ),
    Need(
        WORKERS,
        "storage.objectUser",
        "read the state dict, and keep what is staged",
        tuple(f"storage.objects.{name}" for name in ("create", "delete", "get", "list")),
    ),
    Need(WORKERS, "pubsub.subscriber", "read messages", ("pubsub.subscriptions.consume",)),
    Need(
        WORKERS,
        "pubsub.viewer",
        "look up the subscription and the topics",
        ("pubsub.subscriptions.get", "pubsub.topics.get"),
    ),
    Need(WORKERS, "pubsub.publisher", "publish responses and dead letters", ("pubsub.topics.publish",)),
    Need(
        WORKERS,
        "pubsub.editor",
        "read a topic rather than a subscription: the job makes one",
        ("pubsub.subscriptions.create", "pubsub.subscriptions.delete", "pubsub.topics.attachSubscription"),
        feature="topic",
    ),
    Need(
        WORKERS,
        "artifactregistry.reader",
        "pull an image of your own",
        ("artifactregistry.repositories.downloadArtifacts",),
        feature="image",
    ),
    Need(
        YOU,
        "cloudbuild.builds.editor",
        "build that image",
        ("cloudbuild.builds.create", "cloudbuild.builds.get"),
        "cloudbuild.googleapis.com",
        "image",
    ),
    Need(
        YOU,
        "artifactregistry.admin",
        "make a repository for it",
        ("artifactregistry.repositories.create",),
        "artifactregistry.googleapis.com",
        "image",
    ),
    Need(
        BUILD,
        "cloudbuild.builds.builder",
        "read the files of a build, write its log, and push the image",
        ("storage.objects.get", "logging.logEntries.create", "artifactregistry.repositories.uploadArtifacts"),
        feature="image",
    ),
)

# Pub/Sub's messages name no permission: what each of its client's methods needs.
_BY_METHOD = {
    "create_topic": "pubsub.topics.create",
    "get_topic": "pubsub.topics.get",
    "delete_topic": "pubsub.topics.delete",
    "publish": "pubsub.topics.publish",
    "create_subscription": "pubsub.subscriptions.create",
    "get_subscription": "pubsub.subscriptions.get",
    "delete_subscription": "pubsub.subscriptions.delete",
    "pull": "pubsub.subscriptions.consume",
    "acknowledge": "pubsub.subscriptions.consume",
    "list_time_series": "monitoring.timeSeries.list",
}
_PERMISSION = re.compile(r"\b([a-z]+\.[a-zA-Z]+\.[a-zA-Z]+)\b")


def apis(*features: str) -> list[str]:
    """The services that must be enabled, in the table's order; of all features by default."""
    rows = [need.api for need in TABLE if need.api and (not features or need.feature in features)]
    return list(dict.fromkeys(rows))


def permissions(who: str, *features: str) -> list[str]:
    """The permissions that an account needs; of all features by default."""
    rows = [need for need in TABLE if need.who == who and (not features or need.feature in features)]
    return list(dict.fromkeys(name for need in rows for name in need.permissions))


def roles_for(missing: Iterable[str], who: str = YOU) -> list[str]:
    """The roles of the table that grant permissions, as `roles/NAME`."""
    wanted = set(missing)
    return [f"roles/{need.role}" for need in TABLE if need.who == who and wanted & set(need.permissions)]


def log_in() -> str:
    """What to do where there are no credentials."""
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    if file and not os.path.exists(file):
        return (
            f"{file}, which GOOGLE_APPLICATION_CREDENTIALS names, is gone, as a local cloud's is once that "
            "has ended: open a new shell, or start the local cloud again around the command"
        )
    return "run `gcloud auth application-default login`"


def session_of(project: str) -> AuthorizedSession:
    """A session for services that have no client here, whose calls are the project's own.

    Raises:
        google.auth.exceptions.GoogleAuthError: there are no credentials.
    """
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    # Credentials of a person belong to no project, and several services refuse calls that none is named for.
    credentials, _ = google.auth.default(
        scopes=["https://www.googleapis.com/auth/cloud-platform"], quota_project_id=project
    )
    return AuthorizedSession(credentials)


def enable_command(project: str, names: Iterable[str]) -> str:
    """The command that enables services."""
    return f"gcloud services enable {' '.join(names)} --project={project}"


def grant_command(project: str, role: str, member: str = "user:YOU") -> str:
    """The command that grants a role on a project."""
    return f"gcloud projects add-iam-policy-binding {project} --member={member} --role={role}"


def make_bucket_command(name: str, project: str, location: str) -> str:
    """The command that makes a bucket as the notebooks make it; see `helpers.files.buckets`."""
    return (
        f"gcloud storage buckets create gs://{name} --project={project} --location={location} "
        "--uniform-bucket-level-access --public-access-prevention --soft-delete-duration=0"
    )


def advice(message: str, project: str, *wanted: str) -> str:
    """What to do about a call that is denied: one sentence with the role that grants it, or with what else
    stands in the way, as an API that is off.

    Args:
        message: the service's, which often names the permission.
        project: the project's id.
        wanted: the permissions that the call needs, for a message that names none, as Pub/Sub's.
    """
    if "SERVICE_DISABLED" in message or "has not been used in project" in message:
        found = re.search(r"([a-z]+\.googleapis\.com)", message)
        return f"the API is off: {enable_command(project, [found[1]] if found else apis('series'))}"
    if "billing" in message.lower():
        return f"billing is off for {project}: https://console.cloud.google.com/billing/projects"
    known = {name for need in TABLE for name in need.permissions}
    named = [name for name in _PERMISSION.findall(message) if name in known] or list(wanted)
    if not (roles := roles_for(named)):
        return f"the account in use may not do this in {project}: ask its owner for the role."
    return (
        f"the account in use lacks {', '.join(named)}, which {roles[0]} grants: "
        f"{grant_command(project, roles[0])}"
    )


def explain(error: Exception, project: str) -> str:
    """A denied call in a sentence or two: what the service said, and the role that grants it."""
    message = str(getattr(error, "message", "") or error)
    wanted, frame = [], error.__traceback__
    while frame is not None:
        if name := _BY_METHOD.get(frame.tb_frame.f_code.co_name):
            wanted.append(name)
        frame = frame.tb_next
    return f"{message.rstrip('.')}: {advice(message, project, *wanted[-1:])}"
