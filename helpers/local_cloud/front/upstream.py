"""The way out to hosts that are not Google's: direct, or through the proxy that the user had before."""

import base64
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

CONNECT_SECONDS = 30
MAX_HEAD_BYTES = 64 << 10


def is_this_machine(host: str) -> bool:
    """Whether `host` is a loopback address or localhost."""
    host = host.lower().strip("[]").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_metadata_server(host: str) -> bool:
    """Whether `host` is the address, however written, of the server that a machine on Google Cloud asks for
    its own credentials."""
    return _address(host) in _METADATA_SERVERS


def is_link_local(host: str) -> bool:
    """Whether `host` is an address, however written, on this machine's own network link: most clouds have
    their metadata servers there."""
    address = _address(host)
    return address is not None and (address.is_link_local or address in _METADATA_SERVERS)


# IPv6 addresses that end in an IPv4 address: mapped, compatible, and those of NAT64 (RFC 4291, RFC 6052).
_EMBEDDING = [ipaddress.ip_network(n) for n in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "::/96")]
_METADATA_SERVERS = (ipaddress.ip_address("169.254.169.254"), ipaddress.ip_address("fd20:ce::254"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host's name stands for without being looked up: `2852039166`, `0xa9fea9fe` and
    `::ffff:169.254.169.254` are all 169.254.169.254."""
    host = host.lower().strip("[]").rstrip(".").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _EMBEDDING):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.sixtofour or address
    return address


@dataclass(frozen=True)
class Upstream:
    """The proxies that the user's own environment named, before the local cloud took their place."""

    proxies: dict[str, str]

    @classmethod
    def from_environment(cls) -> "Upstream":
        """Reads HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case."""
        return cls(getproxies_environment())

    def proxy_for(self, scheme: str, host: str, port: int) -> str | None:
        """The address of the proxy between this machine and a host; None if there is none."""
        if is_this_machine(host) or proxy_bypass_environment(f"{host}:{port}", self.proxies):
            return None
        return self.proxies.get(scheme) or self.proxies.get("all")

    def connect(self, scheme: str, host: str, port: int) -> socket.socket:
        """A connection to a host: direct, or via the user's proxy (a tunnel for "https"). Raises OSError."""
        proxy = self.proxy_for(scheme, host, port)
        if not proxy:
            return _connect(host, port)
        url = _proxy_url(proxy)
        if url.scheme != "http" or not url.hostname:
            raise OSError(f"the proxy in your environment must be an http:// address, not {url.scheme}://")
        remote = socket.create_connection((url.hostname, url.port or 80), timeout=CONNECT_SECONDS)
        if scheme == "https":
            try:
                _ask_for_tunnel(remote, proxy, host, port)
            except BaseException:
                remote.close()
                raise
        return remote


def _connect(host: str, port: int) -> socket.socket:
    """A connection to the first address of a host that answers. Raises OSError."""
    error = OSError(f"{host} has no address")
    for _, _, _, _, (address, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if is_link_local(address):
            raise OSError(f"{host} is {address}, where a machine's own credentials are given out")
        try:
            return socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as failure:
            error = failure
    raise error


def _ask_for_tunnel(remote: socket.socket, proxy: str, host: str, port: int) -> None:
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    head = f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n".encode()
    remote.sendall(head + authorization(proxy) + b"\r\n")
    answer = read_head(remote)[0].split(b"\r\n", 1)[0].decode("latin-1")
    if answer.split(" ")[1:2] != ["200"]:
        raise OSError(f"the proxy {_proxy_url(proxy).hostname} answered: {answer}")


def _proxy_url(proxy: str) -> SplitResult:
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def authorization(proxy: str) -> bytes:
    """The header with the name and password from a proxy's address; empty if it has none."""
    url = _proxy_url(proxy)
    if not url.username:
        return b""
    user = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return b"Proxy-Authorization: Basic " + base64.b64encode(user.encode()) + b"\r\n"


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """The request line and headers, with their empty line, and what arrived after them."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionError("closed before the end of the headers")
        data += piece
        if len(data) > MAX_HEAD_BYTES:
            raise ConnectionError("the headers are too long")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest
