"""Files by their path, here and in Cloud Storage: the same calls, and whole or not at all."""

import gzip
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.files import storage, transfer
from helpers.files.names import UnsafeNameError, inside
from helpers.files.storage import StorageError
from helpers.files.whole_file import FileBusyError, partial_path, whole_or_absent


@pytest.fixture(params=["here", "Cloud Storage"])
def place(request, tmp_path) -> str:
    """A folder to put files into."""
    if request.param == "here":
        return str(tmp_path / "place")
    return f"gs://{request.getfixturevalue('bucket').name}/some/place"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(os.urandom(100_000))
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """Makes a small file upload as a large one does."""
    monkeypatch.setattr(transfer, "PART_BYTES", 20_000)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 2**18)


def names(bucket) -> list[str]:
    return sorted(blob.name for blob in bucket.client.list_blobs(bucket))


def test_a_file_comes_back_as_it_was(place, file, tmp_path):
    path = f"{place}/a file's näme.bin"
    assert not storage.exists(path)
    storage.upload(file, path)
    assert storage.exists(path)
    assert storage.read_bytes(path) == file.read_bytes()
    assert storage.size_and_crc32c(path) == (100_000, storage.crc32c_of(file))
    moved = []
    storage.download(path, tmp_path / "back" / "file", moved.append)
    assert (tmp_path / "back" / "file").read_bytes() == file.read_bytes()
    assert sum(moved) == 100_000
    assert os.listdir(tmp_path / "back") == ["file"]
    storage.delete(path)
    assert not storage.exists(path)
    storage.delete(path)


class SlowLine:
    """A way to the local cloud that takes so many bytes a second."""

    def __init__(self, target: tuple[str, int], bytes_a_second: int):
        self._target, self._rate = target, bytes_a_second
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                remote = socket.create_connection(self._target)
                threading.Thread(target=self._pump, args=(client, remote, self._rate), daemon=True).start()
                threading.Thread(target=self._pump, args=(remote, client, 0), daemon=True).start()

    @staticmethod
    def _pump(source, target, rate):
        with suppress(OSError):
            while data := source.recv(16384):
                target.sendall(data)
                time.sleep(len(data) / rate if rate else 0)
            target.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._server.close()


def test_an_upload_over_a_slow_line_takes_its_time(cloud, bucket, tmp_path, monkeypatch):
    """Longer than the limit for each block: limits follow progress."""
    monkeypatch.setattr(transfer, "TIMEOUT", (8, 300))
    host, _, port = cloud.environment["HTTPS_PROXY"].removeprefix("http://").partition(":")
    line = SlowLine((host, int(port)), 500_000)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, line.url)
    storage._client_of.cache_clear()
    file = tmp_path / "file"
    file.write_bytes(os.urandom(5_000_000))
    began = time.monotonic()
    try:
        storage.upload(file, f"gs://{bucket.name}/file")
        assert time.monotonic() - began > transfer.TIMEOUT[0], "the line was not slow"
        assert storage.size_and_crc32c(f"gs://{bucket.name}/file")[1] == transfer.crc32c_of(file)
    finally:
        storage._client_of.cache_clear()
        line.close()


