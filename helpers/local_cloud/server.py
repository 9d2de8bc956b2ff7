"""The services, the proxy in front of them, and what starts and stops them together."""

import contextlib
import errno
import os
from concurrent import futures
from pathlib import Path

import grpc

from .cloud_storage import CloudStorage
from .dataflow.service import Dataflow
from .front import certificates, environment
from .front.accounts import Accounts
from .front.http_server import Router, warn_once
from .front.permissions import ACCOUNTS, USER, VERTEX, WORKERS, Permissions, email
from .front.proxy import Proxy
from .front.upstream import Upstream
from .monitoring.service import Monitoring
from .processes.scratch import Scratch
from .pubsub.service import SERVER_THREADS, PubSub
from .vertex_ai.service import VertexAI

DEFAULT_PROJECT = "local-project"
GRPC_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]


class LocalCloudError(RuntimeError):
    """The local cloud cannot start; the message says why and what to do."""


class LocalCloud:
    """The services of this process. `environment` leads clients to them; `storage_root` holds the objects."""

    def __init__(
        self, folder: str | Path, project: str = DEFAULT_PROJECT, offline: bool = False, port: int = 0
    ):
        self.folder = prepare_folder(folder)
        self.project = project
        self.storage_root = self.folder / "storage"
        self._on_stop = contextlib.ExitStack()
        try:
            self._start(offline, port)
        except OSError as error:
            self.stop()
            raise LocalCloudError(f"{self.folder} cannot be used: {error}. Name another folder.") from error
        except BaseException:
            self.stop()
            raise

    def _start(self, offline: bool, port: int) -> None:
        scratch = Scratch(self.folder / "run")
        self._on_stop.callback(scratch.remove)
        certificate = certificates.make_certificate()
        grpc_server = grpc.server(futures.ThreadPoolExecutor(SERVER_THREADS), options=GRPC_OPTIONS)
        self._on_stop.callback(lambda: grpc_server.stop(grace=0.5).wait(5))
        identity = grpc.ssl_server_credentials([(certificate.key, certificate.certificate)])
        router = Router()
        try:
            proxy = Proxy(
                port,
                tls=certificates.server_context(certificate, scratch.path),
                router=router,
                grpc_port=grpc_server.add_secure_port("127.0.0.1:0", identity),
                offline=offline,
                upstream=Upstream.from_environment(),
            )
        except (OSError, OverflowError) as error:
            raise _port_error(port, error) from None
        self._on_stop.callback(proxy.stop)
        permissions = Permissions(self.folder, self.project)
        keys = {
            account: certificates.write_private(
                scratch.path / f"{account}.json",
                certificates.service_account(self.project, email(account, self.project)),
            )
            for account in ACCOUNTS
        }
        ca_file = scratch.path / "ca.pem"
        ca_file.write_bytes(environment.ca_bundle(certificate.authority))
        self.environment = environment.variables(
            proxy_url=proxy.url,
            ca_file=ca_file,
            credentials=keys[USER],
            folder=self.folder,
            project=self.project,
            offline=offline,
        )
        self._add_services(grpc_server, router, permissions, keys)
        grpc_server.start()
        proxy.start()

    def _add_services(
        self, grpc_server: grpc.Server, router: Router, permissions: Permissions, keys: dict[str, Path]
    ) -> None:
        accounts = Accounts(self.project)
        accounts.routes(router)
        accounts.register(grpc_server, permissions)

        def environment_of(account: str) -> dict[str, str]:
            """A process's environment, with an account of its own."""
            key = {"GOOGLE_APPLICATION_CREDENTIALS": str(keys[account])}
            return {**os.environ, **self.environment, **key}

        pubsub = PubSub()
        for service in (
            pubsub,
            Monitoring(pubsub.waiting),
            VertexAI(self.folder / "vertex_ai", self.storage_root, environment_of(VERTEX)),
            Dataflow(self.folder / "dataflow", self.storage_root, environment_of(WORKERS)),
        ):
            service.register(grpc_server, permissions)
            self._on_stop.callback(service.stop)
        grpc_server.add_generic_rpc_handlers((_NotImitated(),))
        storage = CloudStorage(self.storage_root, permissions)
        self._on_stop.callback(storage.stop)
        storage.routes(router)

    def stop(self) -> None:
        """Ends every service and every process they started, and removes the throw-away keys.

        Objects stay.
        """
        self._on_stop.close()

    def __enter__(self) -> "LocalCloud":
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class _NotImitated(grpc.GenericRpcHandler):
    """Answers the calls that no service handles."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def refuse(_, context: grpc.ServicerContext):
            warn_once(f"not imitated by the local cloud: {details.method}")
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED, f"{details.method} is not imitated by the local cloud."
            )

        # Nothing is read or written, so the most general kind of call serves for all four.
        return grpc.stream_stream_rpc_method_handler(refuse)


def prepare_folder(folder: str | Path) -> Path:
    """The folder, made if it is missing. Raises LocalCloudError when it cannot be written to."""
    folder = Path(folder).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise LocalCloudError(f"{folder} cannot be used: {error.strerror}. Name another folder.") from None
    if not writable:
        raise LocalCloudError(f"{folder} cannot be written to. Name another folder.")
    return folder


def _port_error(port: int, error: Exception) -> LocalCloudError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return LocalCloudError(
            f"Port {port} is taken. Name another, or none: the system then chooses a free one."
        )
    return LocalCloudError(f"Port {port} cannot be used: {error}. Name another, or none.")
