"""What Google's clients ask about credentials and projects before, or alongside, their actual calls."""

from urllib.parse import parse_qsl

import grpc
from google.cloud.resourcemanager_v3.types import projects

from .fields import fields
from .grpc_service import add_service, not_found
from .http_server import Request, Response, Router
from .permissions import Permissions

Project = projects.Project.pb()
GetProjectRequest = projects.GetProjectRequest.pb()

PROJECT_NUMBER = "123456789012"
TABLES = {"GetProject": fields("name")}


class Accounts:
    """Access tokens for anyone, and one project."""

    def __init__(self, project: str):
        self._project = project

    def routes(self, router: Router) -> None:
        """Adds the endpoints for tokens and for the regions where a token may be used."""
        router.route("POST", "/token", "oauth2.googleapis.com")(_token)
        path = "/v1/projects/{project}/serviceAccounts/{account}/allowedLocations"
        router.route("GET", path, "iamcredentials.googleapis.com")(_allowed_locations)

    def register(self, server: grpc.Server, permissions: Permissions) -> None:
        """Adds the call by which clients learn a project's number."""
        add_service(
            server,
            "google.cloud.resourcemanager.v3.Projects",
            {self.GetProject: GetProjectRequest},
            TABLES,
            permissions,
        )

    def GetProject(self, request, _: grpc.ServicerContext):
        if request.name not in (f"projects/{self._project}", f"projects/{PROJECT_NUMBER}"):
            raise not_found(f"{request.name}: the local cloud has only the project {self._project}.")
        return Project(
            name=f"projects/{PROJECT_NUMBER}",
            project_id=self._project,
            display_name=self._project,
            state=projects.Project.State.ACTIVE,
        )


def _token(request: Request) -> dict:
    # The assertion is a token that the account's key has signed: what names the account is handed on.
    assertion = dict(parse_qsl(request.read().decode())).get("assertion", "local-cloud")
    return {"access_token": assertion, "expires_in": 3600, "token_type": "Bearer"}


def _allowed_locations(_: Request, project: str, account: str) -> dict | Response:
    return {"locations": [], "encodedLocations": "0x0"}
