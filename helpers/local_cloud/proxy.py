"""The HTTP proxy before the local cloud: requests to Google's hosts end here, others pass through.

A client that is told of a proxy asks it for a tunnel (CONNECT storage.googleapis.com:443) and then speaks TLS
through it. For Google's hosts the other end of that tunnel is on this machine: the gRPC server when the
client's TLS hello offers HTTP/2 alone, the HTTPS server otherwise. Nothing sent to them leaves the machine.
"""

import base64
import contextlib
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

from .http_server import Router, serve_connection, warn_once

log = logging.getLogger(__name__)

GOOGLE_DOMAINS = ("googleapis.com", "google.com", "google.internal")
# Where a machine on Google Cloud asks for its own credentials, under each of its names.
METADATA_HOSTS = ("metadata", "169.254.169.254", "fd20:ce::254")
HANDSHAKE_SECONDS = 30
MAX_HEAD_BYTES = 64 << 10
PUMP_BYTES = 256 << 10


def is_google_host(host: str) -> bool:
    """Whether requests to `host` are for Google Cloud, or for its metadata server."""
    host = host.lower().strip("[]").rstrip(".")
    return (
        host in METADATA_HOSTS
        or host.endswith(tuple("." + d for d in GOOGLE_DOMAINS))
        or host in GOOGLE_DOMAINS
    )


def is_this_machine(host: str) -> bool:
    """Whether `host` is a loopback address or localhost."""
    host = host.lower().strip("[]").rstrip(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


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


@dataclass(frozen=True)
class Upstream:
    """The proxies that the user's own environment named, before the local cloud took their place."""

    proxies: dict[str, str]

    @classmethod
    def from_environment(cls) -> "Upstream":
        """Reads HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case of letters."""
        return cls(getproxies_environment())

    def proxy_for(self, scheme: str, host: str, port: int) -> str | None:
        """The address of the proxy that stands between this machine and a host; None when nothing does."""
        if is_this_machine(host) or proxy_bypass_environment(f"{host}:{port}", self.proxies):
            return None
        return self.proxies.get(scheme) or self.proxies.get("all")


class Proxy:
    """Listens on 127.0.0.1:`port` (0: any free one) once made, answers after `start()`. Raises OSError."""

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
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

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
                time.sleep(0.05)  # the listener was shut down, or out of file descriptors for a moment
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
        head, rest = _read_head(connection)
        method, target = _request_line(head)
        if method == "CONNECT":
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
        """Passes one plain HTTP request on; the connection ends with its response, so none goes by unseen."""
        remote = self._open("http", host, port)
        line, headers = head.split(b"\r\n", 1)
        method, _, version = line.split(b" ", 2)
        headers = b"Connection: close\r\n" + re.sub(rb"(?im)^(?:proxy-)?connection:.*\r\n", b"", headers)
        address = target
        if proxy := self._upstream.proxy_for("http", host, port):
            headers = _authorization(proxy) + headers
        else:
            url = urlsplit(target)
            address = (url.path or "/") + (f"?{url.query}" if url.query else "")
        remote.sendall(b" ".join((method, address.encode("latin-1"), version)) + b"\r\n" + headers + rest)
        _pump_both_ways(connection, remote)

    def _open(self, scheme: str, host: str, port: int) -> socket.socket:
        """A connection on which a client can speak to a host that is not Google's."""
        if self._offline and not is_this_machine(host):
            raise _refusal(host, "the local cloud runs offline")
        try:
            proxy = self._upstream.proxy_for(scheme, host, port)
            if not proxy:
                return socket.create_connection((host, port), timeout=HANDSHAKE_SECONDS)
            return _through(proxy, host, port, tunnel=scheme == "https")
        except OSError as error:
            raise RefusedError(502, f"{host}:{port}: {error}") from None


def _refusal(host: str, reason: str) -> RefusedError:
    warn_once(f"refused {host}: {reason}")
    return RefusedError(403, f"refused {host}: {reason}")


def _proxy_url(proxy: str) -> SplitResult:
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _authorization(proxy: str) -> bytes:
    url = _proxy_url(proxy)
    if not url.username:
        return b""
    user = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return b"Proxy-Authorization: Basic " + base64.b64encode(user.encode()) + b"\r\n"


def _through(proxy: str, host: str, port: int, tunnel: bool) -> socket.socket:
    """A connection to the user's own proxy, with a tunnel through it to `host` when asked for."""
    url = _proxy_url(proxy)
    if url.scheme != "http" or not url.hostname:
        raise OSError(f"the proxy in your environment must be an http:// address, not {url.scheme}://")
    remote = socket.create_connection((url.hostname, url.port or 80), timeout=HANDSHAKE_SECONDS)
    if tunnel:
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        head = f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n".encode()
        remote.sendall(head + _authorization(proxy) + b"\r\n")
        answer = _read_head(remote)[0].split(b"\r\n", 1)[0].decode("latin-1")
        if answer.split(" ")[1:2] != ["200"]:
            remote.close()
            raise OSError(f"the proxy {url.hostname} answered: {answer}")
    return remote


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """The request line and headers, with their empty line, and what arrived after them."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionError("closed before the end of the headers")
        data += piece
        if len(data) > MAX_HEAD_BYTES:
            raise RefusedError(431, "the headers are too long")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


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
    # Clients show a failed tunnel's status line and nothing else, so the reason stands there too.
    phrase = refusal.reason.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " ")
    head = (
        f"HTTP/1.1 {refusal.status} {phrase}\r\n"
        f"Content-Type: text/plain; charset=UTF-8\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError):
        connection.sendall(head.encode() + body)
