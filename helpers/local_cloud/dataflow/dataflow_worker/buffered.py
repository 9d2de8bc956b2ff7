"""Which messages a stateful pipeline still holds back, so that they are not acknowledged before their time.

A message may wait in the pipeline's state for its batch or its window. Dataflow keeps state on disk, and may
acknowledge a message once it is there; here, state lives in the worker and ends with it. So a message counts
as done once nothing is left, in the pipeline's buffers, of what came into them with it or after it.

Buffers are bags in user state, and what waits to be grouped. Values, combined values and sets in user state
are not looked at: most sum up messages, and never become empty. Nor is a bag's content followed when a
function takes it out and puts something else in: what is put in counts as new.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from apache_beam.transforms import userstate

_GROUPING = "elements"  # where Beam's trigger driver keeps what waits to be grouped
_USER = "user/"  # the prefix that the bundle-based runner gives to user state

_Cell = tuple[int, Any, Any, str]  # the place of a transform, a key, a window, a tag


class Buffers:
    """The buffers of a pipeline that runs on the bundle-based runner.

    Args:
      evaluation_context: the runner's, of the pipeline.
    """

    def __init__(self, evaluation_context: Any):
        self._states = evaluation_context._transform_keyed_states
        self._lock = evaluation_context._lock
        # From upstream to downstream, as the runner numbers its steps.
        order = {transform: n for n, transform in enumerate(evaluation_context._step_names)}
        self._transforms = sorted(self._states, key=lambda transform: order.get(transform, 0))
        self._tags = [_tags(transform) for transform in self._transforms]
        self._merges = [_merges(transform) for transform in self._transforms]
        self._held: dict[_Cell, tuple[list[Any], list[int]]] = {}  # elements, and the step of each

    def oldest(self, step: int) -> int:
        """The number of the oldest step of which something is still held back.

        To be called after each step, when the runner has nothing left to do.

        Args:
          step: the number of the step just done.

        Returns:
          One of the numbers given so far, or the one after them if nothing is held back.
        """
        with self._lock:
            found = {cell: list(elements) for cell, elements in self._cells() if elements}
        released: list[tuple[int, int]] = []  # places, and steps of what has left them
        moved: dict[tuple[int, Any, int], int] = {}  # steps of what has left, by place, key and identity
        kept: dict[_Cell, list[int]] = {}
        for cell, (elements, steps) in self._held.items():
            if _begins_with(found.get(cell, []), elements):
                kept[cell] = steps
                continue
            place, key = cell[:2]
            for element, since in zip(elements, steps, strict=True):
                released.append((place, since))
                if self._merges[place]:
                    moved[place, key, id(element)] = since
        held = {}
        for cell, elements in found.items():
            place, key = cell[:2]
            # What is new here came with this step's messages, or was released further up during it.
            since = min([step, *(one for where, one in released if where < place)])
            steps = kept.get(cell, [])
            new = elements[len(steps) :]
            held[cell] = (
                elements,
                steps + [min(since, moved.get((place, key, id(one)), since)) for one in new],
            )
        self._held = held
        return min((min(steps) for _, steps in held.values()), default=step + 1)

    def _cells(self) -> Iterator[tuple[_Cell, list[Any]]]:
        for place, (transform, tags) in enumerate(zip(self._transforms, self._tags, strict=True)):
            for key, state in self._states[transform].items():
                for window, by_tag in getattr(state, "state", {}).items():
                    for tag in tags & by_tag.keys():
                        yield (place, key, window, tag), by_tag[tag]


def _begins_with(elements: list[Any], before: list[Any]) -> bool:
    """Whether a buffer was only added to. It is emptied as a whole, so its ends tell."""
    last = len(before) - 1
    return len(elements) > last and elements[0] is before[0] and elements[last] is before[last]


def _merges(transform: Any) -> bool:
    """Whether windows may merge in a transform, and their elements move."""
    return any(one.windowing.windowfn.is_merging() for one in transform.inputs if hasattr(one, "windowing"))


def has_other_state(evaluation_context: Any) -> bool:
    """Whether the pipeline has state that sums up messages rather than holding them back."""
    transforms = evaluation_context._transform_keyed_states
    return any(
        not isinstance(spec, userstate.BagStateSpec)
        for transform in transforms
        for spec in _state_specs(transform)
    )


def _tags(transform: Any) -> set[str]:
    bags = (s for s in _state_specs(transform) if isinstance(s, userstate.BagStateSpec))
    return {_GROUPING, *(f"{_USER}{bag.name}" for bag in bags)}


def _state_specs(transform: Any) -> Iterable[Any]:
    function = getattr(transform.transform, "dofn", None)
    return userstate.get_dofn_specs(function)[0] if function else ()
