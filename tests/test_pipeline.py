"""Pub/Sub messages through the pipeline: each comes out once, as a response or a dead letter, with its id."""

import json
import sys
from pathlib import Path
from unittest import mock

import apache_beam as beam
import jsonschema
import pytest
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that
from apache_beam.transforms import window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_checkpoint

from helpers.load_state_dict import convert
from helpers.model_handler import Failure, Response
from helpers.pipeline import AskModel, transforms
from helpers.pipeline.__main__ import main
from helpers.pipeline.command_line import check_beam_arguments, parser
from helpers.pipeline.stream import CommandLineError, build
from helpers.pipeline.transforms import MAX_ATTRIBUTES, AskMessages, FailedPrompt, to_dead_letter, to_response

RESPONSE = Response("text", 3, 2, "length")
SCHEMAS = Path(transforms.__file__).parent


def made(kind: str, tmp_path_factory) -> tuple[str, str]:
    """Name and state dict of a tiny model."""
    folder = tmp_path_factory.mktemp(kind)
    save_checkpoint(kind, folder / "checkpoint")
    convert(str(folder / "checkpoint"), folder / "model.pt", progress=False)
    return str(folder / "checkpoint"), str(folder / "model.pt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made("t5_distinct", tmp_path_factory)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return made("llama", tmp_path_factory)


def run(messages: list[PubsubMessage], model, **options) -> None:
    """Runs messages through the pipeline, and checks that each comes out, once, with its id."""

    def check(outputs):
        ids = [message.attributes["prompt_message_id"] for _, message in outputs]
        assert sorted(ids) == sorted(message.message_id for message in messages)
        by_id = {message.message_id: message for message in messages}
        for kind, message in outputs:
            sent = by_id[message.attributes["prompt_message_id"]]
            assert message.attributes["model_name"] == model[0]
            assert len(message.attributes) <= MAX_ATTRIBUTES
            if kind == "dead letter":
                assert message.data == sent.data
                assert message.attributes["error"]
            else:
                message.data.decode()
                sent.data.decode()
                assert "error" not in (message.attributes.keys() - sent.attributes.keys())

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        responses, dead_letters = (
            pipeline | beam.Create(messages) | AskMessages(*model, max_response_tokens=2, **options)
        )
        tagged = (
            responses | "r" >> beam.Map(lambda message: ("response", message)),
            dead_letters | "d" >> beam.Map(lambda message: ("dead letter", message)),
        ) | beam.Flatten()
        assert_that(tagged, check)


PAYLOADS = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(str.encode),
    st.text(alphabet=st.characters(max_codepoint=31), max_size=9).map(str.encode),
    st.just("\ud800".encode("utf-16", "surrogatepass")),
)
ATTRIBUTES = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.text(max_size=20),
    max_size=5,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(st.tuples(PAYLOADS, ATTRIBUTES), min_size=1, max_size=25))
def test_whatever_is_published_comes_out_once_with_its_id(batch, model):
    run([PubsubMessage(data, attributes, str(n)) for n, (data, attributes) in enumerate(batch)], model)


def test_large_payloads_and_full_attributes_come_out_too(model):
    full = {f"key {n}": "v" * 1024 for n in range(MAX_ATTRIBUTES)}
    run(
        [
            PubsubMessage(b"a", full, "1"),
            PubsubMessage(b"\xff", full, "2"),
            PubsubMessage(b"", {"a": "b"}, "3"),
            PubsubMessage("é".encode() * 300, {"error": "its own"}, "4"),
            PubsubMessage(b"Hi", {"prompt_message_id": "forged"}, "5"),
            PubsubMessage(b"Hi", {"googclient_deliveryattempt": "2", "own": "kept"}, "6"),
        ],
        model,
    )


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("kind", ["record", "conversation", "by attribute"])
def test_json_of_every_kind_comes_out_once_whatever_beam_makes_of_it(kind, chat_model):
    """What is parsed goes through Beam's coders, which take neither depth nor half characters."""
    texts = [
        '{"text": "Hi"}',
        '[{"role": "user", "content": "Hi"}]',
        '{"text": "\\ud800"}',
        '{"text": "Hi", "more": "\\ud800"}',
        '[{"role": "user", "content": "\\ud800"}]',
        "null",
        "{",
        *(nested(depth) for depth in (100, 500, 900, 2000, 100_000)),
        *(f'{{"text": "Hi", "more": {nested(depth)}}}' for depth in (100, 500, 900, 2000)),
        *(f'{{"text": {nested(depth)}}}' for depth in (500, 900)),
    ]
    attributes = {"prompt_format": "conversation"} if kind == "by attribute" else {}
    options = {"prompt_format": kind} if not attributes else {}
    if kind == "record":
        options["template"] = "About {text}"
    messages = [PubsubMessage(text.encode(), attributes, str(n)) for n, text in enumerate(texts)]
    run([*messages, PubsubMessage(b"Hi", {"prompt_format": "text"}, "last")], chat_model, **options)


