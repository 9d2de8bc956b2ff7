"""The HTTP proxy in front of the local cloud: requests to Google's hosts end here, others pass through.

A client that is given a proxy asks it for a tunnel (CONNECT storage.googleapis.com:443) and then speaks TLS
through it. For Google's hosts the other end of that tunnel is on this machine: the gRPC server if the
client's TLS hello offers only HTTP/2, the HTTPS server otherwise. Nothing sent to them leaves the machine.
"""

import contextlib
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from .http_server import Router, serve_connection, warn_once
from .upstream import Upstream, authorization, is_link_local, is_metadata_server, is_this_machine, read_head

log = logging.getLogger(__name__)

GOOGLE_DOMAINS = ("googleapis.com", "google.com", "google.internal")
METADATA_HOST = "metadata"  # a short name of the server that a machine asks for its own credentials
HANDSHAKE_SECONDS = 30
PUMP_BYTES = 256 << 10


def is_google_host(host: str) -> bool:
    """Whether requests to `host` are for Google Cloud, or for its metadata server."""
    host = host.lower().strip("[]").rstrip(".")
    return (
        host == METADATA_HOST
        or is_metadata_server(host)
        or host.endswith(tuple("." + d for d in GOOGLE_DOMAINS))
        or host in GOOGLE_DOMAINS
    )


def alpn_protocols(client_hello: bytes) -> list[str]:
    """The protocols that a TLS ClientHello record offers, if any (RFC 8446 section 4.1.2, RFC 7301)."""
    try:
        at = 5 + 4 + 2 + 32  # record header, handshake header, version, random
        at += 1 + client_hello[at]  # session id
        at += 2 + int.from_bytes(client_hello[at : at + 2])  # cipher suites
        at += 1 + client_hello[at]  # compression methods
        at += 2  # length of the extensions
        while at + 4 <= len(client_hello):
            kind, size = (
                int.from_bytes(client_hello[at : at + 2]),
                int.from_bytes(client_hello[at + 2 : at + 4]),
            )
            if kind == 16 and at + 4 + size <= len(client_hello):
                names, protocols = client_hello[at + 6 : at + 4 + size], []
                while names:
                    protocols.append(names[1 : 1 + names[0]].decode("latin-1"))
                    names = names[1 + names[0] :]
                return protocols
            at += 4 + size
    except IndexError:
        pass
    return []


