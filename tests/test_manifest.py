"""The manifest and the folder that it lies in."""

import json

import pytest

from helpers.files.transfer import crc32c_of
from helpers.load_state_dict.manifest import (
    Manifest,
    companion_folder,
    manifest_path,
    read_manifest,
)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("gs://bucket/run-inference/google/flan-t5-xl.pt", "gs://bucket/run-inference/google/flan-t5-xl"),
        ("model.pt", "model"),
        ("/a b/it's.v1.pt", "/a b/it's.v1"),
    ],
)
def test_the_companion_folder_is_the_path_without_its_ending(path, folder):
    assert companion_folder(path) == folder
    assert manifest_path(path) == f"{folder}/manifest.json"


@pytest.mark.parametrize("path", ["model.bin", ".pt", "folder/.pt", "", "gs://bucket.pt", "gs://bucket/.pt"])
def test_what_is_no_path_of_a_state_dict_is_refused(path):
    with pytest.raises(ValueError, match=r"\.pt|gs://BUCKET"):
        companion_folder(path)


def test_a_manifest_reads_back_as_written_and_survives_fields_of_later_versions(tmp_path):
    manifest = Manifest("m", "float16", 3, 6, "AAAAAA==", tied=[["a", "b"]], versions={"torch": "2"})
    (tmp_path / "m").mkdir()
    text = manifest.to_json().replace('"dtype"', '"added_later": 1, "dtype"')
    (tmp_path / "m" / "manifest.json").write_text(text)
    assert read_manifest(tmp_path / "m.pt") == manifest


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_name": "m"}'])
def test_a_damaged_manifest_is_named(text, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest .*convert the model again"):
        read_manifest(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 10**30},
        {"bytes": -1},
        {"bytes": "x"},
        {"bytes": True},
        {"crc32c": "../../x"},
        {"crc32c": 5},
        {"crc32c": "AAAA"},
        {"dtype": "int4"},
        {"model_name": ["x"]},
        {"files": "abc"},
        {"files": [5]},
        {"files": ["a", "a"]},
        *({"files": [name]} for name in ("", ".", "..", "../x", "/x", "a/../../x", "x\0y", "a\\b", "a/")),
    ],
)
def test_a_manifest_that_others_have_written_is_not_believed(change, tmp_path):
    (tmp_path / "m").mkdir()
    values = json.loads(Manifest("m", "float16", 3, 6, "AAAAAA==").to_json()) | change
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        read_manifest(tmp_path / "m.pt")


def test_an_absent_manifest_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m helpers\.load_state_dict"):
        read_manifest(tmp_path / "m.pt")


def test_the_checksum_is_the_crc_32c_of_the_standard(tmp_path):
    (tmp_path / "file").write_bytes(b"123456789")
    assert crc32c_of(tmp_path / "file") == "4waSgw=="  # 0xE3069283: RFC 3720, appendix B.4's polynomial
