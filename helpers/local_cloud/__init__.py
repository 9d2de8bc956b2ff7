"""Cloud Storage, Pub/Sub, Vertex AI custom jobs and Dataflow on 127.0.0.1, for Google's unmodified clients.

    python -m helpers.local_cloud COMMAND...    runs COMMAND with this machine in Google Cloud's place
    launch(folder)                              the same for this process, with services in a child process
    start(folder)                               the same, with services in threads of this process

README.md in this folder says what each service imitates and what it does not.
"""

from pathlib import Path

from .child import Child, launch
from .server import DEFAULT_PROJECT, LocalCloud, LocalCloudError

__all__ = ["DEFAULT_PROJECT", "Child", "LocalCloud", "LocalCloudError", "launch", "start"]


def start(
    folder: str | Path, *, project: str = DEFAULT_PROJECT, offline: bool = False, port: int = 0
) -> LocalCloud:
    """Runs the services in threads of this process until `stop()`.

    folder: where objects, logs and work files are kept; made if missing.
    project: the id of the project that the credentials are for.
    offline: refuse every host that is neither Google's nor this machine.
    port: the proxy's port on 127.0.0.1; 0 lets the system choose.

    `.environment` holds the variables that lead clients here. They must be in a process's environment before
    it makes its first Google client. Raises LocalCloudError.
    """
    return LocalCloud(folder, project, offline, port)