def test_a_megabyte_of_text_is_a_dead_letter_if_prompts_are_limited(model):
    [message] = [PubsubMessage(b"word " * 200_000, {}, "1")]

    def check(outputs):
        assert ["limit is 64" in output.attributes["error"] for output in outputs] == [True]

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ask = AskMessages(*model, max_response_tokens=2, max_prompt_tokens=64)
        _, dead_letters = pipeline | beam.Create([message]) | ask
        assert_that(dead_letters, check)


def test_windows_and_timestamps_are_kept(model):
    def when(element, timestamp=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        return element.attributes["prompt_message_id"], timestamp.micros // 1_000_000, window.start.micros

    def check(outputs):
        assert sorted(outputs) == [("0", 3, 0), ("1", 7, 5_000_000)]

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        messages = [
            beam.window.TimestampedValue(PubsubMessage(b"Hi", {}, str(n)), second)
            for n, second in enumerate([3, 7])
        ]
        responses, _ = (
            pipeline
            | beam.Create(messages)
            | beam.Map(lambda message: message)
            | beam.WindowInto(beam.window.FixedWindows(5))
            | AskMessages(*model, max_response_tokens=2)
        )
        assert_that(responses | beam.Map(when), check)


WINDOWS = {
    "global": window.GlobalWindows(),
    "fixed": window.FixedWindows(5),
    "sliding": window.SlidingWindows(10, 5),
    "sessions": window.Sessions(3),
}


@pytest.mark.parametrize("runner", ["FnApiRunner", "BundleBasedDirectRunner"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_each_prompt_of_each_window_has_one_answer_in_that_window(kind, runner, model):
    def place(element, time=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        return str(element), time.micros, window.start.micros, window.end.micros

    with beam.Pipeline(runner=runner) as pipeline:
        prompts = (
            pipeline
            | beam.Create([window.TimestampedValue(f"prompt {n}", n * 4) for n in range(6)])
            | beam.Map(lambda prompt: prompt)
            | beam.WindowInto(WINDOWS[kind])
        )
        answers = prompts | AskModel(*model, 2)
        places = [
            collection | f"{n}" >> beam.Map(place) | f"all {n}" >> beam.WindowInto(window.GlobalWindows())
            for n, collection in enumerate((prompts, answers))
        ]
        for n, collection in enumerate(places):
            count = 12 if kind == "sliding" else 6
            assert_that(collection, _has(count), label=f"count {n}")
        same = places | beam.Flatten() | beam.Map(lambda one: one[1:]) | beam.combiners.Count.PerElement()
        assert_that(same, _pairs, label="same places")


def _has(count):
    def check(outputs):
        assert len(outputs) == count, outputs

    return check


def _pairs(outputs):
    assert outputs and all(count == 2 for _, count in outputs), outputs


def test_a_session_that_grew_keeps_its_window(model):
    def place(_, time=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        return window.start.micros, window.end.micros

    def check(outputs):
        assert outputs == [(0, 6_000_000)]

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        joined = (
            pipeline
            | beam.Create([window.TimestampedValue(("key", f"p{n}"), n) for n in range(4)])
            | beam.Map(lambda pair: pair)
            | beam.WindowInto(window.Sessions(3))
            | beam.GroupByKey()
            | beam.MapTuple(lambda key, prompts: " ".join(prompts))
        )
        assert_that(joined | AskModel(*model, 2) | beam.Map(place), check)


def test_nothing_is_sent_that_pubsub_refuses():
    """Otherwise publishing it would fail, and be retried, for ever."""
    attributes = {"googclient_deliveryattempt": "2", "own": "kept"}
    response = to_response((PubsubMessage(b"Hi", attributes, "1"), RESPONSE), "model", "text")
    assert response.attributes["own"] == "kept"
    assert response.attributes["attributes_left_out"] == "1"
    assert not [name for name in response.attributes if name.startswith("goog")]
    largest = PubsubMessage(b"\xff" * 9_999_000, {"a": "b" * 900}, "1", ordering_key="k" * 1024)
    letter = to_dead_letter(FailedPrompt((largest, ""), Failure("e" * 2000, "length", "a" * 2000)), "model")
    size = len(letter.data) + sum(len(f"{name}{value}") for name, value in letter.attributes.items())
    assert size < 10_000_000
    assert int(letter.attributes["data_bytes_cut"]) == len(largest.data) - len(letter.data) > 0


def test_errors_longer_than_an_attribute_may_be_are_cut():
    message = PubsubMessage(b"Hi", None, "1")
    letter = to_dead_letter(FailedPrompt((message, "Hi"), "é" * 2000), "model")
    assert len(letter.attributes["error"].encode()) <= 1024
    assert to_response((message, RESPONSE), "model", "text").attributes == {
        "prompt_message_id": "1",
        "model_name": "model",
        "finish_reason": "length",
        "prompt_tokens": "3",
        "response_tokens": "2",
    }


def test_a_record_says_all_and_fits_both_schemas():
    message = PubsubMessage("é".encode(), {"user": "7", "googx": "y"}, "1", ordering_key="k")
    response = to_response((message, RESPONSE), "model", "record")
    record = json.loads(response.data)
    assert record == {
        "prompt_message_id": "1",
        "answer": "text",
        "model_name": "model",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "response_tokens": 2,
        "reasoning_tokens": 0,
        "ordering_key": "k",
        "attributes": [{"name": "user", "value": "7"}],
    }
    assert response.attributes["ordering_key"] == "k"
    assert response.attributes["user"] == "7"
    schema = json.loads((SCHEMAS / "answer_record.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(record, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record | {"finish_reason": "tired"}, schema)
    columns = json.loads((SCHEMAS / "answer_record.bigquery.json").read_text())
    assert [column["name"] for column in columns] == list(record)
    kinds = {"STRING": "string", "INTEGER": "integer", "RECORD": "array"}
    for column in columns:
        described = schema["properties"][column["name"]]
        assert described["type"] == kinds[column["type"]]
        assert described["description"] == column["description"]
        # What BigQuery's client makes of it is the same again: names, types and modes are its own.
        assert bigquery_field(column) == column


def bigquery_field(column: dict) -> dict:
    from google.cloud.bigquery import SchemaField

    return SchemaField.from_api_repr(column).to_api_repr()


REQUIRED = ["--messages-topic=t", "--responses-topic=r", "--state-dict-path=p", "--model-name=m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--messages-topic=t", "--messages-subscription=s"], "not allowed with"),
        ([*REQUIRED, "--max-run-minute=5"], "do you mean --max-run-minutes"),
        ([*REQUIRED, "--max_run_minutes=60"], "do you mean --max-run-minutes"),
        ([*REQUIRED, "--exactly_once"], "do you mean --exactly-once"),
        ([*REQUIRED, "--devcie=cuda"], "do you mean --device"),
        ([*REQUIRED, "--max-response-tokens=0"], "it must be 1 or more"),
        ([*REQUIRED, "--max-response-seconds=0"], "it must be above 0"),
        ([*REQUIRED, "--reload-seconds=nan"], "it must be above 0"),
        ([*REQUIRED, "-max-run-minutes=60"], "do you mean --max-run-minutes"),
        ([*REQUIRED, "max_run_minutes=60"], "do you mean --max-run-minutes"),
        ([*REQUIRED, "--max-run-minutes=-1"], "not a time above 0"),
        ([*REQUIRED, "--max_num_worker=2"], "do you mean --max_num_workers"),
        ([*REQUIRED, "--subnet=x"], "do you mean --subnetwork"),
        ([*REQUIRED, "--qqqqqqqqq"], "there is no option --qqqqqqqqq\n"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys):
    with mock.patch.object(sys, "argv", ["pipeline", *arguments]), pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_no_option_of_beams_own_is_taken_for_one_of_ours():
    own = {f"--{name}" for name in PipelineOptions().get_all_options()}
    assert len(own) > 100
    ours = {option for action in parser()._actions for option in action.option_strings}
    assert own & ours == set()
    check_beam_arguments(["--project=p", "--region", "r", "--experiments=a", "--labels=b=c", "--streaming"])


def test_a_state_dict_that_is_not_there_is_told_on_every_runner():
    command = ["--messages-topic=t", "--responses-topic=r", "--state-dict-path=/none/m.pt", "--model-name=m"]
    with pytest.raises(SystemExit, match=r"error: .*manifest.json does not exist"):
        main(command)


def test_a_stream_that_would_read_what_it_publishes_is_refused(cloud):
    """One message made 60 of itself in twelve seconds, for ever, and paid for."""
    from helpers import pubsub
    from helpers.pipeline.stream import check_destinations

    topic = pubsub.create_topic(cloud.project, "circle")
    subscription = pubsub.create_subscription(topic, "circle")
    other = topic.replace("circle", "other")
    for source in ({"messages_topic": topic}, {"messages_subscription": subscription}):
        for names in (
            {"responses_topic": topic},
            {"responses_topic": other, "dead_letter_topic": topic},
            {"responses_topic": other, "dead_letter_topic": other},
        ):
            with pytest.raises(CommandLineError, match=r"a topic of (their|its) own"):
                check_destinations(**source, **names)
        check_destinations(**source, responses_topic=other)
    check_destinations(messages_subscription=subscription + "-absent", responses_topic=topic)
    with pytest.raises(CommandLineError, match="for ever"):
        build(
            beam.Pipeline(),
            model_name="m",
            state_dict_path="m.pt",
            messages_topic=topic,
            responses_topic=topic,
        )
    pubsub.delete(topic, subscription)
