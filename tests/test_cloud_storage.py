"""The local Cloud Storage, driven by Google's own client and by Beam."""

import base64
import errno
import gzip
import hashlib
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import uuid

import google_crc32c
import pytest
from google.api_core import exceptions
from google.cloud.storage import Blob

from helpers.local_cloud.cloud_storage.object_store import ObjectStore
from helpers.local_cloud.cloud_storage.preconditions import Preconditions
from helpers.local_cloud.front.http_server import HttpError

MIB = 1 << 20
API = "https://storage.googleapis.com"
KEY = "projects/p/locations/us/keyRings/r/cryptoKeys/k"
# Names that Cloud Storage allows and that are awkward as paths or in URLs.
ODD_NAMES = [
    "with space/and 'quotes' \"double\"",
    "hash#question?percent%25plus+amp&semicolon;",
    "ünïcødé/模型/🙂.txt",
    "trailing/slash/",
    "//",
    "a//b",
    "/leading",
    "../outside",
    "x/../../../outside",
    "./here",
    "x/..",
    ".hidden",
    "back\\slash",
    "tab\tand\x01control",
    "%sha256-lookalike",
    "%2E%2E%2Foutside",
    "n" * 256,
    "seg/" + "m" * 300,
    "d/" * 500 + "end",
    "x" * 1024,
    "é" * 512,
]


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def names(blobs) -> list[str]:
    return [blob.name for blob in blobs]


@pytest.fixture
def http(storage_client):
    """The client's own authorised session, for what the client has no method for."""
    return storage_client._http


# Uploads


def test_a_small_upload_keeps_bytes_checksums_and_metadata(bucket):
    blob = bucket.blob("folder/hello.txt")
    blob.metadata = {"Key": "välue", "empty": ""}
    blob.cache_control = "no-store"
    blob.upload_from_string("hello", content_type="text/plain")
    got = bucket.get_blob("folder/hello.txt")
    assert got.download_as_bytes() == b"hello"
    assert (got.size, got.crc32c, got.md5_hash) == (5, crc32c(b"hello"), md5(b"hello"))
    assert (got.content_type, got.cache_control) == ("text/plain", "no-store")
    assert got.metadata == {"Key": "välue", "empty": ""}
    assert (got.metageneration, got.component_count) == (1, None)


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 3 * MIB + 17])
@pytest.mark.parametrize("checksum", ["md5", "crc32c"])
def test_a_resumable_upload_in_chunks(bucket, tmp_path, size, checksum):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    blob = bucket.blob("chunked", chunk_size=256 * 1024)
    blob.upload_from_filename(path, checksum=checksum)
    assert bucket.blob("chunked").download_as_bytes() == path.read_bytes()
    assert bucket.get_blob("chunked").md5_hash == md5(path.read_bytes())


def test_a_resumable_upload_of_unknown_size(bucket):
    with bucket.blob("stream").open("wb", chunk_size=256 * 1024) as file:
        for _ in range(5):
            file.write(b"x" * 100_000)
    assert bucket.blob("stream").download_as_bytes() == b"x" * 500_000


def begin(http, bucket, name, query="", **fields) -> str:
    """Opens an upload session and returns its address."""
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable{query}"
    response = http.post(url, json={"name": name, **fields})
    assert response.status_code == 200, response.text
    return response.headers["Location"]


def test_a_broken_upload_goes_on_where_it_stopped(http, bucket):
    data = os.urandom(2 * MIB)
    session = begin(http, bucket, "broken")

    def break_off():
        yield data[: MIB + 5]
        raise ConnectionResetError

    with pytest.raises(Exception, match=r".*"):
        http.put(session, data=break_off(), headers={"Content-Range": f"bytes 0-{2 * MIB - 1}/{2 * MIB}"})
    status = http.put(session, headers={"Content-Range": f"bytes */{2 * MIB}"})
    assert status.status_code == 308
    assert bucket.get_blob("broken") is None
    received = int(status.headers.get("Range", "bytes=0--1").rpartition("-")[2]) + 1
    assert 0 <= received <= MIB + 5
    end = http.put(
        session,
        data=data[received:],
        headers={"Content-Range": f"bytes {received}-{2 * MIB - 1}/{2 * MIB}"},
    )
    assert end.status_code == 200
    assert bucket.blob("broken").download_as_bytes() == data
    # The answer may have been lost as well: asking again gives it again.
    assert http.put(session, headers={"Content-Range": f"bytes */{2 * MIB}"}).json() == end.json()


