"""Which account may make which call, and what an organisation forbids.

Three accounts: yours, the workers' of Dataflow jobs, and that of Vertex AI's jobs. Each has the permissions
of the roles that Google's documentation asks for, and no others. FOLDER/policy.txt takes some away, or adds
constraints; it is read anew when it has changed, so a permission can be revoked while a job runs:

    deny user pubsub.topics.create
    deny workers storage.objects.get
    constraint storage.uniformBucketLevelAccess
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

USER, WORKERS, VERTEX = "user", "workers", "vertex"
ACCOUNTS = (USER, WORKERS, VERTEX)
UNIFORM_ACCESS, SOFT_DELETE = "storage.uniformBucketLevelAccess", "storage.softDeletePolicySeconds"
FILE = "policy.txt"

# What each call needs. Sources: the services' pages on access control.
NEEDED = {
    "CreateTopic": ["pubsub.topics.create"],
    "GetTopic": ["pubsub.topics.get"],
    "DeleteTopic": ["pubsub.topics.delete"],
    "Publish": ["pubsub.topics.publish"],
    "CreateSubscription": ["pubsub.subscriptions.create", "pubsub.topics.attachSubscription"],
    "GetSubscription": ["pubsub.subscriptions.get"],
    "DeleteSubscription": ["pubsub.subscriptions.delete"],
    "Pull": ["pubsub.subscriptions.consume"],
    "StreamingPull": ["pubsub.subscriptions.consume"],
    "Acknowledge": ["pubsub.subscriptions.consume"],
    "ModifyAckDeadline": ["pubsub.subscriptions.consume"],
    "CreateCustomJob": ["aiplatform.customJobs.create"],
    "GetCustomJob": ["aiplatform.customJobs.get"],
    "ListCustomJobs": ["aiplatform.customJobs.list"],
    "CancelCustomJob": ["aiplatform.customJobs.cancel"],
    "CreateJob": ["dataflow.jobs.create", "iam.serviceAccounts.actAs"],
    "GetJob": ["dataflow.jobs.get"],
    "ListJobs": ["dataflow.jobs.list"],
    "UpdateJob": ["dataflow.jobs.updateContents"],
    "CancelJob": ["dataflow.jobs.cancel"],
    "ListJobMessages": ["dataflow.messages.list"],
    "GetJobMetrics": ["dataflow.metrics.get"],
    "ListTimeSeries": ["monitoring.timeSeries.list"],
    "GetProject": ["resourcemanager.projects.get"],
    "buckets.insert": ["storage.buckets.create"],
    "buckets.get": ["storage.buckets.get"],
    "buckets.list": ["storage.buckets.list"],
    "buckets.delete": ["storage.buckets.delete"],
    "buckets.testIamPermissions": [],
    "objects.list": ["storage.objects.list"],
    "objects.get": ["storage.objects.get"],
    "objects.insert": ["storage.objects.create"],
    "objects.overwrite": ["storage.objects.delete"],
    "objects.delete": ["storage.objects.delete"],
    "objects.compose": ["storage.objects.create", "storage.objects.get"],
    "objects.copy": ["storage.objects.create", "storage.objects.get"],
    "batch": [],
}
_OBJECTS = [f"storage.objects.{name}" for name in ("create", "delete", "get", "list")]
GRANTED = {
    USER: {name for names in NEEDED.values() for name in names},
    # roles/dataflow.worker, storage.objectUser, and pubsub.editor for jobs that read a topic (else
    # subscriber, viewer and publisher)
    WORKERS: {
        "storage.buckets.get",
        *_OBJECTS,
        *(name for names in NEEDED.values() for name in names if name.startswith("pubsub.")),
    },
    # roles/aiplatform.customCodeServiceAgent
    VERTEX: {"storage.buckets.get", *_OBJECTS},
}


def email(account: str, project: str) -> str:
    """The e-mail address of an account."""
    return f"local-cloud-{account}@{project}.iam.gserviceaccount.com"


class Permissions:
    """The permissions of the accounts of a project.

    Args:
      folder: holds policy.txt, which need not exist.
      project: the project's id.
    """

    def __init__(self, folder: Path, project: str):
        self._file = folder / FILE
        self.project = project
        self._read: tuple[int, list[list[str]]] = (0, [])

    def account_of(self, authorization: str | None) -> str:
        """The account of an Authorization header: a token of this cloud's, or one that a client signed."""
        token = (authorization or "").removeprefix("Bearer ").strip()
        if token.count(".") == 2:
            with contextlib.suppress(ValueError, AttributeError):
                part = token.split(".")[1]
                token = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))).get("iss", "")
        return next((one for one in ACCOUNTS if email(one, self.project) in token), USER)

    def missing(self, account: str, call: str) -> str | None:
        """The first permission that an account lacks for a call; None if it may make it."""
        held = self.has(account, NEEDED[call])
        return next((one for one in NEEDED[call] if one not in held), None)

    def has(self, account: str, permissions: Iterable[str]) -> list[str]:
        """Those of the permissions that an account has."""
        denied = {line[2] for line in self._lines() if line[:2] == ["deny", account] and len(line) == 3}
        return [one for one in permissions if one in GRANTED[account] and one not in denied]

    def forbids(self, constraint: str) -> bool:
        """Whether the organisation has a constraint."""
        return ["constraint", constraint] in self._lines()

    def _lines(self) -> list[list[str]]:
        try:
            changed = self._file.stat().st_mtime_ns
        except OSError:
            return []
        if changed != self._read[0]:
            self._read = changed, [line.split() for line in self._file.read_text().splitlines()]
        return self._read[1]


def denied_text(service: str, permission: str, project: str, address: str, resource: str) -> str:
    """The message of a service for a permission that is missing, as the service words it."""
    if service == "pubsub":
        return "User not authorized to perform this action."
    if service == "monitoring":
        return f"Permission {permission} denied (or the resource may not exist)."
    if service == "dataflow":
        return (
            "(0): Could not create or change workflow; user does not have write access to project: "
            f"{project} Causes: (0): Permission '{permission}' denied on project: '{project}'"
        )
    if service == "storage":
        of = "project" if permission == "storage.buckets.create" else permission.split(".")[1][:-1]
        return (
            f"{address} does not have {permission} access to the Google Cloud Storage {of}. Permission "
            f"'{permission}' denied on resource (or it may not exist)."
        )
    resource = f"//{service}.googleapis.com/{resource}"
    return f"Permission '{permission}' denied on resource '{resource}' (or it may not exist)."
