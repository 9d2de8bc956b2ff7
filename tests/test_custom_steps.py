"""The example of steps of one's own, run as its docstring says: on files, and in a stream."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from tiny_models import save_checkpoint

from helpers import dataflow, pubsub
from helpers.load_state_dict import convert

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "custom_steps.py"


def run_example(*arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_file_of_prompts_becomes_a_file_of_answers(tmp_path):
    save_checkpoint("llama", tmp_path / "checkpoint")
    convert(str(tmp_path / "checkpoint"), tmp_path / "m.pt", progress=False)
    lines = ["Hello", "write to a.b@example.org", "x" * 3000, "Hello"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    run_example(
        *("--input", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers")),
        *("--state-dict-path", str(tmp_path / "m.pt"), "--model-name", str(tmp_path / "checkpoint")),
    )

    def read(pattern):
        found = [line for file in tmp_path.glob(pattern) for line in file.read_text().splitlines()]
        return [json.loads(line) for line in found]

    assert sorted(prompt for prompt, _ in read("answers-0*")) == ["Hello", "Hello", "write to [e-mail]"]
    [(prompt, reason)] = read("answers-failed-*")
    assert prompt == "x" * 3000
    assert "the limit is" in reason


def test_a_stream_has_the_steps_too(cloud, bucket, tmp_path):
    save_checkpoint("llama", tmp_path / "checkpoint")
    path = f"gs://{bucket.name}/tiny.pt"
    convert(str(tmp_path / "checkpoint"), path, progress=False)
    run = uuid.uuid4().hex[:8]
    topics = {name: pubsub.create_topic(cloud.project, f"{name}-{run}") for name in ("m", "r", "d")}
    waiting = {name: pubsub.create_subscription(topic, f"{name}-{run}") for name, topic in topics.items()}
    name = f"steps-{run}"
    submitted = run_example(
        *("--messages-subscription", waiting["m"], "--responses-topic", topics["r"]),
        *("--dead-letter-topic", topics["d"], "--state-dict-path", path),
        *("--model-name", str(tmp_path / "checkpoint"), "--max-response-tokens", "3"),
        *("--runner", "DataflowRunner", "--project", cloud.project, "--region", "us-central1"),
        *("--temp_location", f"gs://{bucket.name}/temp", "--job_name", name),
    )
    job = dataflow.Job(cloud.project, "us-central1", submitted.split()[-1])
    try:
        pubsub.publish(topics["m"], ["Hello", "write to a.b@example.org"])
        answers = pubsub.collect(waiting["r"], 2, timeout=300)
        assert len(answers) == 2
        for one in answers:
            assert (one.attributes["is_cut"] == "yes") == (one.attributes["finish_reason"] == "length")
        pubsub.publish(topics["m"], ["a.b@example.org " + "x" * 3000])
        [letter] = pubsub.collect(waiting["d"], 1, timeout=300)
        assert letter.data.startswith(b"[e-mail] xxx")
    finally:
        job.cancel(timeout=300)
        pubsub.delete(*topics.values(), *waiting.values())


@pytest.mark.parametrize("text", ["a@b", "", "no address", "é@é.é"])
def test_what_is_no_address_or_one_is_told_apart(text):
    sys.path.insert(0, str(EXAMPLE.parent))
    from custom_steps import redact

    assert redact(text) == ("[e-mail]" if text == "é@é.é" else text)