def test_bytes_that_were_sent_before_are_not_stored_twice(http, bucket):
    session = begin(http, bucket, "twice")
    assert http.put(session, data=b"abcd", headers={"Content-Range": "bytes 0-3/*"}).status_code == 308
    again = http.put(session, data=b"abcdef", headers={"Content-Range": "bytes 0-5/8"})
    assert again.headers["Range"] == "bytes=0-5"
    assert http.put(session, data=b"gh", headers={"Content-Range": "bytes 6-7/8"}).status_code == 200
    assert bucket.blob("twice").download_as_bytes() == b"abcdefgh"


@pytest.mark.parametrize("content_range", ["bytes 5-9/10", "bytes 0-3", "pages 1-2/3", "bytes 0-1/10"])
def test_a_content_range_that_does_not_fit_is_refused(http, bucket, content_range):
    session = begin(http, bucket, "gap")
    assert http.put(session, data=b"12345", headers={"Content-Range": content_range}).status_code == 400
    assert bucket.get_blob("gap") is None


def test_a_cancelled_upload_is_gone(http, bucket):
    session = begin(http, bucket, "cancelled")
    http.put(session, data=b"abcd", headers={"Content-Range": "bytes 0-3/*"})
    assert http.delete(session).status_code == 499
    assert http.put(session, data=b"ef", headers={"Content-Range": "bytes 4-5/6"}).status_code == 410
    assert bucket.get_blob("cancelled") is None


def test_an_unknown_upload_session_is_not_found(http, bucket):
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&upload_id=nobody"
    assert http.put(url, data=b"x").status_code == 404


@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
@pytest.mark.parametrize(
    "content", [b"", b"\r\n--", b"--mark", b"a\r\n--mar", b"x" * (3 * MIB), b"\n", b"\r"]
)
def test_a_multipart_upload_keeps_content_that_looks_like_its_frame(http, bucket, content, line_end):
    head = '--mark\nContent-Type: application/json\n\n{"name": "framed"}\n--mark\nContent-Type: a/b\n\n'
    body = head.replace("\n", line_end).encode() + content + f"{line_end}--mark--{line_end}".encode()
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=multipart"
    headers = {"Content-Type": "multipart/related; boundary=mark"}
    assert http.post(url, data=body, headers=headers).status_code == 200
    assert bucket.blob("framed").download_as_bytes() == content
    assert bucket.get_blob("framed").content_type == "a/b"


@pytest.mark.parametrize(
    "body", [b"", b"--mark\r\n\r\nnot json\r\n--mark\r\n\r\nx\r\n--mark--", b"no frame at all"]
)
def test_a_damaged_multipart_upload_is_refused(http, bucket, body):
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=multipart&name=damaged"
    headers = {"Content-Type": "multipart/related; boundary=mark"}
    assert http.post(url, data=body, headers=headers).status_code == 400
    assert bucket.get_blob("damaged") is None


def test_a_multipart_upload_that_lacks_its_end_is_refused(http, bucket):
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=multipart"
    body = b'--mark\r\n\r\n{"name": "cut"}\r\n--mark\r\n\r\nhalf of the cont'
    headers = {"Content-Type": "multipart/related; boundary=mark"}
    assert http.post(url, data=body, headers=headers).status_code == 400
    assert bucket.get_blob("cut") is None


@pytest.mark.parametrize("field", ["crc32c", "md5Hash"])
def test_an_upload_with_a_wrong_checksum_leaves_the_old_object(http, bucket, field):
    bucket.blob("kept").upload_from_string("old")
    wrong = {"crc32c": crc32c(b"other"), "md5Hash": md5(b"other")}[field]
    session = begin(http, bucket, "kept", **{field: wrong})
    answer = http.put(session, data=b"new")
    assert answer.status_code == 400
    assert "doesn't match" in answer.text
    assert bucket.blob("kept").download_as_bytes() == b"old"


def test_a_wrong_checksum_in_the_last_request_is_refused(http, bucket):
    session = begin(http, bucket, "hashed")
    answer = http.put(session, data=b"new", headers={"X-Goog-Hash": f"crc32c={crc32c(b'other')}"})
    assert answer.status_code == 400
    assert bucket.get_blob("hashed") is None


# Downloads


