"""The local cloud itself: where requests go, what processes it leaves, its command line."""

import errno
import io
import json
import os
import pty
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import psutil
import pytest
import requests
from conftest import strays, wait_until
from google.api_core import exceptions
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.local_cloud import Child, LocalCloudError, launch, start
from helpers.local_cloud.front.certificates import make_certificate, server_context
from helpers.local_cloud.front.environment import no_proxy
from helpers.local_cloud.front.http_server import Request, Router
from helpers.local_cloud.front.proxy import alpn_protocols, is_google_host
from helpers.local_cloud.front.upstream import Upstream

PROXY_VARIABLES = [
    name for word in ("http", "https", "all", "no") for name in (f"{word}_proxy", f"{word.upper()}_PROXY")
]


@pytest.fixture
def no_user_proxy(monkeypatch):
    """As if the user had no proxy, whatever else the tests have set."""
    for name in (*PROXY_VARIABLES, "grpc_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> Iterator[Child]:
    """A local cloud that lets other hosts through, on a machine whose user has no proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PROXY_VARIABLES, "grpc_proxy", "no_grpc_proxy"):
            patch.delenv(name, raising=False)
        child = launch(tmp_path_factory.mktemp("online"))
    with child:
        yield child


# A server and a proxy of the tests' own


class Server:
    """Answers each connection on 127.0.0.1 with `reply`, and keeps the heads that it was sent."""

    def __init__(self, reply: bytes, tls: ssl.SSLContext | None = None):
        self.reply = reply
        self.tls = tls
        self.heads: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
                connection.settimeout(10)
                if self.tls:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                with connection:
                    head = b""
                    while b"\r\n\r\n" not in head and (data := connection.recv(4096)):
                        head += data
                    self.heads.append(head.decode())
                    connection.sendall(self.reply)
            except OSError:
                if self.listener.fileno() == -1:
                    return

    def stop(self):
        self.listener.close()


@pytest.fixture
def server():
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
    yield server
    server.stop()


def ask_proxy(environment: dict[str, str], request: str) -> tuple[socket.socket, str]:
    """Sends a request to the proxy by hand; returns the connection and the head of the answer."""
    port = int(environment["HTTPS_PROXY"].rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), timeout=300)
    connection.sendall(f"{request} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n") and (data := connection.recv(1)):
        head += data
    return connection, head.decode()


# Malformed requests


def send_raw(cloud, head: str, body: bytes = b"") -> bytes:
    """Sends bytes to the HTTPS server, through the proxy; returns the whole answer."""
    connection, _ = ask_proxy(cloud.environment, "CONNECT storage.googleapis.com:443")
    tls = ssl.create_default_context(cafile=cloud.environment["SSL_CERT_FILE"])
    with connection, tls.wrap_socket(connection, server_hostname="storage.googleapis.com") as encrypted:
        encrypted.settimeout(20)
        encrypted.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
        answer = b""
        while data := encrypted.recv(65536):
            answer += data
        return answer


POST = "POST /storage/v1/b?project=p HTTP/1.1\nHost: storage.googleapis.com\nConnection: close\n"
LIST = "GET /storage/v1/b/malformed/o?{} HTTP/1.1\nHost: storage.googleapis.com\nConnection: close\n\n"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("GET http://[x/ HTTP/1.1\nHost: storage.googleapis.com\n\n", b""),
        (POST + "Content-Length: -5\n\n", b""),
        (POST + "Content-Length: 5x\n\n", b"12345"),
        (POST + "Content-Length: 5\nContent-Length: 6\n\n", b"123456"),
        (POST + "Transfer-Encoding: chunked\n\n", b"-1\r\n\r\n"),
        (POST + "Transfer-Encoding: chunked\n\n", b"fffffffffffffff\r\nabc"),
        (POST + "Transfer-Encoding: chunked\nContent-Length: 5\n\n", b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
        (POST + "Content-Length: 100000\n\n", b"[" * 100_000),
        (POST + "Content-Length: 14\n\n", b'{"name": ["x"]}'[:14]),
        (POST + "Content-Length: 30\n\n", b'{"name":"abc","location":[1]} '),
        (LIST.format("maxResults=" + "9" * 5000), b""),
        (LIST.format("pageToken=zz"), b""),
        (LIST.format("prefix=%ff"), b""),
    ],
)
def test_a_malformed_request_is_answered_with_400(head, body, cloud, storage_client):
    if not storage_client.lookup_bucket("malformed"):
        storage_client.create_bucket("malformed")
    assert send_raw(cloud, head, body).split(b"\r\n")[0] == b"HTTP/1.1 400 Bad Request"


# Google's hosts


@pytest.mark.parametrize(
    "host",
    [
        "storage.googleapis.com",
        "STORAGE.GoogleApis.com.",
        "us-central1-aiplatform.googleapis.com",
        "googleapis.com",
        "accounts.google.com",
        "metadata.google.internal",
        "metadata",
        "169.254.169.254",
        "[fd20:ce::254]",
    ],
)
def test_google_hosts_are_known(host):
    assert is_google_host(host)


@pytest.mark.parametrize(
    "host",
    ["googleapis.com.example.org", "notgoogleapis.com", "example.org", "metadata.example.org", "169.254.1.1"],
)
def test_lookalikes_are_not_googles(host):
    assert not is_google_host(host)


@pytest.mark.parametrize("protocols", [[], ["h2"], ["http/1.1"], ["h2", "http/1.1"], ["grpc-exp", "h2"]])
def test_the_protocols_of_a_real_tls_hello(protocols):
    context = ssl.create_default_context()
    if protocols:
        context.set_alpn_protocols(protocols)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="h2.example.org")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    assert alpn_protocols(hello) == protocols
    for size in range(0, len(hello), 7):
        assert alpn_protocols(hello[:size]) in ([], protocols)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_can_stand_where_a_tls_hello_should(data):
    alpn_protocols(data)


def test_calls_that_are_not_imitated_say_so(cloud):
    answer = requests.post(
        "https://bigquery.googleapis.com/bigquery/v2/projects/p/jobs", data=b"x", timeout=300
    )
    assert answer.status_code == 501
    assert "POST bigquery.googleapis.com/bigquery/v2/projects/p/jobs is not imitated" in answer.text
    assert answer.json()["error"]["status"] == "UNIMPLEMENTED"


def test_grpc_calls_that_are_not_imitated_say_so(cloud):
    from google.cloud import secretmanager

    with pytest.raises(exceptions.MethodNotImplemented, match=r"ListSecrets is not imitated"):
        next(iter(secretmanager.SecretManagerServiceClient().list_secrets(parent="projects/p", timeout=300)))


def test_tokens_come_from_this_machine_and_the_project_has_a_number(cloud, bucket):
    import google.auth
    from google.auth.transport.requests import Request
    from google.cloud import resourcemanager_v3

    credentials, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    credentials.refresh(Request())
    assert project == cloud.project
    assert credentials.token
    found = resourcemanager_v3.ProjectsClient().get_project(name=f"projects/{cloud.project}")
    assert found.name == f"projects/{bucket.project_number}"


@pytest.mark.parametrize(
    "url",
    [
        "http://storage.googleapis.com/storage/v1/b",
        "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token",
        "http://169.254.169.254/computeMetadata/v1/",
        "http://metadata/computeMetadata/v1/",
    ],
)
def test_plain_http_to_googles_hosts_is_refused(cloud, url):
    answer = requests.get(url, headers={"Metadata-Flavor": "Google"}, timeout=300)
    assert answer.status_code == 403
    assert "plain HTTP" in answer.text


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.254.43518",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::1]",
        "[fd20:ce::254]",
        "169.254.170.2",
        "[fe80::1]",
    ],
)
def test_no_spelling_of_a_metadata_servers_address_gets_out(host, online):
    for request in (f"GET http://{host}/computeMetadata/v1/", f"CONNECT {host}:80"):
        connection, head = ask_proxy(online.environment, request)
        connection.close()
        # A tunnel to Google's own metadata server ends on this machine.
        assert head.startswith(("HTTP/1.1 403 refused", "HTTP/1.1 200 Connection established")), head
        assert request.startswith("CONNECT") or "403" in head


def test_a_host_whose_name_leads_to_a_metadata_server_is_refused(monkeypatch):
    def resolve(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(OSError, match="own credentials"):
        Upstream({}).connect("http", "innocent.example", 80)


def test_the_proxy_does_not_call_itself(cloud):
    port = cloud.environment["HTTPS_PROXY"].rpartition(":")[2]
    connection, head = ask_proxy(cloud.environment, f"CONNECT 127.0.0.1:{port}")
    connection.close()
    assert head.startswith("HTTP/1.1 403 refused 127.0.0.1: this is the proxy itself")


def test_who_asks_the_metadata_server_directly_finds_none(cloud):
    host = cloud.environment["GCE_METADATA_HOST"]
    assert host.startswith("127.0.0.1:")
    answer = requests.get(f"http://{host}/computeMetadata/v1/", timeout=300)
    assert answer.status_code == 404
    assert "Metadata-Flavor" not in answer.headers


def test_a_full_disk_is_an_error_that_clients_do_not_repeat():
    router = Router()

    @router.route("GET", "/full")
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    answer = router.answer(Request("GET", "/full", Message(), io.BytesIO()))
    assert (answer.status, b"disk is full" in answer.body) == (507, True)


# Other hosts


def test_other_hosts_pass_through(server, no_user_proxy, tmp_path):
    certificate = make_certificate()
    tls = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret", server_context(certificate, tmp_path))
    with start(tmp_path / "cloud") as cloud:
        connection, head = ask_proxy(cloud.environment, f"CONNECT 127.0.0.1:{tls.port}")
        assert head.startswith("HTTP/1.1 200")
        client = ssl.create_default_context(cadata=certificate.authority.decode())
        with client.wrap_socket(connection, server_hostname="www.googleapis.com") as secure:
            secure.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert secure.recv(4096).endswith(b"secret")
        connection, head = ask_proxy(cloud.environment, f"GET http://127.0.0.1:{server.port}/path?a=b")
        with connection:
            assert (head.split("\r\n")[0], connection.recv(100)) == ("HTTP/1.1 200 OK", b"hello")
        assert server.heads[0].startswith("GET /path?a=b HTTP/1.1\r\nConnection: close\r\n")
        assert cloud.environment["NO_PROXY"] == "127.0.0.1,localhost"
    tls.stop()


@pytest.mark.parametrize("request_", ["CONNECT example.org:443", "GET http://example.org/"])
def test_offline_other_hosts_are_refused_with_the_reason(cloud, request_):
    connection, head = ask_proxy(cloud.environment, request_)
    connection.close()
    assert head.startswith("HTTP/1.1 403 refused example.org: the local cloud runs offline")


def test_offline_a_client_shows_the_reason(cloud):
    with pytest.raises(
        requests.exceptions.ProxyError, match=r"refused example\.org: the local cloud runs offline"
    ):
        requests.get("https://example.org/", timeout=300)


def test_offline_this_machine_is_still_reachable(cloud, server):
    assert requests.get(f"http://127.0.0.1:{server.port}/", timeout=300).text == "hello"
    connection, head = ask_proxy(cloud.environment, f"CONNECT 127.0.0.1:{server.port}")
    connection.close()
    assert head.startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("nonsense", "400"),
        ("GET /", "404"),
        ("CONNECT", "400"),
        ("CONNECT :443", "400"),
        ("GET http://:x/", "400"),
    ],
)
def test_what_is_no_proxy_request_is_answered(cloud, request_, status):
    connection, head = ask_proxy(cloud.environment, request_)
    connection.close()
    assert head.split(" ")[1] == status


def test_a_host_that_cannot_be_reached_is_named(no_user_proxy, tmp_path):
    with socket.socket() as unused, start(tmp_path) as cloud:
        unused.bind(("127.0.0.1", 0))
        connection, head = ask_proxy(cloud.environment, f"CONNECT 127.0.0.1:{unused.getsockname()[1]}")
        connection.close()
    assert head.startswith("HTTP/1.1 502 127.0.0.1:")
    assert "refused" in head


def test_the_users_own_proxy_is_used_for_other_hosts_only(no_user_proxy, monkeypatch, tmp_path):
    upstream = Server(b"HTTP/1.1 200 OK\r\n\r\n")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@127.0.0.1:{upstream.port}")
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{upstream.port}")
    monkeypatch.setenv("NO_PROXY", "direct.invalid")
    with start(tmp_path) as cloud:
        for request in (
            "CONNECT example.org:443",
            "GET http://example.org/x",
            "CONNECT storage.googleapis.com:443",
        ):
            connection, head = ask_proxy(cloud.environment, request)
            connection.close()
            assert head.startswith("HTTP/1.1 200")
        connection, head = ask_proxy(cloud.environment, "CONNECT direct.invalid:443")
        connection.close()
        assert head.startswith("HTTP/1.1 502")
    upstream.stop()
    tunnel, plain = upstream.heads
    assert tunnel.startswith("CONNECT example.org:443 HTTP/1.1")
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in tunnel  # me:p@ss
    assert plain.startswith("GET http://example.org/x HTTP/1.1")


def test_what_the_users_own_proxy_refuses_is_reported(no_user_proxy, monkeypatch, tmp_path):
    upstream = Server(b"HTTP/1.1 407 Who are you\r\n\r\n")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{upstream.port}")
    with start(tmp_path) as cloud:
        connection, head = ask_proxy(cloud.environment, "CONNECT example.org:443")
        connection.close()
    upstream.stop()
    assert head.startswith("HTTP/1.1 502")
    assert "407 Who are you" in head


# The environment


def test_hosts_of_googles_do_not_slip_past_the_proxy(no_user_proxy, monkeypatch):
    monkeypatch.setenv(
        "NO_PROXY", "*, .googleapis.com,storage.googleapis.com:443, com,internal.example,*.google.com"
    )
    assert no_proxy(offline=False) == "127.0.0.1,localhost,internal.example"
    assert no_proxy(offline=True) == "127.0.0.1,localhost"


def test_variables_that_lead_elsewhere_lose_their_effect(monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", "http://127.0.0.1:1")
    monkeypatch.setenv("GOOGLE_API_USE_MTLS_ENDPOINT", "always")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    program = """if True:
        from google.cloud import storage
        storage.Client().create_bucket("reached").blob("x").upload_from_string("x")
    """
    with launch(tmp_path) as cloud:
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **cloud.environment}, check=True, timeout=300
        )
        assert (cloud.storage_root / "reached/x").read_text() == "x"
    assert (
        "PUBSUB_EMULATOR_HOST" not in cloud.environment
    )  # a Pub/Sub emulator of the user's own stays theirs
    assert cloud.environment["grpc_proxy"] == cloud.environment["HTTPS_PROXY"]


def test_the_authorities_trusted_before_are_trusted_still(monkeypatch, tmp_path):
    users = make_certificate().authority
    (tmp_path / "corporate.pem").write_bytes(users)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "corporate.pem"))
    with start(tmp_path / "cloud") as cloud:
        bundle = Path(cloud.environment["SSL_CERT_FILE"]).read_bytes()
        assert users.strip() in bundle
        assert bundle.count(b"BEGIN CERTIFICATE") == 2
    monkeypatch.delenv("SSL_CERT_FILE")
    with start(tmp_path / "cloud") as cloud:
        bundle = Path(cloud.environment["SSL_CERT_FILE"])
        assert bundle.read_bytes().count(b"BEGIN CERTIFICATE") > 50  # the public ones
        ssl.create_default_context(cafile=bundle)


def test_keys_are_private_fresh_and_short_lived(tmp_path):
    seen = []
    for _ in range(2):
        with start(tmp_path) as cloud:
            path = Path(cloud.environment["GOOGLE_APPLICATION_CREDENTIALS"])
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            seen.append(json.loads(path.read_text())["private_key"])
            keys = [
                file for file in tmp_path.rglob("*") if file.is_file() and b"PRIVATE" in file.read_bytes()
            ]
            assert sorted(keys) == [path, path.with_name("vertex.json"), path.with_name("workers.json")]
        assert not path.parent.exists()
    assert seen[0] != seen[1]


# Processes


def run(folder: Path, *command: str, options: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    """`python -m helpers.local_cloud` on a folder, running a command."""
    arguments = [sys.executable, "-m", "helpers.local_cloud", "--dir", str(folder), "--offline", *options]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen([*arguments, *command], text=True, **settings)


def test_two_local_clouds_share_a_folder(tmp_path, cloud):
    program = """if True:
        import sys
        from google.cloud import storage
        bucket = storage.Client().bucket("shared-folder")
        bucket.exists() or bucket.create()
        bucket.blob(sys.argv[1]).upload_from_string(sys.argv[1])
        print(sorted(blob.name for blob in bucket.list_blobs()))
    """
    with launch(tmp_path, offline=True) as first, launch(tmp_path, offline=True) as second:
        outputs = [
            subprocess.run(
                [sys.executable, "-c", program, name],
                env={**os.environ, **child.environment},
                check=True,
                timeout=300,
                capture_output=True,
                text=True,
            ).stdout.strip()
            for name, child in (("one", first), ("two", second), ("three", first))
        ]
    assert outputs == ["['one']", "['one', 'two']", "['one', 'three', 'two']"]


def test_stop_leaves_no_process_and_no_key(tmp_path):
    child = launch(tmp_path, offline=True)
    assert psutil.pid_exists(child.pid)
    child.stop()
    child.stop()
    assert not psutil.pid_exists(child.pid)
    assert list((tmp_path / "run").iterdir()) == []


def test_the_services_end_when_their_parent_is_killed(tmp_path):
    program = f"""if True:
        import sys, time
        from helpers.local_cloud import launch
        print(launch({str(tmp_path)!r}, offline=True).pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "it lives on", 15
    )
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for begin in (start, launch):
        with pytest.raises(LocalCloudError, match=r"file.* cannot be used.*Name another folder"):
            begin(tmp_path / "file")


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "storage").write_text("not a folder")
    for begin in (start, launch):
        with pytest.raises(LocalCloudError, match=r"cannot be used.*storage.*Name another folder"):
            begin(tmp_path)
    assert strays(tmp_path) == []
    assert list((tmp_path / "run").iterdir()) == []


