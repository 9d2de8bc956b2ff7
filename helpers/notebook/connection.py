"""A notebook's connection to Google Cloud, or to this machine's local cloud."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import local_cloud
from helpers.files import access
from helpers.files.buckets import make_bucket
from helpers.files.cache import cache_folder
from helpers.notebook.interaction import check_types
from helpers.notebook.scratch import keep_temporary_files

_local: local_cloud.Child | None = None
_google_project = ""


class ConnectionFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The project cannot be reached; the message says what to do."""


@dataclass(frozen=True)
class Connection:
    """Where a notebook runs its cloud part.

    Attributes:
        project: the project's id.
        location: the region, for instance `us-central1`.
        bucket: the name of a bucket that exists.
        is_local: whether this machine stands in for Google Cloud.
    """

    project: str
    location: str
    bucket: str
    is_local: bool

    def gs(self, *parts: str) -> str:
        """A path in the bucket: `gs("temp")` is `gs://BUCKET/temp`."""
        return "/".join([f"gs://{self.bucket}", *parts])

    def removal(self, *paths: str) -> str:
        """The command that removes what a notebook leaves in the bucket: to be copied as it is."""
        if self.is_local:  # gcloud does not know it
            return "make clean"
        return f"gcloud storage rm --recursive {shlex.join(paths)}"

    def state_dict_path(self, model_name: str) -> str:
        """Where the series keeps a model's state dict: `gs://BUCKET/run-inference/MODEL.pt`."""
        # The name may be a path, whose last part is the model's name.
        name = Path(model_name).expanduser().resolve().name if Path(model_name).is_dir() else model_name
        return self.gs("run-inference", f"{name}.pt")


def connect(project: str = "", location: str = "us-central1", bucket: str = "") -> Connection:
    """Connects to a Google Cloud project, or, if `project` is empty, to this machine's local cloud.

    Safe to call again: a second call with the same project finds everything in place.

    Args:
        project: a project's id; empty means this machine, where nothing costs anything.
        location: the region for the bucket and the jobs.
        bucket: a bucket's name, made if it does not exist; empty means `PROJECT-streaming-llm`.

    Raises:
        ConnectionFailed: no credentials, no access to the bucket, or this kernel is connected elsewhere.
    """
    global _google_project
    _check(project, location, bucket)
    if shell := _shell():
        check_types(shell.user_ns)
        keep_temporary_files()
    quiet()
    is_local = not project
    if is_local and _google_project:
        # Clients that exist already would go on talking to Google.
        raise ConnectionFailed(
            f"This kernel is connected to the project {_google_project!r}. To use this machine instead, "
            "restart the kernel and run the notebook from the top."
        )
    if is_local:
        _offer_project()
        project = _connect_to_this_machine()
    elif _local is not None or "LOCAL_CLOUD_PROJECT" in os.environ:
        raise ConnectionFailed(
            f"This kernel is connected to this machine's local cloud. To use the project {project!r}, "
            "restart the kernel and run the notebook from the top."
        )
    elif "google.colab" in sys.modules:
        from google.colab import auth

        auth.authenticate_user(project_id=project)
    connection = Connection(project, location, bucket or f"{project}-streaming-llm", is_local)
    _explain_denied_calls(project)
    if not is_local:
        _google_project = project
    _create_bucket(connection)
    return connection


def _check(project: str, location: str, bucket: str) -> None:
    """What cannot be a name is refused before anything is asked of anyone."""
    for name, value in {"project": project, "location": location, "bucket": bucket}.items():
        if not isinstance(value, str):
            raise ConnectionFailed(
                f"The parameter {name} is {value!r}, and it must be text: put it in quotes. (On papermill's "
                f"command line: -r {name} {value} rather than -p.)"
            )
    if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]{1,2}", location):
        raise ConnectionFailed(
            f"location = {location!r} is not the name of a region: set it to one such as us-central1 or "
            "europe-west4 (https://cloud.google.com/dataflow/docs/resources/locations)."
        )