def test_ranges(http, bucket):
    blob = bucket.blob("digits")
    blob.upload_from_string("0123456789")
    assert blob.download_as_bytes(start=2, end=4) == b"234"
    assert blob.download_as_bytes(start=7) == b"789"
    assert blob.download_as_bytes(start=8, end=100) == b"89"
    url = f"{API}/download/storage/v1/b/{bucket.name}/o/digits?alt=media"
    for header, status, content in (
        ("bytes=-4", 206, b"6789"),
        ("bytes=-100", 206, b"0123456789"),
        ("bytes=5-3", 200, b"0123456789"),
        ("nonsense", 200, b"0123456789"),
        ("bytes=10-", 416, b""),
    ):
        answer = http.get(url, headers={"Range": header})
        assert (header, answer.status_code, answer.content) == (header, status, content)


def test_a_file_like_object_reads_in_pieces(bucket):
    bucket.blob("lines").upload_from_string("".join(f"line {number}\n" for number in range(1000)))
    with bucket.blob("lines", chunk_size=256 * 1024).open("rt") as file:
        assert sum(1 for _ in file) == 1000


def test_compressed_content_is_passed_on_as_it_is(bucket):
    blob = bucket.blob("text.gz")
    blob.content_encoding = "gzip"
    blob.upload_from_string(gzip.compress(b"plain text"), content_type="text/plain")
    got = bucket.get_blob("text.gz")
    assert got.content_encoding == "gzip"
    assert got.download_as_bytes() == b"plain text"
    assert gzip.decompress(got.download_as_bytes(raw_download=True)) == b"plain text"


def test_a_download_goes_on_with_the_object_it_began_with(http, bucket):
    data = os.urandom(8 * MIB)
    bucket.blob("replaced").upload_from_string(data)
    url = f"{API}/download/storage/v1/b/{bucket.name}/o/replaced?alt=media"
    with http.get(url, stream=True) as answer:
        chunks = answer.iter_content(65536)
        begun = next(chunks)
        bucket.blob("replaced").upload_from_string("new")
        assert begun + b"".join(chunks) == data


# Preconditions and generations


