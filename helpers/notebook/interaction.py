"""What a notebook asks of its reader, and what it shows while the reader waits."""

from __future__ import annotations

import contextlib
import html
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from tqdm.auto import tqdm

_KINDS = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text in quotes"),
    list: ((list,), "a list"),
}


def check_types(namespace: Mapping[str, object]) -> None:
    """Checks a notebook's parameters against their annotations: papermill's `-p overwrite false` is a text,
    and a text that is not empty counts as true.

    Args:
        namespace: the kernel's variables; those without an annotation are left alone.

    Raises:
        ValueError: one has another type.
    """
    for name, kind in dict(namespace.get("__annotations__") or {}).items():
        if kind not in _KINDS or name not in namespace:
            continue
        value, (kinds, text) = namespace[name], _KINDS[kind]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            how = f"-p {name} True or -p {name} False" if kind is bool else f"-y '{{{name}: VALUE}}'"
            if kind is str:
                how = f"-r {name} {value}"
            raise ValueError(f"{name} = {value!r}: it must be {text}. (On papermill's command line: {how}.)")


def at_least(least: float, **parameters: object) -> None:
    """Checks parameters that are numbers, before anything is made that they are for.

    Args:
        least: the least value. If it is an int, whole numbers are asked for.
        parameters: the values, by the parameters' names.

    Raises:
        ValueError: one is less, or no number.
    """
    kind, kinds = ("a whole number", int) if isinstance(least, int) else ("a number", int | float)
    for name, value in parameters.items():
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < math.inf:
            raise ValueError(f"{name} = {value!r}: it must be {kind} of at least {least:g}.")


def texts(**parameters: object) -> None:
    """Checks parameters that are lists of texts: a text alone would be taken for a list of its letters.

    Raises:
        ValueError: one is something else, or holds an empty text, of which Pub/Sub makes no message.
    """
    for name, value in parameters.items():
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise ValueError(f"{name} = {value!r}: it must be a list of texts, none of them empty.")


def rising(**parameters: object) -> None:
    """Checks parameters that are lists of numbers above 0, the least first.

    Raises:
        ValueError: one is something else, or empty.
    """
    for name, value in parameters.items():
        numbers = isinstance(value, list) and all(
            type(one) in (int, float) and 0 < one < 1e9 for one in value
        )
        if not numbers or not value or value != sorted(set(value)):
            raise ValueError(f"{name} = {value!r}: it must be a list of numbers above 0, the least first.")


def job_options(**parameters: object) -> None:
    """Checks parameters that are lists of answering options, as `[{"max_batch_size": 4}]`.

    Raises:
        ValueError: one is something else, or there is no such option or value.
    """
    from helpers.model_handler.options import answering_options

    for name, value in parameters.items():
        dicts = isinstance(value, list) and all(isinstance(one, dict) and one for one in value)
        if not dicts or any(value.count(one) > 1 for one in value):
            such = '[{"max_batch_size": 4}], with each change once'
            raise ValueError(f"{name} = {value!r}: it must be a list such as {such}.")
        for one in value:
            try:
                answering_options(one)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {one!r} cannot be: {error}") from error


@contextlib.contextmanager
def progress(what: str, total: int | None = None, every: float = 1.0) -> Iterator[tqdm]:
    """A bar whose clock goes on while nothing arrives.

        with progress("answers", len(ids)) as bar:
            collect_answers(..., progress=bar.update)

    Args:
        what: what is waited for.
        total: how many, if that is known.
        every: seconds between two looks at the clock.
    """
    form = None if total else "{desc}: {elapsed}"
    done = threading.Event()
    with tqdm(total=total, desc=what, bar_format=form, leave=False) as bar:

        def tick() -> None:
            while not done.wait(every):
                bar.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield bar
        finally:
            done.set()
            ticking.join()


def quiet_interactive_beam() -> None:
    """Hides the notices that Interactive Beam shows as coloured boxes, some of which read as instructions.

    Its warnings and errors still show.
    """
    from apache_beam.runners.interactive import interactive_environment

    interactive_environment.current_env()  # sets the level itself, when it is first asked for
    logging.getLogger("apache_beam.runners.interactive").setLevel(logging.WARNING)


def prompt_box(ask: Callable[[str], str | None], now: Callable[[], float] = time.monotonic) -> None:
    """A text box under the cell: a prompt that is typed into it is asked, and its answer shown with its time.

    A run that nobody watches passes it by: nothing happens until somebody types.

    Args:
        ask: takes a prompt; returns its answer, or None if none came in time.
        now: a clock, in seconds.
    """
    import ipywidgets
    from IPython.display import display

    text = ipywidgets.Text(placeholder="Type a prompt", layout=ipywidgets.Layout(width="32em"))
    button = ipywidgets.Button(description="Ask", layout=ipywidgets.Layout(width="6em"))
    shown = ipywidgets.HTML()

    def answer(_: object) -> None:
        prompt = text.value.strip()
        if not prompt or button.disabled:
            return
        text.disabled = button.disabled = True
        shown.value = "<i>asked, and waiting for the answer …</i>"
        started = now()
        try:
            said = ask(prompt)
        except Exception as error:  # there is no cell to show it under
            shown.value = _paragraph(f"It could not be asked: {error}")
        else:
            seconds = now() - started
            shown.value = _paragraph(
                f"{said}\n({seconds:.1f} s)" if said is not None else f"No answer in {seconds:.0f} s."
            )
        finally:
            text.disabled = button.disabled = False

    button.on_click(answer)
    display(ipywidgets.VBox([ipywidgets.HBox([text, button]), shown]))


def _paragraph(text: str) -> str:
    """Text as it is, whatever marks are in it."""
    return f"<div style='white-space: pre-wrap'>{html.escape(text)}</div>"
