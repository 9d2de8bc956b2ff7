"""What a stateful pipeline holds back, step by step, on a stand-in for the runner's state."""

import threading
from types import SimpleNamespace

import pytest
from apache_beam.transforms.window import FixedWindows, Sessions

from helpers.local_cloud.dataflow.dataflow_worker.buffered import Buffers


class Transform:
    """One that groups."""

    def __init__(self, windowfn=None):
        self.transform = SimpleNamespace()
        windowing = SimpleNamespace(windowfn=windowfn or FixedWindows(10))
        self.inputs = [SimpleNamespace(windowing=windowing)]


class Pipeline:
    """Transforms in a row; `hold` says what each holds, by window."""

    def __init__(self, *transforms):
        self.states = {one: {} for one in transforms}
        self.buffers = Buffers(
            SimpleNamespace(
                _transform_keyed_states=self.states, _lock=threading.Lock(), _step_names=list(transforms)
            )
        )

    def hold(self, step, *windows):
        """The oldest step held back, when the transforms hold these elements by window."""
        for state, held in zip(self.states.values(), windows, strict=True):
            state["key"] = SimpleNamespace(state={w: {"elements": e} for w, e in held.items()})
        return self.buffers.oldest(step)


def element(name):
    return [name]  # an object of its own


def test_nothing_held_back_is_done():
    pipeline = Pipeline(Transform())
    assert pipeline.hold(1, {}) == 2
    assert pipeline.hold(2, {"w": []}) == 3


def test_what_waits_keeps_its_step_and_later_ones_wait_behind_it():
    pipeline, a, b = Pipeline(Transform()), element("a"), element("b")
    assert pipeline.hold(1, {"w": [a]}) == 1
    assert pipeline.hold(2, {"w": [a, b]}) == 1
    assert pipeline.hold(3, {"v": [b]}) == 3  # the window was emptied, and something new came
    assert pipeline.hold(4, {}) == 5


def test_a_buffer_that_is_emptied_and_filled_in_one_step_holds_what_is_new_only():
    pipeline = Pipeline(Transform())
    assert pipeline.hold(1, {"w": [element("a"), element("b")]}) == 1
    assert pipeline.hold(2, {"w": [element("c"), element("d"), element("e")]}) == 2
    assert pipeline.hold(3, {"w": [element("f")]}) == 3


@pytest.mark.parametrize("value", [1, None, True, "a"])
def test_values_that_are_one_object_do_not_hold_up_other_windows(value):
    """As in counting words, whose values are all the same 1, in windows that overlap."""
    pipeline = Pipeline(Transform())
    assert pipeline.hold(1, {1: [value]}) == 1
    assert pipeline.hold(2, {1: [value] * 2, 2: [value]}) == 1
    assert pipeline.hold(3, {2: [value] * 2, 3: [value]}) == 2
    assert pipeline.hold(4, {3: [value] * 2, 4: [value]}) == 3


def test_what_is_released_further_up_keeps_its_step():
    pipeline, a = Pipeline(Transform(), Transform()), element("a")
    assert pipeline.hold(1, {"w": [a]}, {}) == 1
    assert pipeline.hold(2, {}, {"w": [element("made of a")]}) == 1
    assert pipeline.hold(3, {"w": [element("b")]}, {}) == 3
    assert pipeline.hold(4, {"w": [element("c")]}, {"w": [element("made of b")]}) == 3


def test_elements_of_windows_that_merge_keep_their_steps():
    pipeline, a, b = Pipeline(Transform(Sessions(10))), element("a"), element("b")
    assert pipeline.hold(1, {"one": [a]}) == 1
    assert pipeline.hold(2, {"one": [a], "two": [b]}) == 1
    assert pipeline.hold(3, {"merged": [a, b]}) == 1
    assert pipeline.hold(4, {}) == 5