def test_an_object_is_created_only_once(bucket):
    bucket.blob("once").upload_from_string("first", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("once").upload_from_string("second", if_generation_match=0)
    assert bucket.blob("once").download_as_bytes() == b"first"


def test_conditions_hold_for_every_operation(bucket):
    blob = bucket.blob("guarded")
    blob.upload_from_string("content")
    good, bad = blob.generation, blob.generation + 1
    operations = {
        "write": lambda **if_: bucket.blob("guarded").upload_from_string("content", **if_),
        "read": lambda **if_: bucket.blob("guarded").download_as_bytes(**if_),
        "reload": lambda **if_: bucket.blob("guarded").reload(**if_),
        "compose": lambda **if_: bucket.blob("guarded").compose([bucket.blob("other")], **if_),
        "copy": lambda **if_: bucket.copy_blob(bucket.blob("other"), bucket, "guarded", **if_),
        "delete": lambda **if_: bucket.blob("guarded").delete(**if_),
    }
    bucket.blob("other").upload_from_string("other")
    for operation in operations.values():
        for condition in ({"if_generation_match": bad}, {"if_generation_match": 0}):
            with pytest.raises(exceptions.PreconditionFailed):
                operation(**condition)
    assert bucket.get_blob("guarded").generation == good
    operations["delete"](if_generation_match=good)
    assert bucket.get_blob("guarded") is None


def test_a_resumable_upload_checks_its_condition_at_both_ends(http, bucket):
    session = begin(http, bucket, "raced", "&ifGenerationMatch=0")
    bucket.blob("raced").upload_from_string("first")
    assert http.put(session, data=b"second").status_code == 412
    assert bucket.blob("raced").download_as_bytes() == b"first"
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&ifGenerationMatch=0&name=raced"
    assert http.post(url, json={}).status_code == 412


def test_a_read_of_any_but_this_generation_is_not_modified(http, bucket):
    blob = bucket.blob("cached")
    blob.upload_from_string("content")
    with pytest.raises(exceptions.NotModified):
        bucket.blob("cached").reload(if_generation_not_match=blob.generation)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("cached").upload_from_string("new", if_generation_not_match=blob.generation)
    url = f"{API}/storage/v1/b/{bucket.name}/o/cached?alt=media&ifGenerationNotMatch={blob.generation}"
    answer = http.get(url)
    assert (answer.status_code, answer.content) == (304, b"")
    assert http.get(f"{API}/storage/v1/b/{bucket.name}").status_code == 200  # the connection is still in step


def test_a_condition_on_the_source_of_a_copy(bucket):
    blob = bucket.blob("source")
    blob.upload_from_string("content")
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.copy_blob(blob, bucket, "copy", if_source_generation_match=1)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("whole").compose([blob], if_source_generation_match=[1])
    with pytest.raises(exceptions.NotFound):
        bucket.copy_blob(blob, bucket, "copy", source_generation=1)
    assert names(bucket.list_blobs()) == ["source"]


def test_a_condition_that_is_no_number_is_refused(http, bucket):
    url = f"{API}/storage/v1/b/{bucket.name}/o/x?ifGenerationMatch=soon"
    assert http.delete(url).status_code == 400


def test_generations_increase_even_over_a_deletion(bucket):
    generations = []
    for round_ in range(6):
        blob = bucket.blob("again")
        blob.upload_from_string(str(round_))
        generations.append(blob.generation)
        if round_ % 2:
            blob.delete()
    assert generations == sorted(set(generations))


def test_only_the_live_generation_is_kept(bucket):
    blob = bucket.blob("live")
    blob.upload_from_string("old")
    old = blob.generation
    blob.upload_from_string("new")
    assert bucket.get_blob("live", generation=blob.generation).size == 3
    assert bucket.get_blob("live", generation=old) is None
    with pytest.raises(exceptions.NotFound):
        bucket.blob("live", generation=old).delete()
    with pytest.raises(exceptions.NotFound):
        bucket.blob("live", generation=old).download_as_bytes()
    assert bucket.blob("live").download_as_bytes() == b"new"


# Metadata, copies, composition, batches


@pytest.mark.parametrize("metadata", ["text", {"key": 5}, {"key": "two\nlines"}, {"key\r\nInjected": "x"}])
def test_metadata_that_cannot_stand_in_a_header_is_refused(http, bucket, metadata):
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&name=described"
    answer = http.post(url, json={"metadata": metadata})
    assert (http.put(answer.headers["Location"], data=b"x") if answer.ok else answer).status_code == 400


def test_what_would_protect_an_object_is_refused_not_ignored(http, bucket):
    bucket.blob("held").upload_from_string("content")
    url = f"{API}/storage/v1/b/{bucket.name}/o/held"
    assert http.patch(url, json={"temporaryHold": True}).status_code == 501
    with pytest.raises(exceptions.MethodNotImplemented, match="Encryption-Algorithm is not imitated"):
        Blob("secret", bucket, encryption_key=b"k" * 32).upload_from_string("content")
    assert names(bucket.list_blobs()) == ["held"]


@pytest.mark.parametrize(
    "call",
    [
        lambda bucket: list(bucket.acl),
        lambda bucket: list(bucket.blob("o").acl),
        lambda bucket: list(bucket.client.list_hmac_keys()),
        lambda bucket: list(bucket.list_notifications()),
        lambda bucket: list(bucket.list_blobs(match_glob="**/x")),
        lambda bucket: bucket.get_iam_policy(),
        lambda bucket: bucket.blob("o").rewrite(bucket.blob("p")),
        lambda bucket: bucket.blob("o").patch(),
        lambda bucket: list(bucket.list_blobs(soft_deleted=True)),
        lambda bucket: bucket.blob("o").upload_from_string("x", predefined_acl="publicRead"),
        lambda bucket: bucket.client.create_bucket("retained", enable_object_retention=True),
    ],
)
def test_calls_that_are_not_imitated_are_named(call, bucket):
    with pytest.raises(exceptions.MethodNotImplemented, match="is not imitated by the local cloud"):
        call(bucket)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_kms_key_name", KEY),
        ("versioning_enabled", True),
        ("default_event_based_hold", True),
        ("retention_period", 5),
        ("hierarchical_namespace_enabled", True),
    ],
)
def test_settings_of_a_bucket_that_would_be_ignored_are_refused(name, value, storage_client):
    new = storage_client.bucket("with-settings")
    setattr(new, name, value)
    with pytest.raises(exceptions.MethodNotImplemented, match="is not imitated by the local cloud"):
        storage_client.create_bucket(new)
    assert storage_client.lookup_bucket("with-settings") is None


def test_conditions_on_entity_tags_hold(bucket):
    blob = bucket.blob("tagged")
    blob.upload_from_string("x")
    blob.reload()
    assert blob.download_as_bytes(if_etag_match=blob.etag) == b"x"
    with pytest.raises(exceptions.PreconditionFailed):
        blob.download_as_bytes(if_etag_match="wrong")
    with pytest.raises(exceptions.NotModified):
        blob.download_as_bytes(if_etag_not_match=blob.etag)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.reload(if_etag_match="wrong")
    with pytest.raises(exceptions.MethodNotImplemented):
        bucket.reload(if_metageneration_match=77)