class RefusedError(Exception):
    """The proxy answers a request with this status and reason instead of passing it on."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Proxy:
    """Listens on 127.0.0.1:`port` (0: any free one) once made; answers after `start()`. Raises OSError."""

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext,
        router: Router,
        grpc_port: int,
        offline: bool,
        upstream: Upstream,
    ):
        self._tls = tls
        self._router = router
        self._grpc_port = grpc_port
        self._offline = offline
        self._upstream = upstream
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Accepts connections in a thread until `stop()`."""
        threading.Thread(target=self._accept, name="local-cloud-proxy", daemon=True).start()

    def stop(self) -> None:
        """Closes the listening socket and every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); close() alone does not
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own shutdown: that one takes the session away from the thread using it.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() == -1:
                    return
                time.sleep(0.05)  # the listener was shut down, or file descriptors ran out for a moment
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @contextlib.contextmanager
    def _tracked(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with self._tracked(connection):
            try:
                connection.settimeout(HANDSHAKE_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._dispatch(connection)
            except RefusedError as refusal:
                _answer(connection, refusal)
            except OSError as error:
                log.debug("connection lost: %s", error)
            except Exception:
                log.exception("a connection failed")

    def _dispatch(self, connection: socket.socket) -> None:
        head, rest = read_head(connection)
        method, target = _request_line(head)
        if method == "CONNECT":
            if rest:
                raise RefusedError(400, "bytes were sent before the tunnel was open")
            host, port = _host_and_port("//" + target, 443)
            if is_google_host(host):
                self._tunnel_to_this_machine(connection)
            else:
                remote = self._open("https", host, port)
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                _pump_both_ways(connection, remote)
        elif target.startswith("/"):
            # A client that takes this port for the metadata server, as it was told to, or a person with a
            # browser.
            raise RefusedError(404, f"{method} {target}: this is the local cloud's proxy, not a web server")
        else:
            host, port = _host_and_port(target, 80)
            if is_google_host(host):
                raise _refusal(host, "plain HTTP to Google's hosts is not imitated: use https")
            self._forward(connection, head, rest, target, host, port)

    def _tunnel_to_this_machine(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        if "h2" in (offered := alpn_protocols(_peek_client_hello(connection))) and "http/1.1" not in offered:
            _pump_both_ways(connection, socket.create_connection(("127.0.0.1", self._grpc_port)))
        else:
            tls = self._tls.wrap_socket(connection, server_side=True)
            with self._tracked(tls):
                serve_connection(tls, self._router)

    def _forward(self, connection, head: bytes, rest: bytes, target: str, host: str, port: int) -> None:
        """Forwards one plain HTTP request; the connection ends with its response, so none slips by unseen."""
        remote = self._open("http", host, port)
        line, headers = head.split(b"\r\n", 1)
        method, _, version = line.split(b" ", 2)
        headers = b"Connection: close\r\n" + re.sub(rb"(?im)^(?:proxy-)?connection:.*\r\n", b"", headers)
        address = target
        if proxy := self._upstream.proxy_for("http", host, port):
            headers = authorization(proxy) + headers
        else:
            url = urlsplit(target)
            address = (url.path or "/") + (f"?{url.query}" if url.query else "")
        remote.sendall(b" ".join((method, address.encode("latin-1"), version)) + b"\r\n" + headers + rest)
        _pump_both_ways(connection, remote)

    def _open(self, scheme: str, host: str, port: int) -> socket.socket:
        """A connection on which a client can speak to a host that is not Google's."""
        if is_link_local(host):
            raise _refusal(host, "machines have their metadata servers on such addresses")
        if self._offline and not is_this_machine(host):
            raise _refusal(host, "the local cloud runs offline")
        if is_this_machine(host) and port == self._port:
            raise _refusal(host, "this is the proxy itself")
        try:
            return self._upstream.connect(scheme, host, port)
        except OSError as error:
            raise RefusedError(502, f"{host}:{port}: {error}") from None


def _refusal(host: str, reason: str) -> RefusedError:
    warn_once(f"refused {host}: {reason}")
    return RefusedError(403, f"refused {host}: {reason}")


def _request_line(head: bytes) -> tuple[str, str]:
    parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(parts) != 3:
        raise RefusedError(400, "not an HTTP request")
    return parts[0], parts[1]


def _host_and_port(url: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or default
    except ValueError:
        host, port = None, default
    if not host:
        raise RefusedError(400, f"no host in {url}")
    return host, port


def _peek_client_hello(connection: socket.socket) -> bytes:
    """The client's first TLS record, left in place for the server that the connection goes to."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    wanted = 5
    while time.monotonic() < deadline:
        data = connection.recv(wanted, socket.MSG_PEEK)
        if not data:
            raise ConnectionError("closed before the TLS handshake")
        if len(data) < wanted:
            time.sleep(0.001)
        elif wanted == 5:
            wanted += int.from_bytes(data[3:5])
        else:
            return data
    raise TimeoutError("no TLS handshake")


def _pump_both_ways(client: socket.socket, remote: socket.socket) -> None:
    for end in (client, remote):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with remote:
        back = threading.Thread(target=_pump, args=(remote, client), daemon=True)
        back.start()
        _pump(client, remote)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(PUMP_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _answer(connection: socket.socket, refusal: RefusedError) -> None:
    body = f"{refusal.reason}\n".encode()
    # Clients show only the status line of a failed tunnel, so the reason goes there too.
    phrase = refusal.reason.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " ")
    head = (
        f"HTTP/1.1 {refusal.status} {phrase}\r\n"
        f"Content-Type: text/plain; charset=UTF-8\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError):
        connection.sendall(head.encode() + body)