# The command line


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_the_commands(tmp_path, program, code):
    process = run(tmp_path, sys.executable, "-c", program)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (code, "", "")


def test_the_command_sees_the_local_cloud(tmp_path):
    program = "from google.cloud import storage; print(storage.Client().create_bucket('seen').project_number)"
    process = run(tmp_path, "--", sys.executable, "-c", program, options=("--project", "my-project"))
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output.strip(), errors) == (0, "123456789012", "")
    assert (tmp_path / "storage/seen").is_dir()
    assert strays(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["no-such-command"], 127, "no-such-command: not found"),
        ([__file__], 126, "not executable"),
        ([], 2, "COMMAND"),
    ],
)
def test_a_command_that_cannot_run_is_named(tmp_path, command, code, message):
    process = run(tmp_path, *command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert message in errors
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_one_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = run(tmp_path, "true", options=("--port", str(port)))
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.strip() == (
        f"local cloud: Port {port} is taken. Name another, or none: the system then chooses a free one."
    )


def test_a_port_that_is_none_is_one_clear_error(tmp_path):
    with pytest.raises(LocalCloudError, match="Port 99999 cannot be used"):
        start(tmp_path, port=99999)


WAIT_FOR_INTERRUPT = """if True:
    import signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    print("ready", flush=True)
    got = signal.sigtimedwait([signal.SIGINT, signal.SIGTERM], 300)
    again = signal.sigtimedwait([signal.SIGINT, signal.SIGTERM], 0.3)
    print(got.si_signo, "twice" if again else "once", flush=True)
    sys.exit(5)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="macOS cannot wait for a signal with a limit")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_on_to_the_command_which_may_finish(tmp_path, number):
    process = run(tmp_path, sys.executable, "-c", WAIT_FOR_INTERRUPT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (5, f"{int(number)} once\n", "")
    assert strays(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="macOS cannot wait for a signal with a limit")
def test_ctrl_c_in_a_terminal_reaches_the_command_once(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "helpers.local_cloud", "--dir", str(tmp_path), "--offline"]
        os.execv(sys.executable, [*command, sys.executable, "-c", WAIT_FOR_INTERRUPT])
    output = b""
    while b"ready" not in output:
        output += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    while b"once" not in output and b"twice" not in output:
        output += os.read(terminal, 1000)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"2 once" in output
    assert os.waitstatus_to_exitcode(status) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_nothing_outlives_a_command_line_that_is_killed(tmp_path):
    process = run(tmp_path, sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)")
    assert process.stdout.readline() == "ready\n"
    assert len(strays(tmp_path)) == 0  # still a descendant of this process
    process.kill()
    process.communicate(timeout=300)
    wait_until(lambda: not strays(tmp_path), "the command lives on")


@pytest.mark.parametrize(("bucket", "made"), [("my-bucket", True), ("../../outside", False)])
def test_a_command_has_a_project_a_region_and_a_bucket(tmp_path, bucket, made):
    settings = {k: v for k, v in os.environ.items() if k not in ("PROJECT", "LOCATION")} | {"BUCKET": bucket}
    command = [sys.executable, "-m", "helpers.local_cloud", "--dir", tmp_path / "a" / "b", "printenv"]
    done = subprocess.run(
        [*command, "PROJECT", "LOCATION", "BUCKET"], env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["local-project", "us-central1", bucket]
    assert (tmp_path / "a" / "b" / "storage" / bucket).is_dir() == made
    assert not (tmp_path / "a" / "outside").exists()