def test_a_wrong_checksum_stops_a_resumable_upload(bucket):
    data = b"a" * (9 << 20)
    with pytest.raises(exceptions.BadRequest, match="CRC32C"):
        bucket.blob("big").upload_from_file(
            io.BytesIO(data), size=len(data), crc32c_checksum_value="A0tD7w=="
        )
    assert not bucket.blob("big").exists()


# A full disk


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(tmp_path / "storage")
    store.buckets.create({"name": "bucket"})
    put(store, b"old", {"contentType": "text/x-old", "metadata": {"a": "b"}})
    yield store
    store.stop()


def put(store: ObjectStore, content: bytes, fields: dict) -> None:
    partial = store.partial()
    try:
        partial.append([content])
        store.put("bucket", "object", partial, fields)
    finally:
        partial.discard()


def test_whatever_step_of_an_overwrite_finds_the_disk_full_the_old_object_is_whole(store, monkeypatch):
    before = store.find("bucket", "object")
    for failing in itertools.count(1):
        calls = itertools.count(1)

        def full(real, calls=calls, failing=failing):
            def call(*args, **kwargs):
                if next(calls) == failing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, full(getattr(os, name)))
            try:
                put(store, b"new" * 1000, {"contentType": "text/x-new"})
                break
            except OSError:
                pass
        resource, file = store.open("bucket", "object")
        with file:
            assert (file.read(), resource) == (b"old", before)
    assert failing > 4
    resource, file = store.open("bucket", "object")
    with file:
        assert file.read() == b"new" * 1000
    assert resource["contentType"] == "text/x-new"
    assert "metadata" not in resource


def test_a_write_that_takes_a_part_only_is_continued(store, monkeypatch):
    class Reluctant(io.FileIO):
        def write(self, data):
            return super().write(data[:7])

    partial = store.partial()
    with monkeypatch.context() as patch:
        patch.setattr(type(partial.path), "open", lambda path, mode, buffering=-1: Reluctant(path, mode))
        partial.append([b"0123456789" * 10, b"abc"])
    assert partial.path.read_bytes() == b"0123456789" * 10 + b"abc"
    assert partial.size == 103
    partial.discard()


