"""The wheel that workers install holds the package that is running, and nothing of this machine."""

import hashlib
import subprocess
import sys
import time
import zipfile

from helpers.files.package import build_wheel


def test_the_wheel_installs_and_imports_without_index_or_build(tmp_path):
    wheel = build_wheel(tmp_path)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    code = "import helpers.pipeline.stream; print(helpers.pipeline.__file__)"
    environment = {"PYTHONPATH": str(site), "PATH": "", "HOME": str(tmp_path)}
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    run = subprocess.run([sys.executable, "-c", code], **options, check=True)
    assert run.stdout.startswith(str(site))


def test_the_same_files_give_the_same_wheel_at_another_time(tmp_path, monkeypatch):
    first = build_wheel(tmp_path / "a").read_bytes()
    later = time.time() + 1000
    monkeypatch.setattr(time, "time", lambda: later)
    assert hashlib.sha256(build_wheel(tmp_path / "b").read_bytes()).digest() == hashlib.sha256(first).digest()


def test_the_wheel_holds_sources_and_configs_only(tmp_path):
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    assert "helpers/pipeline/stream.py" in names
    assert "helpers/models/configs/google--flan-t5-xl.json" in names
    assert not [name for name in names if name.startswith("helpers/local_cloud")]
    assert any(name.endswith("dist-info/entry_points.txt") for name in names), "for Dataflow's launcher"
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
