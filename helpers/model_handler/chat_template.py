"""Chat templates, rendered where they can do no harm: in a process of their own, within limits.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from the machine, but not
from looping for ever or filling the memory; only a process can be stopped. What exceeds the limits fails the
prompt that it was rendered for.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""How long a template may take for one prompt. Published ones take less than a millisecond."""

START_SECONDS = 120.0
"""How long the process may take to start, on a busy machine."""

MEMORY_BYTES = 512 * 2**20
"""The memory that a template may take, on Linux."""


class TemplateError(ValueError):
    """A chat template that cannot be rendered for a prompt, or not within the limits."""


class TemplateStoppedError(TemplateError):
    """A rendering that was stopped: the time or the memory was not enough, perhaps only this once."""


class ChatTemplate:
    """A tokenizer's chat template.

    One process renders all templates of this one. It is started when the first of them is made, so that it is
    ready when the first prompt comes, and anew when a template had to be stopped. Several threads may use it:
    they take turns, also those of different models.

    Args:
        tokenizer: one that has a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = {
            "template": tokenizer.get_chat_template(),
            "special_tokens": tokenizer.special_tokens_map,
        }
        with _lock:
            _running()

    def render(self, turns: list[dict[str, Any]], most_characters: int) -> str:
        """The template's text of a conversation, up to where the model's answer begins.

        Args:
            turns: what was said, each with its `role` and `content`.
            most_characters: the most that the text may have.

        Raises:
            TemplateError: the template cannot be rendered for this prompt.
            TemplateStoppedError: not within the limits.
        """
        request = {**self._template, "messages": turns, "most_characters": most_characters}
        with _lock:
            answer = _running().ask(request)
        if "text" not in answer:
            kind = TemplateStoppedError if answer.get("was_stopped") else TemplateError
            raise kind(f"the chat template cannot be rendered for this prompt: {answer['error']}")
        return answer["text"]


class _Process:
    def __init__(self) -> None:
        # Not -m: a worker need not have this package in its path. The path of modules is this process's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._is_ready = False
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        self._end = weakref.finalize(self, _end, self._process)
        self._send({"memory_bytes": MEMORY_BYTES})

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict) -> dict:
        """The process's answer, or the reason why there is none; then the process is ended."""
        try:
            if not self._is_ready:
                answer = self._answer(START_SECONDS)
                if "error" in answer:
                    return answer
                self._is_ready = True
            self._send(request)
            return self._answer(SECONDS)
        except BaseException:  # an interrupt: its answer would be taken for the next one's
            self._end()
            raise

    def _answer(self, seconds: float) -> dict:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            line, reason = "", f"it took longer than {seconds:g} s"
        else:
            reason = "its process ended, as one does that takes too much memory"
        if not line:
            self._end()
            return {"error": reason, "was_stopped": True}
        return json.loads(line)

    def _send(self, message: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which its answer tells


_lock = threading.Lock()
_shared: _Process | None = None
_of_parents: list[_Process] = []  # kept, because a fork must not end or close what is its parent's


def _after_fork() -> None:
    global _lock, _shared
    _lock = threading.Lock()
    if _shared is not None:
        _shared._end.detach()
        _of_parents.append(_shared)
        _shared = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _running() -> _Process:
    """The process that renders; for a caller who holds the lock."""
    global _shared
    if _shared is None or not _shared.is_alive():
        _shared = _Process()
    return _shared


def _read(process: subprocess.Popen, answers: queue.Queue[str]) -> None:
    for line in process.stdout:
        answers.put(line.decode())
    answers.put("")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what it did not read cannot be written any more
            pipe.close()