def test_what_a_full_disk_cut_short_is_not_part_of_the_object(store, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    partial = store.partial()
    partial.append([b"first,"])
    with monkeypatch.context() as patch:
        patch.setattr(type(partial.path), "open", lambda path, mode, buffering=-1: Full(path, mode))
        with pytest.raises(OSError, match="No space"):
            partial.append([b"second,"])
    partial.append([b"end"])
    assert store.put("bucket", "resumed", partial, {})["size"] == "9"
    resource, file = store.open("bucket", "resumed")
    with file:
        assert file.read() == b"first,end"
    assert resource["crc32c"] == crc32c(b"first,end")


def test_a_copy_takes_content_and_description_along(bucket, storage_client):
    blob = bucket.blob("original")
    blob.metadata = {"a": "b"}
    blob.upload_from_string("content", content_type="text/plain")
    copy = bucket.copy_blob(blob, bucket, "copies/one")
    renamed = bucket.rename_blob(blob, "moved")
    for got in (copy, renamed):
        got.reload()
        assert (got.content_type, got.metadata, got.md5_hash) == ("text/plain", {"a": "b"}, md5(b"content"))
        assert got.download_as_bytes() == b"content"
    assert names(bucket.list_blobs()) == ["copies/one", "moved"]
    with pytest.raises(exceptions.NotFound):
        bucket.copy_blob(copy, storage_client.bucket("no-such-bucket-here"), "x")


def test_composition(http, bucket):
    for name in "abc":
        bucket.blob(name).upload_from_string(name * 3)
    whole = bucket.blob("whole")
    whole.content_type = "text/plain"
    whole.compose([bucket.blob(name) for name in "abc"])
    got = bucket.get_blob("whole")
    assert got.download_as_bytes() == b"aaabbbccc"
    assert (got.component_count, got.md5_hash, got.content_type) == (3, None, "text/plain")
    assert got.crc32c == crc32c(b"aaabbbccc")
    with pytest.raises(exceptions.NotFound):
        bucket.blob("partly").compose([bucket.blob("a"), bucket.blob("missing")])
    assert bucket.get_blob("partly") is None
    sources = [{"name": "a"}] * 33
    url = f"{API}/storage/v1/b/{bucket.name}/o/many/compose"
    assert http.post(url, json={"sourceObjects": sources}).status_code == 400


def test_a_batch_deletes_and_reports_what_is_missing(bucket, storage_client):
    for number in range(30):
        bucket.blob(f"batch/{number} ü").upload_from_string("x")
    with storage_client.batch(raise_exception=False) as batch:
        for number in range(25):
            bucket.delete_blob(f"batch/{number} ü")
        bucket.delete_blob("batch/missing")
    codes = [response.status_code for response in batch._responses]
    assert codes == [204] * 25 + [404]
    assert len(list(bucket.list_blobs())) == 5
    with pytest.raises(exceptions.NotFound), storage_client.batch():
        bucket.delete_blob("missing")


# Listing


@pytest.fixture
def tree(bucket):
    """A bucket with a few folders."""
    for name in ("a", "a-b", "a/1", "a/2", "a/b/3", "b/4", "c", "d/e/f/5"):
        bucket.blob(name).upload_from_string(name)
    return bucket


def test_listing_by_prefix_and_offsets(tree):
    assert names(tree.list_blobs(prefix="a")) == ["a", "a-b", "a/1", "a/2", "a/b/3"]
    assert names(tree.list_blobs(prefix="a/")) == ["a/1", "a/2", "a/b/3"]
    assert names(tree.list_blobs(prefix="none")) == []
    assert names(tree.list_blobs(start_offset="a/2", end_offset="c")) == ["a/2", "a/b/3", "b/4"]
    assert names(tree.list_blobs(max_results=3)) == ["a", "a-b", "a/1"]


@pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
def test_listing_like_folders_in_pages(tree, page_size):
    listing = tree.list_blobs(delimiter="/", page_size=page_size)
    seen, prefixes, sizes = [], [], []
    for page in listing.pages:
        blobs = names(page)
        seen += blobs
        prefixes += page.prefixes
        sizes.append(len(blobs) + len(page.prefixes))
    assert (seen, sorted(prefixes)) == (["a", "a-b", "c"], ["a/", "b/", "d/"])
    assert len(prefixes) == 3
    assert all(size == page_size for size in sizes[:-1])
    assert listing.prefixes == {"a/", "b/", "d/"}


def test_listing_inside_a_folder(tree):
    listing = tree.list_blobs(prefix="a/", delimiter="/")
    assert names(listing) == ["a/1", "a/2"]
    assert listing.prefixes == {"a/b/"}


def test_pages_do_not_depend_on_what_is_deleted_between_them(bucket):
    for number in range(10):
        bucket.blob(f"{number}").upload_from_string("x")
    pages = bucket.list_blobs(page_size=4).pages
    first = names(next(pages))
    bucket.delete_blob("0")
    bucket.delete_blob("3")
    assert first + [name for page in pages for name in names(page)] == [str(number) for number in range(10)]


@pytest.mark.parametrize("query", ["pageToken=%25", "maxResults=many"])
def test_a_listing_that_makes_no_sense_is_refused(http, bucket, query):
    assert http.get(f"{API}/storage/v1/b/{bucket.name}/o?{query}").status_code == 400


# Buckets


def test_a_bucket_from_its_making_to_its_end(storage_client):
    name = f"life-{uuid.uuid4().hex[:10]}"
    bucket = storage_client.bucket(name)
    bucket.labels = {"team": "red", "drop": "me"}
    bucket.storage_class = "NEARLINE"
    bucket.create(location="us-central1")
    got = storage_client.get_bucket(name)
    assert (got.location, got.location_type, got.storage_class) == ("US-CENTRAL1", "region", "NEARLINE")
    with pytest.raises(exceptions.Conflict):
        storage_client.create_bucket(name)
    assert storage_client.get_bucket(name).labels == {"team": "red", "drop": "me"}
    with pytest.raises(exceptions.MethodNotImplemented):
        got.patch()
    assert name in names(storage_client.list_buckets(prefix="life-"))
    got.blob("file").upload_from_string("x")
    with pytest.raises(exceptions.Conflict, match="not empty"):
        got.delete()
    got.delete_blob("file")
    got.delete()
    assert storage_client.lookup_bucket(name) is None
    with pytest.raises(exceptions.NotFound):
        got.delete()


@pytest.mark.parametrize(
    "name",
    [
        "ab",
        "a" * 64,
        "Upper",
        "has space",
        "-a-",
        "_ab",
        "a..b",
        "1.2.3.4",
        "goog-x",
        "my-google",
        "a/b",
        "é-é-é",
    ],
)
def test_bucket_names_that_cloud_storage_refuses(storage_client, http, name):
    answer = http.post(f"{API}/storage/v1/b?project=test-project", json={"name": name})
    assert answer.status_code == 400
    assert "Invalid bucket name" in answer.text


@pytest.mark.parametrize("name", ["..", ".cloud", "%2e%2e", "..%2F.."])
def test_no_bucket_name_leads_out_of_the_folder(http, cloud, name):
    outside = cloud.storage_root.parent / "secret"
    outside.write_text("secret")
    for url in (
        f"{API}/storage/v1/b/{name}/o/secret?alt=media",
        f"{API}/download/storage/v1/b/{name}/o/secret",
    ):
        assert http.get(url).status_code in (400, 404, 501)


def test_what_no_bucket_here_can_do_is_refused_not_ignored(storage_client):
    bucket = storage_client.bucket(f"versioned-{uuid.uuid4().hex[:10]}")
    bucket.versioning_enabled = True
    with pytest.raises(exceptions.MethodNotImplemented, match="versioning"):
        bucket.create()
    assert not bucket.exists()


def test_an_object_needs_its_bucket(storage_client):
    bucket = storage_client.bucket("no-such-bucket-here")
    with pytest.raises(exceptions.NotFound, match="bucket does not exist"):
        bucket.blob("x").upload_from_string("x")
    with pytest.raises(exceptions.NotFound):
        list(bucket.list_blobs())
    assert bucket.get_blob("x") is None


# Names and files


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name[:25]))
def test_odd_names_are_names_like_any_other(bucket, cloud, name):
    before = set(cloud.folder.parent.rglob("outside*"))
    blob = bucket.blob(name)
    blob.upload_from_string("content")
    assert names(bucket.list_blobs()) == [name]
    assert names(bucket.list_blobs(prefix=name[:5])) == [name]
    assert bucket.blob(name).download_as_bytes() == b"content"
    copy = bucket.copy_blob(blob, bucket, name[:-1] + "!")
    assert copy.name in names(bucket.list_blobs())
    bucket.delete_blobs([blob, copy])
    assert names(bucket.list_blobs()) == []
    assert set(cloud.folder.parent.rglob("outside*")) == before