def test_what_is_stored_compressed_is_read_as_googles_client_reads_it(bucket, tmp_path):
    content = b"text" * 1000
    blob = bucket.blob("folder/tokenizer.json")
    blob.content_encoding = "gzip"
    blob.upload_from_string(gzip.compress(content))
    path = f"gs://{bucket.name}/folder/tokenizer.json"
    assert storage.read_bytes(path) == content
    storage.download(path, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    storage.download_folder(f"gs://{bucket.name}/folder", tmp_path / "folder")
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == content
    blob.content_encoding = "gzip"
    blob.upload_from_string(b"not compressed")
    with pytest.raises(StorageError, match="not what its encoding says"):
        storage.download(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_empty_file_comes_back_empty(place, tmp_path):
    (tmp_path / "empty").touch()
    storage.upload(tmp_path / "empty", f"{place}/empty")
    storage.download(f"{place}/empty", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


def test_another_file_is_replaced_only_when_asked(place, file, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    storage.upload(file, f"{place}/x")
    with pytest.raises(FileExistsError, match="or overwrite it"):
        storage.upload(tmp_path / "other", f"{place}/x")
    assert storage.read_bytes(f"{place}/x") == file.read_bytes()
    storage.upload(tmp_path / "other", f"{place}/x", overwrite=True)
    assert storage.read_bytes(f"{place}/x") == b"other"


def test_what_does_not_exist_is_told(place, tmp_path):
    for call in (storage.read_bytes, storage.size_and_crc32c, lambda p: storage.download(p, tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match="nothing-here"):
            call(f"{place}/nothing-here")
    assert not (tmp_path / "x").exists()
    assert not partial_path(tmp_path / "x").exists()


def test_a_bucket_that_does_not_exist_is_told_whatever_is_asked(cloud, file, tmp_path):
    path = "gs://no-such-bucket-anywhere/x"
    for call in (
        storage.exists,
        storage.read_bytes,
        storage.size_and_crc32c,
        storage.check_writable,
        storage.delete,
        lambda p: storage.download(p, tmp_path / "x"),
        lambda p: storage.upload(file, p),
    ):
        with pytest.raises(
            FileNotFoundError, match=r"bucket 'no-such-bucket-anywhere' .* does not exist: create"
        ):
            call(path)


def test_a_large_file_goes_up_in_parts_and_leaves_none(small_parts, bucket, file):
    path = f"gs://{bucket.name}/folder/large.pt"
    moved = []
    storage.upload(file, path, progress=moved.append)
    assert sum(moved) == 100_000
    assert storage.read_bytes(path) == file.read_bytes()
    assert names(bucket) == ["folder/large.pt"]
    assert bucket.get_blob("folder/large.pt").component_count == 5


def test_an_interrupted_upload_goes_on_with_the_parts_that_are_there(small_parts, bucket, file):
    path = f"gs://{bucket.name}/large.pt"
    sent = []

    def interrupt(size: int) -> None:
        sent.append(size)
        if sum(sent) >= 60_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.upload(file, path, progress=interrupt)
    assert not storage.exists(path)
    left = {blob.name: blob.generation for blob in bucket.client.list_blobs(bucket)}
    assert left and all(name.startswith("large.pt.parts/") for name in left)

    seen = {}

    def watch(size: int) -> None:
        seen.update({blob.name: blob.generation for blob in bucket.client.list_blobs(bucket)})

    storage.upload(file, path, progress=watch)
    assert storage.read_bytes(path) == file.read_bytes()
    assert names(bucket) == ["large.pt"]
    assert {name: seen[name] for name in left} == left, "a part that was whole has been sent again"


def test_parts_of_another_file_are_not_used_and_do_not_stay(small_parts, bucket, file):
    path = f"gs://{bucket.name}/large.pt"
    bucket.blob("large.pt.parts/AAAAAA==-100000/00").upload_from_string(b"of another file")
    bucket.blob("large.pt.parts/other").upload_from_string(b"of another file")
    storage.upload(file, path)
    assert storage.read_bytes(path) == file.read_bytes()
    assert names(bucket) == ["large.pt"]


def test_an_identical_object_is_left_as_it_is(small_parts, bucket, file):
    path = f"gs://{bucket.name}/large.pt"
    storage.upload(file, path)
    generation = bucket.get_blob("large.pt").generation
    storage.upload(file, path)
    assert bucket.get_blob("large.pt").generation == generation


@pytest.mark.parametrize("in_parts", [False, True])
def test_what_somebody_else_wrote_in_the_meantime_is_kept(in_parts, bucket, file, monkeypatch):
    if in_parts:
        monkeypatch.setattr(transfer, "PART_BYTES", 20_000)

    def meddle(size: int) -> None:
        bucket.blob("x").upload_from_string(b"somebody else's")

    with pytest.raises(FileExistsError, match="in the meantime"):
        storage.upload(file, f"gs://{bucket.name}/x", progress=meddle)
    assert storage.read_bytes(f"gs://{bucket.name}/x") == b"somebody else's"


def test_a_download_in_chunks_is_checked(small_parts, bucket, file, tmp_path):
    storage.upload(file, f"gs://{bucket.name}/x")
    storage.download(f"gs://{bucket.name}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == file.read_bytes()


def test_a_folder_comes_down_without_its_sub_folders(bucket, tmp_path):
    for name in ("f/a", "f/b", "f/sub/c", "other"):
        bucket.blob(name).upload_from_string(name)
    storage.download_folder(f"gs://{bucket.name}/f", tmp_path / "f")
    assert {p.name: p.read_text() for p in (tmp_path / "f").iterdir()} == {"a": "f/a", "b": "f/b"}
    storage.download_folder(f"gs://{bucket.name}/f", tmp_path / "f", sub_folders=True)
    assert (tmp_path / "f" / "sub" / "c").read_text() == "f/sub/c"
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        storage.download_folder(f"gs://{bucket.name}/empty", tmp_path / "g")


def test_the_placeholder_of_a_folder_is_not_taken_for_a_file(bucket, tmp_path):
    for name in ("f/", "f/a", "empty/"):
        bucket.blob(name).upload_from_string("")
    storage.download_folder(f"gs://{bucket.name}/f", tmp_path / "f")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        storage.download_folder(f"gs://{bucket.name}/empty", tmp_path / "g")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("name", ["../b", "a/../../b", "/b", "a//b", "a\\b", "a\nb", "..", "", "a/", "."])
def test_a_name_from_outside_cannot_lead_out_of_its_folder(name, tmp_path):
    with pytest.raises(UnsafeNameError, match="not the plain name"):
        inside(tmp_path, name)


def test_nothing_is_written_behind_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    assert inside(tmp_path / "folder", "a/b.json") == tmp_path / "folder" / "a" / "b.json"
    with pytest.raises(UnsafeNameError, match="is a link"):
        inside(tmp_path / "folder", "link/b.json")


@pytest.mark.parametrize("uri", ["", "bucket/name", "gs://", "gs://bucket", "gs://bucket/", "gs:///name"])
def test_what_is_no_object_is_refused(uri):
    with pytest.raises(ValueError, match="gs://BUCKET/FOLDER/NAME"):
        storage.parse(uri)


def test_local_files_need_neither_googles_client_nor_credentials(tmp_path):
    code = (
        "import sys; from helpers.files import storage; open('a', 'w').write('x'); storage.upload('a', 'b'); "
        "storage.download('b', 'c'); assert storage.read_bytes('c') == b'x'; "
        "assert 'google.cloud.storage' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


@pytest.fixture
def refusing_service(monkeypatch):
    """A service that answers every request with the status in `answer`."""

    class Refuse(BaseHTTPRequestHandler):
        answer = 403

        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = b'{"error": {"message": "caller does not have storage.objects access"}}'
            self.send_response(self.answer)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _refuse  # noqa: N815 - http.server's names

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    storage._client_of.cache_clear()
    yield Refuse
    storage._client_of.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_missing_permission_is_told_with_the_role_that_mends_it(refusing_service, file, tmp_path):
    for call in (
        storage.exists,
        storage.read_bytes,
        storage.check_writable,
        lambda p: storage.download(p, tmp_path / "x"),
        lambda p: storage.upload(file, p),
    ):
        with pytest.raises(
            PermissionError, match=r"no permission for gs://b/x .*roles/storage\.objectUser on 'b'"
        ):
            call("gs://b/x")


def test_another_refusal_is_a_storage_error(refusing_service):
    refusing_service.answer = 400
    with pytest.raises(StorageError, match=r"gs://bucket/x: 400 .*try again"):
        storage.read_bytes("gs://bucket/x")


def test_a_file_being_written_is_not_written_by_a_second_process(tmp_path):
    with whole_or_absent(tmp_path / "x") as file:
        file.write(b"first")
        with pytest.raises(FileBusyError, match="wait until it has ended"), whole_or_absent(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_second_writer_can_wait_for_the_first(tmp_path):
    written = []

    def write_too() -> None:
        with whole_or_absent(tmp_path / "x", wait_seconds=300) as file:
            written.append((tmp_path / "x").read_bytes())
            file.write(b"second")

    with whole_or_absent(tmp_path / "x") as file:
        thread = threading.Thread(target=write_too)
        thread.start()
        file.write(b"first")
    thread.join(300)
    assert written == [b"first"]
    assert (tmp_path / "x").read_bytes() == b"second"


def test_what_an_interrupted_writer_left_is_replaced(tmp_path):
    partial_path(tmp_path / "x").write_bytes(
        b"left by a process that was killed, and longer than the new one"
    )
    with whole_or_absent(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_or_absent(tmp_path / "x") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
