"""Chat templates and tokenizers that come with a checkpoint, and mean harm: what exceeds fails its prompt."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from conftest import PATIENCE, wait_until
from tiny_models import save_checkpoint
from transformers import AutoTokenizer

from helpers.load_state_dict import convert
from helpers.model_handler import chat_template
from helpers.model_handler.chat_template import ChatTemplate, TemplateError
from helpers.model_handler.language_model import Failure, Response
from helpers.model_handler.options import AnsweringOptions
from helpers.model_handler.served_model import ModelSource
from helpers.models.model_error import ModelError

OPTIONS = AnsweringOptions(max_response_tokens=2)


def load(tmp_path, template: str | None = None, change=None):
    """A tiny model with another chat template, or another tokenizer."""
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint("llama", checkpoint)
    if template is not None:
        (checkpoint / "chat_template.jinja").write_text(template)
    if change:
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
        change(tokenizer)
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(str(checkpoint), tmp_path / "m.pt", progress=False)
    return ModelSource(str(tmp_path / "m.pt"), cache_dir=str(tmp_path / "cache")).load()[0]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def tokenizer_of(tmp_path, template: str):
    save_checkpoint("llama", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_is_rendered_as_transformers_renders_it(tmp_path):
    tokenizer = tokenizer_of(
        tmp_path,
        "{{ bos_token }}{% for message in messages %}{{ message | tojson }}{{ strftime_now('%Y') }}"
        "{% endfor %}{% if add_generation_prompt %}go{% endif %}",
    )
    prompt = "é 'quoted' <|end|>\n{{ x }}"
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate(tokenizer).render(said(prompt), 10_000) == expected
    template = ChatTemplate(tokenizer)
    process = chat_template._running()
    for _ in range(20):
        template.render(said("Hi"), 10_000)
    assert chat_template._running() is process, "a prompt must not wait for a process of its own"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ 'a' * 1000000000 }}", "MemoryError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 1 s"),
        ("{% for a in range(99999) %}{{ messages }}{% endfor %}", "characters"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_exceeds_fails_its_prompt(template, error, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0 if "longer" in error else PATIENCE)
    hostile = ChatTemplate(tokenizer_of(tmp_path, template))
    for _ in range(2):  # the second has a process that lives, too
        with pytest.raises(TemplateError, match=error):
            hostile.render(said("Hi"), 10_000)


def test_one_prompt_that_makes_its_template_loop_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 10.0)
    model = load(
        tmp_path,
        "{% for m in messages %}{% if 'bad' in m.content %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}",
    )
    good, bad, other = model.ask(["good", "bad", "other"], OPTIONS)
    assert isinstance(good, Response)
    assert isinstance(other, Response)
    assert isinstance(bad, Failure)
    assert "longer than 10 s" in bad.error


def test_the_process_ends_with_its_parent(tmp_path):
    tokenizer_of(tmp_path, "x")
    program = (
        "import sys, os, time; from transformers import AutoTokenizer\n"
        "from helpers.model_handler import chat_template\n"
        "from helpers.model_handler.chat_template import ChatTemplate\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'm')!r})\n"
        "t.chat_template = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'\n"
        "c = ChatTemplate(t); print(chat_template._running()._process.pid, flush=True); c.render([], 9)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    child = psutil.Process(int(parent.stdout.readline()))
    before = child.cpu_times().user
    wait_until(lambda: child.cpu_times().user > before + 2, "the template does not loop")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=PATIENCE)


def test_a_panic_of_the_tokenizers_library_fails_its_prompt_only(tmp_path):
    def backtracking(tokenizer: dict) -> None:
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, levels]}

    model = load(tmp_path, change=backtracking)
    good, bad = model.ask(["good", "a" * 40 + "b"], OPTIONS)
    assert isinstance(good, Response)
    assert isinstance(bad, Failure)
    assert "tokenizer fails" in bad.error


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_whose_replacements_multiply_is_refused(part, tmp_path):
    def doubling(tokenizer: dict) -> None:
        steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30
        tokenizer[part] = {"type": "Sequence", f"{part}s": steps}

    with pytest.raises(ModelError, match="times as long"):
        load(tmp_path, change=doubling)