@pytest.mark.parametrize("name", [".", "..", "two\nlines", "cr\r", "x" * 1025, "é" * 513])
def test_names_that_cloud_storage_refuses(http, bucket, name):
    url = f"{API}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable"
    answer = http.post(url, json={"name": name})
    assert (answer.status_code, "Invalid object name" in answer.text) == (400, True)


@pytest.mark.parametrize("order", [["a", "a/b", "a/b/c", "a/"], ["a/b/c", "a/b", "a/", "a"]])
def test_an_object_may_have_the_name_of_anothers_folder(bucket, order):
    for name in order:
        bucket.blob(name).upload_from_string(name)
    assert names(bucket.list_blobs()) == ["a", "a/", "a/b", "a/b/c"]
    for name in order:
        assert bucket.blob(name).download_as_text() == name
    for name in order:  # overwritten and removed in turn, none harms another
        bucket.blob(name).upload_from_string(name + "!")
        assert names(bucket.list_blobs(prefix=name))[0] == name
        bucket.blob(name).delete()
    assert names(bucket.list_blobs()) == []


def test_an_object_is_a_file_and_a_file_is_an_object(bucket, cloud):
    folder = cloud.storage_root / bucket.name
    bucket.blob("models/m/config.json").upload_from_string("{}")
    assert (folder / "models/m/config.json").read_text() == "{}"
    (folder / "by hand").mkdir()
    (folder / "by hand/weights.pt").write_bytes(b"weights")
    blob = bucket.get_blob("by hand/weights.pt")
    assert (blob.size, blob.crc32c, blob.md5_hash) == (7, crc32c(b"weights"), md5(b"weights"))
    (folder / "by hand/weights.pt").write_bytes(b"changed")
    changed = bucket.get_blob("by hand/weights.pt")
    assert (changed.md5_hash, changed.generation > blob.generation) == (md5(b"changed"), True)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.upload_from_string("late", if_generation_match=blob.generation)
    bucket.delete_blob("by hand/weights.pt")
    assert not (folder / "by hand").exists()


def test_a_folder_made_by_hand_is_a_bucket(storage_client, cloud):
    (cloud.storage_root / "made-by-hand").mkdir()
    (cloud.storage_root / "Not a bucket").mkdir()
    assert "made-by-hand" in names(storage_client.list_buckets())
    storage_client.bucket("made-by-hand").blob("x").upload_from_string("x")
    storage_client.bucket("made-by-hand").delete_blob("x")
    storage_client.bucket("made-by-hand").delete()
    assert not (cloud.storage_root / "made-by-hand").exists()


