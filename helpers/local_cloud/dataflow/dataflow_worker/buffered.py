"""Which messages a stateful pipeline still holds back, so that they are not acknowledged before their time.

A message may wait in the pipeline's state for its batch or its window. Dataflow keeps state on disk, and may
acknowledge a message once it is there; here, state lives in the worker and ends with it. So a message counts
as done once nothing is left, in the pipeline's buffers, of what came into them with it or after it.

Buffers are bags in user state, and what waits to be grouped. Other state (values, combined values, sets)
sums up messages rather than holding them back. It ends with the worker too, without holding up anything.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from apache_beam.transforms import userstate

_GROUPING = "elements"  # where Beam's trigger driver keeps what waits to be grouped
_USER = "user/"  # the prefix that the bundle-based runner gives to user state


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
        self._held: dict[int, tuple[Any, int, int]] = {}  # by identity: the element, its step, its transform

    def oldest(self, step: int) -> int:
        """The number of the oldest step of which something is still held back.

        To be called after each step, when the runner has nothing left to do.

        Args:
          step: the number of the step just done.

        Returns:
          One of the numbers given so far, or the one after them if nothing is held back.
        """
        with self._lock:
            found = {id(element): (element, place) for element, place in self._elements()}
        left = [(place, since) for key, (_, since, place) in self._held.items() if key not in found]
        held = {}
        for key, (element, place) in found.items():
            # What is new here came with this step's messages, or was released further up during it.
            since = min([step, *(s for p, s in left if p < place)])
            if key in self._held:
                since = self._held[key][1]
            held[key] = (element, since, place)
        self._held = held
        return min((since for _, since, _ in held.values()), default=step + 1)

    def _elements(self) -> Iterator[tuple[Any, int]]:
        for place, transform in enumerate(self._transforms):
            tags = _tags(transform)
            for state in self._states[transform].values():
                for by_tag in getattr(state, "state", {}).values():
                    for tag in tags & by_tag.keys():
                        yield from ((element, place) for element in by_tag[tag])


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