def _shell() -> Any:
    """The kernel's interactive shell; None outside a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _explain_denied_calls(project: str) -> None:
    """Has the kernel show the missing role in place of a client's traceback."""
    shell = _shell()
    if shell is None:
        return
    from google.api_core.exceptions import Forbidden

    def show(shell, kind, error, traceback, tb_offset=None) -> list[str]:
        text = f"{kind.__name__}: {access.explain(error, project)}"
        shell._showtraceback(kind, text, [text])
        return [text]

    shell.set_custom_exc((Forbidden,), show)


def _offer_project() -> None:
    """Colab Enterprise and Workbench name their project; only the parameter decides where anything runs."""
    theirs = os.environ.get("GOOGLE_CLOUD_PROJECT")
    if theirs and "LOCAL_CLOUD_PROJECT" not in os.environ:
        print(f'Everything runs on this machine. To use Google Cloud, set project = "{theirs}" or another.')


def _connect_to_this_machine() -> str:
    """Starts the local cloud, once in this kernel; returns its project's id."""
    global _local
    if _local is not None and not _local.is_running:
        # A new one would have new certificates, and gRPC reads its trusted certificates only once.
        raise ConnectionFailed(
            "This machine's local cloud has stopped: restart the kernel and run the notebook from the top."
        )
    if "LOCAL_CLOUD_PROJECT" in os.environ:  # started by an earlier call, or around this process
        return os.environ["LOCAL_CLOUD_PROJECT"]
    _local = local_cloud.launch(_local_cloud_folder())
    atexit.register(_local.stop)
    os.environ.update(_local.environment)
    return _local.project


def _local_cloud_folder() -> Path:
    """In the repository, so that every checkout has its own; else in the user's cache."""
    repository = Path(__file__).parents[2]
    if (repository / "pyproject.toml").is_file() and os.access(repository, os.W_OK):
        return repository / ".local_cloud"
    return cache_folder("local_cloud")


def _create_bucket(connection: Connection) -> None:
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        client = storage.Client(project=connection.project)
        if client.lookup_bucket(connection.bucket) is None:
            make_bucket(client, connection.bucket, connection.location)
    except GoogleAuthError as error:
        raise ConnectionFailed(
            f"There are no credentials for Google Cloud here: {access.log_in()}, or leave the parameter "
            f'project empty (project = "") to use this machine. ({error})'
        ) from error
    except (ValueError, exceptions.BadRequest) as error:
        said = getattr(error, "message", error)
        raise ConnectionFailed(
            f"{connection.bucket!r} is not a valid bucket name, or {connection.location!r} no place for it: "
            "use 3 to 63 lower-case letters, digits and dashes, with a letter or digit at both ends. "
            f"({said})"
        ) from error
    except exceptions.Conflict as error:
        raise ConnectionFailed(
            f"The bucket {connection.bucket!r} is someone else's: set the parameter bucket to another name."
        ) from error
    except exceptions.Forbidden as error:
        todo = access.advice(error.message, connection.project, "storage.buckets.create")
        if "storage.buckets.get" in error.message:
            todo += ", unless the bucket is someone else's: then set the parameter bucket to another name"
        raise ConnectionFailed(
            f"The bucket {connection.bucket!r} of project {connection.project!r} cannot be used: {todo}. "
            f"({error.message})"
        ) from error
    except exceptions.PreconditionFailed as error:
        raise ConnectionFailed(
            f"The organisation of {connection.project!r} does not allow a bucket such as "
            f"{connection.bucket!r}: have its administrator make one, and set the parameter bucket to its "
            f"name. ({error.message})"
        ) from error
    except exceptions.GoogleAPICallError as error:
        raise ConnectionFailed(
            f"The bucket {connection.bucket!r} of project {connection.project!r} cannot be used: check the "
            f"project's id, and that you may create buckets in it. ({error.message})"
        ) from error


def quiet() -> None:
    """Hides messages that a notebook's reader can do nothing about; errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # gRPC reports every fork of a process that uses it, and every connection that a peer closes.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("apache_beam", "google", "root", "helpers"):
        logging.getLogger(name if name != "root" else None).setLevel(logging.ERROR)
