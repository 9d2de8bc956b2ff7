"""The program of the process that renders a chat template: see `helpers.model_handler.chat_template`.

It reads lines of JSON and answers each with one: first the memory that rendering may take, in bytes; then a
conversation at a time, with its template and special tokens, and the most characters that may come of it. Its
memory is limited before it renders anything, so a template that fills it has an error.
"""

import json
import os
import signal
import sys
import threading
import time


def main() -> None:
    """Answers until its standard input ends."""
    # Ctrl-C in a terminal, and a notebook's interrupt, reach every process of the group: this one ends with
    # its parent, and says nothing about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers.utils.chat_template_utils import render_jinja_template

    start = json.loads(sys.stdin.readline())
    _limit_memory(start["memory_bytes"])
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            (text,), _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["special_tokens"],
            )
            if len(text) > request["most_characters"]:
                raise ValueError(f"it makes {len(text):,} characters of it")
            answer = {"text": text}
        except Exception as error:  # whatever a template raises is told
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
            text = None
        _answer(answer)


def _answer(answer: dict) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _end_with_parent(parent: int) -> None:
    """Ends the process with the one that started it, even while a template is looping; a single operation
    that takes long, such as a huge power, is waited for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Limits the process to some memory more than it has now, where the system can do that."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes, size + memory_bytes))
    except (ImportError, OSError, ValueError):  # not Linux: the time limit holds all the same
        pass


if __name__ == "__main__":
    main()
