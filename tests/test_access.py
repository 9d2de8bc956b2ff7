"""One table of APIs and roles: the README shows it, the preflight asks for it, and errors quote it."""

import sys
from pathlib import Path

import pytest
from google.api_core.exceptions import Forbidden

from helpers.dataflow.cloud_checks import APIS, PROJECT_PERMISSIONS
from helpers.files import access
from helpers.local_cloud.front.permissions import GRANTED, USER, WORKERS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_shows_the_table():
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try:
        import access_table
    finally:
        sys.path.pop(0)
    assert access_table.write(README) == README, "run python tools/access_table.py"
    for need in access.TABLE:
        assert f"`roles/{need.role}`" in README, need.role
    for name in access.apis():
        assert name.partition(".")[0] in README, name


def test_the_preflight_asks_for_all_that_a_job_needs():
    assert set(APIS) <= set(access.apis())
    assert {"dataflow.jobs.cancel", "dataflow.messages.list", "dataflow.metrics.get"} <= {
        *PROJECT_PERMISSIONS
    }
    assert set(PROJECT_PERMISSIONS) <= set(access.permissions(access.YOU))


def test_workers_may_do_here_no_more_than_their_roles_grant():
    """The names that the local cloud's table and this one share mean the same."""
    theirs = set(access.permissions(access.WORKERS)) | {"pubsub.topics.create", "pubsub.topics.delete"}
    services = ("storage.", "pubsub.")
    assert {name for name in GRANTED[WORKERS] if name.startswith(services)} <= theirs
    missing = {name for name in access.permissions(access.YOU, "series") if name not in GRANTED[USER]}
    assert {name.partition(".")[0] for name in missing} <= {"logging", "serviceusage"}, missing


@pytest.mark.parametrize(
    ("message", "wanted", "role"),
    [
        ("Permission 'aiplatform.customJobs.create' denied on resource 'x'", (), "roles/aiplatform.user"),
        ("a@b does not have storage.buckets.create access to the project.", (), "roles/storage.admin"),
        ("User not authorized to perform this action.", ("pubsub.topics.create",), "roles/pubsub.editor"),
        ("Permission 'dataflow.jobs.cancel' denied on project: 'p'", (), "roles/dataflow.developer"),
    ],
)
def test_a_denied_call_is_answered_with_the_role_that_grants_it(message, wanted, role):
    assert f"--role={role}" in access.advice(message, "p", *wanted)


def test_a_message_that_names_nothing_is_explained_by_the_call():
    def create_topic():
        raise Forbidden("User not authorized to perform this action.")

    with pytest.raises(Forbidden) as caught:
        create_topic()
    text = access.explain(caught.value, "my-project")
    assert "lacks pubsub.topics.create, which roles/pubsub.editor grants" in text
    assert "gcloud projects add-iam-policy-binding my-project" in text
    assert "ask its owner" in access.advice("No.", "p")
    off = "Pub/Sub API has not been used in project 1 before or it is disabled. pubsub.googleapis.com"
    assert "gcloud services enable pubsub.googleapis.com --project=p" in access.advice(off, "p")


def test_without_credentials_one_logs_in_unless_their_file_is_gone(monkeypatch, tmp_path):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    assert access.log_in() == "run `gcloud auth application-default login`"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    assert "gone.json, which GOOGLE_APPLICATION_CREDENTIALS names, is gone" in access.log_in()
