"""What the notebooks show: tables without empty columns and false digits, checked numbers, a prompt box."""

import itertools
import threading

import pytest
from conftest import PATIENCE

from helpers import notebook
from helpers.notebook import interaction


def test_a_column_that_is_empty_in_every_row_is_left_out():
    rows = [{"what": "a", "mend": "", "data": b"\xff"}, {"what": "b", "mend": "", "data": b""}]
    text = repr(notebook.table(rows))
    assert "mend" not in text
    assert "mend" not in notebook.table(rows)._repr_html_()
    assert r"b'\xff'" in text
    assert "mend" in repr(notebook.table([*rows, {"what": "c", "mend": "this", "data": b""}]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (312.4049, "312"),
        (33.995, "34.0"),
        (0.5289, "0.529"),
        (2.0, "2.0"),
        (12345.6, "12,346"),
        (0.0, "0.0"),
        (0.2, "0.2"),
        (3.14159, "3.14"),
    ],
)
def test_measured_numbers_have_three_significant_digits(value, shown):
    table = notebook.table([{"x": value}])
    assert repr(table).split()[-1] == shown
    assert f">{shown}<" in table._repr_html_()


def test_text_in_a_table_is_shown_as_it_is():
    assert "&lt;b&gt;" in notebook.table([{"x": "<b>"}])._repr_html_()


def test_a_table_without_rows_is_shown():
    assert notebook.table([])._repr_html_()


@pytest.mark.parametrize("value", [-5, 2.5, float("nan"), float("inf"), "3", None, True])
def test_a_parameter_that_is_no_number_or_too_small_is_refused(value):
    with pytest.raises(ValueError, match=r"load = .*: it must be a whole number of at least 0"):
        notebook.at_least(0, n=0, load=value)


def test_a_price_need_not_be_whole():
    notebook.at_least(0.0, price_per_hour=2.5, other=0)
    with pytest.raises(ValueError, match=r"price = -0\.1: it must be a number of at least 0"):
        notebook.at_least(0.0, price=-0.1)


@pytest.mark.parametrize("value", ["Paris", ["a", ""], ["a", 1], None])
def test_a_parameter_that_is_no_list_of_texts_is_refused(value):
    notebook.texts(prompts=["Paris"], others=[])
    with pytest.raises(ValueError, match=r"prompts = .*: it must be a list of texts"):
        notebook.texts(prompts=value)


def test_a_board_keeps_its_first_row_and_the_last(monkeypatch):
    board = notebook.Board(most_rows=3)
    monkeypatch.setattr("IPython.display.display", lambda table, display_id: None)
    for n in range(6):
        board.add({"n": n})
    assert [row["n"] for row in board._rows] == [0, 4, 5]


def test_the_clock_of_progress_goes_on_while_nothing_arrives(monkeypatch):
    seen = threading.Event()
    with notebook.progress("waiting", every=0.01) as bar:
        monkeypatch.setattr(bar, "refresh", lambda *_, **__: seen.set())
        assert seen.wait(PATIENCE)
        assert "waiting: 00:0" in str(bar)


@pytest.fixture
def box(monkeypatch):
    """Makes a prompt box, and returns its parts."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)

    def make(ask):
        seconds = itertools.count()
        notebook.prompt_box(ask, now=lambda: next(seconds))
        row, answer = shown[-1].children
        return *row.children, answer

    return make


def test_a_prompt_that_is_typed_is_asked_and_answered(box):
    text, button, answer = box(lambda prompt: f"<{prompt}>")
    button.click()
    assert answer.value == "", "nothing was typed"
    text.value = " Hello "
    button.click()
    assert "&lt;Hello&gt;\n(1.0 s)" in answer.value
    assert not (text.disabled or button.disabled)


def test_a_prompt_that_has_no_answer_or_an_error_says_so(box):
    text, button, answer = box(lambda prompt: None)
    text.value = "Hello"
    button.click()
    assert "No answer in 1 s." in answer.value

    def fail(_):
        raise RuntimeError("the topic is gone")

    text, button, answer = box(fail)
    text.value = "Hello"
    button.click()
    assert "It could not be asked: the topic is gone" in answer.value
    assert not button.disabled


def test_progress_ends_when_its_work_fails():
    with pytest.raises(ZeroDivisionError), interaction.progress("work", 3):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("false", bool, "-p overwrite False"),
        (0, bool, "True or False"),
        (True, int, "a whole number"),
        ("4", float, "a number"),
        (4, str, "-r overwrite 4"),
        ("a", list, "a list"),
    ],
)
def test_a_parameter_of_another_type_is_refused_with_the_right_form(value, kind, said):
    """`-p overwrite false` is a text for papermill, and true: a state dict was replaced that was to stay."""
    with pytest.raises(ValueError, match="overwrite = ") as caught:
        notebook.check_types({"__annotations__": {"overwrite": kind}, "overwrite": value})
    assert said in str(caught.value)


def test_parameters_of_their_types_pass():
    values = {"a": True, "b": 3, "c": 3, "d": "x", "e": [], "f": None}
    kinds = {"a": bool, "b": int, "c": float, "d": str, "e": list, "f": object, "gone": int}
    notebook.check_types({"__annotations__": kinds} | values)
    notebook.check_types(values)
