"""The environment variables that make unmodified clients talk to the local cloud and trust it."""

import os
from pathlib import Path

import certifi

from .proxy import GOOGLE_DOMAINS, is_google_host

# Variables a user may have set that would lead clients past the proxy, with values that undo their effect.
# PUBSUB_EMULATOR_HOST is not among them: users who run their own emulator keep it.
NEUTRAL = {
    "STORAGE_EMULATOR_HOST": "",
    "API_ENDPOINT_OVERRIDE": "https://storage.googleapis.com",
    "GOOGLE_CLOUD_UNIVERSE_DOMAIN": "googleapis.com",
    "GOOGLE_API_USE_MTLS_ENDPOINT": "never",
    "GOOGLE_API_USE_CLIENT_CERTIFICATE": "false",
    "GOOGLE_CLOUD_QUOTA_PROJECT": "",
}
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")


def ca_bundle(authority: bytes) -> bytes:
    """The throw-away authority's certificate and those this process already trusts (certifi's by default)."""
    paths = list(dict.fromkeys(os.environ[name] for name in CA_VARIABLES if os.environ.get(name)))
    trusted = [text for path in paths for text in _certificates(Path(path))]
    return b"\n".join([authority, *(trusted or [Path(certifi.where()).read_bytes()])])


def _certificates(path: Path) -> list[bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    texts = [file.read_bytes() for file in files if file.is_file()]
    return list(dict.fromkeys(text for text in texts if b"-----BEGIN CERTIFICATE-----" in text))


def variables(
    *, proxy_url: str, ca_file: Path, credentials: Path, folder: Path, project: str, offline: bool
) -> dict[str, str]:
    """What to add to a process's environment. An empty value stands for an unset variable."""
    address = proxy_url.removeprefix("http://")
    environment = {
        "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        "GOOGLE_CLOUD_PROJECT": project,
        # Clients ask the metadata server directly, not through a proxy: lead them to a port that knows
        # nothing.
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": address,
        "GCE_METADATA_IP": address,
        "LOCAL_CLOUD_DIR": str(folder),
        "LOCAL_CLOUD_PROJECT": project,
    }
    # gRPC and curl read only the lower-case names; other clients prefer one or the other.
    bypass = no_proxy(offline)
    for name, value in (("HTTPS_PROXY", proxy_url), ("HTTP_PROXY", proxy_url), ("NO_PROXY", bypass)):
        environment[name] = environment[name.lower()] = value
    for name, value in (("grpc_proxy", proxy_url), ("no_grpc_proxy", bypass)):  # override the general ones
        if os.environ.get(name) is not None:
            environment[name] = value
    for name in (*CA_VARIABLES, "HTTPLIB2_CA_CERTS", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"):
        environment[name] = str(ca_file)
    environment.update({name: value for name, value in NEUTRAL.items() if os.environ.get(name)})
    return environment


def no_proxy(offline: bool) -> str:
    """NO_PROXY: this machine and the user's own entries, save Google's hosts; offline, this machine alone."""
    hosts = ["127.0.0.1", "localhost"]
    if not offline:
        users = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        hosts += [
            host
            for host in (entry.strip() for entry in users.split(","))
            if host and not _covers_google(host)
        ]
    return ",".join(dict.fromkeys(hosts))


def _covers_google(entry: str) -> bool:
    host = entry.lower().partition(":")[0].lstrip("*.")
    return (
        not host
        or is_google_host(host)
        or any(f".{domain}".endswith(f".{host}") for domain in GOOGLE_DOMAINS)
    )