# Several at once


def count_up(root: str, times: int) -> None:
    """Adds one to the number in an object, `times` times, as optimistic writers do."""
    from pathlib import Path

    store = ObjectStore(Path(root))
    for _ in range(times):
        for _ in range(10_000):
            resource, file = store.open("bucket", "counter")
            with file:
                number = int(file.read())
            partial = store.partial()
            partial.append([str(number + 1).encode()])
            try:
                condition = Preconditions(generation=int(resource["generation"]))
                store.put("bucket", "counter", partial, {}, condition)
                break
            except HttpError as error:
                partial.discard()
                assert error.status == 412
    store.stop()


def test_processes_that_share_a_folder_lose_no_write(tmp_path):
    store = ObjectStore(tmp_path)
    store.buckets.create({"name": "bucket"})
    zero = store.partial()
    zero.append([b"0"])
    store.put("bucket", "counter", zero, {})
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=count_up, args=(str(tmp_path), 30)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    _, file = store.open("bucket", "counter")
    with file:
        assert file.read() == b"60"
    store.stop()
    assert list((tmp_path / ".cloud/partial").iterdir()) == []


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    def die(root):
        store = ObjectStore(root)
        store.partial().append([b"half"])
        os._exit(9)

    worker = multiprocessing.get_context("fork").Process(target=die, args=(tmp_path,))
    worker.start()
    worker.join(300)
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"] == [
        b"half"
    ]
    living = ObjectStore(tmp_path)
    partial = living.partial()
    partial.append([b"whole"])
    ObjectStore(tmp_path).stop()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert files == [b"whole"]
    living.stop()


# Beam


def test_beam_writes_reads_renames_and_deletes(bucket):
    import apache_beam as beam
    from apache_beam.io.filesystems import FileSystems

    root = f"gs://{bucket.name}/beam"
    with beam.Pipeline(runner="BundleBasedDirectRunner") as pipeline:
        lines = pipeline | beam.Create([f"line {number}" for number in range(100)])
        lines | beam.io.WriteToText(f"{root}/out", file_name_suffix=".txt", num_shards=3)
    assert names(bucket.list_blobs()) == [f"beam/out-0000{shard}-of-00003.txt" for shard in range(3)]
    found = FileSystems.match([f"{root}/out*"])[0].metadata_list
    text = ""
    for metadata in found:
        with FileSystems.open(metadata.path, compression_type="uncompressed") as file:
            text += file.read().decode()
    assert len(text.split("\n")) == 101
    with FileSystems.create(f"{root}/big") as file:
        for _ in range(40):
            file.write(b"z" * 500_000)
    assert bucket.get_blob("beam/big").size == 20_000_000
    FileSystems.rename([f"{root}/big"], [f"{root}/renamed"])
    FileSystems.copy([f"{root}/renamed"], [f"{root}/copied"])
    assert FileSystems.exists(f"{root}/copied")
    assert FileSystems.checksum(f"{root}/copied") == bucket.get_blob("beam/renamed").crc32c
    FileSystems.delete([f"{root}/"])
    assert names(bucket.list_blobs()) == []


def test_an_organisation_may_ask_for_uniform_access_and_soft_delete(tmp_path):
    """And `make_bucket` makes one all the same."""
    code = (
        "from google.api_core.exceptions import PreconditionFailed as Refused\n"
        "from google.cloud import storage\n"
        "from helpers.files.buckets import make_bucket\n"
        "client = storage.Client()\n"
        "try: client.create_bucket('plain-bucket')\n"
        "except Refused as error: assert 'uniformBucketLevelAccess' in str(error)\n"
        "else: raise SystemExit('it was made')\n"
        "made = make_bucket(client, 'good-bucket', 'us-central1')\n"
        "assert made.iam_configuration.uniform_bucket_level_access_enabled\n"
        "assert made.iam_configuration.public_access_prevention == 'enforced'\n"
    )
    (tmp_path / "policy.txt").write_text(
        "constraint storage.uniformBucketLevelAccess\nconstraint storage.softDeletePolicySeconds\n"
    )
    command = [sys.executable, "-m", "helpers.local_cloud", "--dir", str(tmp_path), "--offline"]
    subprocess.run([*command, sys.executable, "-c", code], check=True, timeout=300)


def test_a_region_that_is_none_is_refused(storage_client):
    with pytest.raises(exceptions.BadRequest, match="ATLANTIS"):
        storage_client.create_bucket("in-atlantis", location="atlantis")
