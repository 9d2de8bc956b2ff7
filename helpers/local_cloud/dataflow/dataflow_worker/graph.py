"""Makes a pipeline's graph run here: other Pub/Sub sources and sinks, and this process as its environment."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

READ = "beam:transform:pubsub_read:v1"
WRITE = "beam:transform:pubsub_write:v1"
IMPULSE = "beam:transform:impulse:v1"
PAR_DO = "beam:transform:pardo:v1"
FLATTEN = "beam:transform:flatten:v1"
RESHUFFLE = "beam:transform:reshuffle:v1"

# Names of what is added to a graph; Beam's own begin with "ref_" or "external_".
_CODER = "local_bytes_coder"
_SOURCE = "local_source"


@dataclass(frozen=True)
class Source:
    """A Pub/Sub read of a pipeline. Either `topic` or `subscription` is empty."""

    transform_id: str
    topic: str
    subscription: str
    timestamp_attribute: str
    id_attribute: str
    with_attributes: bool


def sources(pipeline: Any) -> list[Source]:
    """The Pub/Sub reads of a pipeline."""
    found = []
    for id_, transform in sorted(pipeline.components.transforms.items()):
        if transform.spec.urn == READ:
            read = beam_runner_api_pb2.PubSubReadPayload.FromString(transform.spec.payload)
            found.append(
                Source(
                    id_,
                    read.topic,
                    read.subscription,
                    read.timestamp_attribute,
                    read.id_attribute,
                    read.with_attributes,
                )
            )
    return found


def sink_topics(pipeline: Any) -> set[str]:
    """The topics that a pipeline publishes to through Dataflow's own sink."""
    return {
        beam_runner_api_pb2.PubSubWritePayload.FromString(t.spec.payload).topic
        for t in pipeline.components.transforms.values()
        if t.spec.urn == WRITE
    }


def check_update(old: Any, new: Any, mapping: dict[str, str]) -> None:
    """Raises ValueError where a pipeline cannot take another's place: one of its steps is gone."""

    def steps(pipeline: Any) -> set[str]:
        transforms = pipeline.components.transforms.values()
        return {t.unique_name for t in transforms if not t.subtransforms and not _does_nothing(t)}

    def mapped(name: str) -> str:
        for before, after in mapping.items():
            if name == before or name.startswith(f"{before}/"):
                return after + name.removeprefix(before)
        return name

    if missing := sorted(name for name in steps(old) if mapped(name) not in steps(new)):
        raise ValueError(
            f"The new job is not compatible with the original one, which goes on: it is missing steps "
            f"{', '.join(missing)}. If these were renamed, give a transform_name_mapping."
        )


def use_this_process(pipeline: Any) -> None:
    """Makes every transform run in this process instead of in a container."""
    for environment in pipeline.components.environments.values():
        environment.Clear()
        environment.urn = python_urns.EMBEDDED_PYTHON


def is_one_stage(pipeline: Any) -> bool:
    """Whether nothing in a pipeline groups, remembers, or waits for something else: each bundle goes through
    all of it at once."""
    transforms = pipeline.components.transforms.values()
    leaves = [t for t in transforms if not t.subtransforms and not _does_nothing(t)]
    return [t.spec.urn for t in leaves].count(IMPULSE) == 1 and all(
        t.spec.urn in (IMPULSE, FLATTEN) or (t.spec.urn == PAR_DO and _is_plain(t)) for t in leaves
    )


def _is_plain(transform: Any) -> bool:
    payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
    more = payload.state_specs, payload.timer_family_specs, payload.side_inputs, payload.restriction_coder_id
    return not any(more)


def leave_out_reshuffles(pipeline: Any) -> None:
    """Takes the reshuffles out of a pipeline: they change no element."""
    transforms = pipeline.components.transforms
    passed_on = {}
    for id_ in [id_ for id_, transform in transforms.items() if transform.spec.urn == RESHUFFLE]:
        (before,), (after,) = transforms[id_].inputs.values(), transforms[id_].outputs.values()
        passed_on[after] = before
        for gone in _descendants(pipeline, [id_]):
            del transforms[gone]
    for transform in transforms.values():
        for collections in (transform.inputs, transform.outputs):
            for name, collection in list(collections.items()):
                while collection in passed_on:
                    collection = passed_on[collection]
                collections[name] = collection
        kept = [id_ for id_ in transform.subtransforms if id_ in transforms]
        del transform.subtransforms[:]
        transform.subtransforms.extend(kept)


def replace_sinks(pipeline: Any, publish: type[beam.DoFn]) -> None:
    """Replaces Dataflow's Pub/Sub sinks by `publish(topic, id_attribute, timestamp_attribute)`."""
    components = pipeline.components
    for id_, transform in components.transforms.items():
        if transform.spec.urn != WRITE:
            continue
        write = beam_runner_api_pb2.PubSubWritePayload.FromString(transform.spec.payload)
        transform.spec.CopyFrom(_par_do(publish(write.topic, write.id_attribute, write.timestamp_attribute)))
        transform.environment_id = next(iter(components.environments))
        if not transform.outputs:  # a ParDo has a main output, though this one stays empty
            (input_id,) = transform.inputs.values()
            output = f"{id_}_output"
            components.pcollections[output].CopyFrom(components.pcollections[input_id])
            components.pcollections[output].unique_name = output
            transform.outputs["None"] = output


def replace_source_by_impulse(pipeline: Any, id_: str, read: beam.DoFn) -> None:
    """Replaces a Pub/Sub read by a DoFn that is called once for each bundle, with bytes."""
    components = pipeline.components
    components.coders[_CODER].spec.urn = "beam:coder:bytes:v1"
    source = components.transforms[_SOURCE]
    source.unique_name = "LocalPubSub"
    source.spec.CopyFrom(beam_runner_api_pb2.FunctionSpec(urn=IMPULSE))
    like = next(iter(components.transforms[id_].outputs.values()))
    source.outputs["None"] = collection = f"{_SOURCE}_output"
    made = components.pcollections[collection]
    made.CopyFrom(components.pcollections[like])  # in the global window, as every source
    made.unique_name, made.coder_id = collection, _CODER
    roots = list(pipeline.root_transform_ids)
    if len(roots) == 1 and components.transforms[roots[0]].subtransforms:
        components.transforms[roots[0]].subtransforms.insert(0, _SOURCE)
    else:
        pipeline.root_transform_ids.insert(0, _SOURCE)
    components.transforms[id_].spec.CopyFrom(_par_do(read))
    components.transforms[id_].environment_id = next(iter(components.environments))
    components.transforms[id_].inputs["0"] = collection


def _par_do(function: beam.DoFn) -> Any:
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Impulse() | "function" >> beam.ParDo(function).with_output_types(bytes)
    proto = pipeline.to_runner_api()
    return next(t.spec for t in proto.components.transforms.values() if t.unique_name == "function")


def _descendants(pipeline: Any, ids: Iterable[str]) -> set[str]:
    found: set[str] = set()
    pending = list(ids)
    while pending:
        id_ = pending.pop()
        found.add(id_)
        pending += pipeline.components.transforms[id_].subtransforms
    return found


def _does_nothing(transform: Any) -> bool:
    """Whether a transform is a composite that passes its input on, such as Create's MaybeReshuffle."""
    return bool(transform.outputs) and set(transform.outputs.values()) <= set(transform.inputs.values())
