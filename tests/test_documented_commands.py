"""The pages' commands work as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import BEFORE

ROOT = Path(__file__).parents[1]


def test_the_command_lines_page_goes_from_a_models_name_to_an_answer(tmp_path, packaged_checkpoint):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "command_line.md").read_text(), re.DOTALL)
    [script] = [block for block in blocks if "helpers.pipeline" in block]
    command = [sys.executable, "-m", "helpers.local_cloud", "--offline", "bash", "-e", "-c", script]
    path = f"{Path(sys.executable).parent}:{BEFORE['PATH']}"
    settings = {k: v for k, v in BEFORE.items() if k not in ("PROJECT", "BUCKET", "LOCATION")} | {
        "PATH": path
    }
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The capital of France is Paris." in done.stdout
    listed, reaped = re.findall(r"^name=\S+  state=(\w+)", done.stdout, re.MULTILINE)
    assert (listed, reaped) == ("RUNNING", "DRAINED")
    submitting = done.stderr.partition("helpers.dataflow watch")[0]
    assert len(submitting.splitlines()) < 30, "noise"
    assert (tmp_path / ".local_cloud" / "storage" / "local-project-streaming-llm").is_dir()
