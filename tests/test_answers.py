"""Answers that must have a form, and an end: validated JSON, asked for again, and a limit of time."""

import itertools
import json

import pytest
import torch
from tiny_models import VOCABULARY, byte_tokenizer, llama, save_checkpoint, t5
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from helpers.load_state_dict import convert
from helpers.model_handler import AnsweringOptions, Failure, LanguageModelHandler, Response
from helpers.model_handler.answer_schema import AnswerSchema, InvalidAnswerError
from helpers.model_handler.engines import deadline
from helpers.model_handler.engines.engine import Generated
from helpers.model_handler.engines.torch_engine import TorchEngine
from helpers.model_handler.language_model import WISH, LanguageModel
from helpers.model_handler.served_model import ModelSource

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"kind": {"enum": ["bill", "fault"]}, "urgent": {"$ref": "#/$defs/yes"}},
        "required": ["kind"],
        "additionalProperties": False,
        "$defs": {"yes": {"type": "boolean"}},
    }
)


class Scripted(TorchEngine):
    """Says what a script says to a prompt's text; notes what was asked."""

    def __init__(self, script) -> None:
        self.script, self.asked = script, []
        super().__init__(llama(), byte_tokenizer(chat=True))

    def generate(self, prompts, options, prefix_tokens=0, is_abandoned=None):
        texts = [self._tokenizer.decode(prompt) for prompt in prompts]
        self.asked.append(texts)
        answers = [self.script(text) for text in texts]
        return [Generated(self._tokenizer(answer)["input_ids"], "stop") for answer in answers]


def scripted(script) -> LanguageModel:
    return LanguageModel(Scripted(script), byte_tokenizer(chat=True))


def options(**values) -> AnsweringOptions:
    return AnsweringOptions(**{"max_response_tokens": 60, "answer_schema": SCHEMA} | values)


ANSWERS = {
    "plain": ('{"kind":"bill"}', '{"kind": "bill"}'),
    "spaced": (' {"kind": "fault", "urgent": true}\n', '{"kind": "fault", "urgent": true}'),
    "fenced": ('Here it is:\n```json\n{"kind": "bill"}\n```\nBye', '{"kind": "bill"}'),
    "talk": ('Sure! {"kind": "bill"} is right.', '{"kind": "bill"}'),
}
BAD = {
    "words": ("A bill.", "not JSON"),
    "other": ('{"kind": "poem"}', "kind: 'poem' is not one of"),
    "lacks": ("{}", "'kind' is a required property"),
    "more": ('{"kind": "bill", "x": 1}', "Additional properties"),
    "cut": ('{"kind": "bil', "not JSON"),
    "typed": ('{"kind": "bill", "urgent": "yes"}', "urgent: 'yes' is not of type"),
    "number": ("NaN", "not JSON"),
    "deep": ("[" * 2000, "not JSON"),
}


def test_an_answer_is_the_json_in_it_or_a_failure_that_holds_it():
    everything = {name: answer for name, (answer, _) in (ANSWERS | BAD).items()}
    model = scripted(lambda text: next(answer for name, answer in everything.items() if name in text))
    answers = dict(zip(everything, model.ask(list(everything), options()), strict=True))
    for name, (_, expected) in ANSWERS.items():
        assert answers[name].text == expected
    for name, (answer, reason) in BAD.items():
        failure = answers[name]
        assert isinstance(failure, Failure)
        assert failure.error.startswith("the answer does not fit the schema: ")
        assert reason in failure.error or "nested" in failure.error
        assert failure.answer == answer
        assert not failure.was_asked_again
    assert len(model.engine.asked) == 1


def test_what_does_not_fit_is_asked_for_once_more_and_told_why():
    def script(text):
        if WISH in text:
            return '{"kind": "bill"}' if "learns" in text else "Still a bill."
        return '{"kind": "fault"}' if "right" in text else "A bill."

    model = scripted(script)
    right, learns, stubborn, same = model.ask(
        ["right", "learns", "stubborn", "learns"], options(ask_again=True)
    )
    assert (right.text, right.was_asked_again) == ('{"kind": "fault"}', False)
    assert (learns.text, learns.was_asked_again) == ('{"kind": "bill"}', True)
    assert same == learns
    assert isinstance(stubborn, Failure)
    assert (stubborn.answer, stubborn.was_asked_again) == ("Still a bill.", True)
    first, second = model.engine.asked
    assert (len(first), len(second)) == (3, 2)
    assert any("learns<|end|><|start|>A bill.<|end|><|start|>" in text for text in second)
    assert all("not JSON" in text for text in second)


def test_what_is_too_long_to_be_asked_again_keeps_its_first_answer():
    model = scripted(lambda text: "A bill.")
    [answer] = model.ask(["x" * 380], options(ask_again=True))
    assert isinstance(answer, Failure)
    assert (answer.answer, answer.was_asked_again) == ("A bill.", False)
    assert len(model.engine.asked) == 1


def test_what_fails_when_asked_again_keeps_its_first_answer_and_costs_no_other():
    def script(text):
        if WISH in text:
            raise RuntimeError("out of luck")
        return '{"kind": "bill"}' if "right" in text else "A bill."

    right, wrong = scripted(script).ask(["right", "wrong"], options(ask_again=True))
    assert isinstance(right, Response)
    assert "not JSON; asked again: RuntimeError: out of luck" in wrong.error
    assert (wrong.answer, wrong.was_asked_again) == ("A bill.", True)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("nowhere.json", "no file"),
        ("{", "not JSON"),
        ('{"type": "poem"}', "no JSON Schema"),
        ('{"$ref": "https://example.com/schema"}', "nothing is fetched"),
        ('{"properties": {"a": {"$ref": "#/$defs/a"}}}', "which is not in it"),
        ('{"properties": {"default": {"$ref": "#/$defs/a"}}}', "which is not in it"),
        ('{"properties": {"$id": {}, "a": {"$ref": "#/$defs/a"}}}', "which is not in it"),
        ('{"$defs": {"a": {"$id": "a", "$ref": "#/$defs/b"}}}', "which is not in it"),
        ('{"$ref": "#/allOf/x", "allOf": [{}]}', "which is not in it"),
        ('{"required": ["a"], "$ref": "#/required"}', "which is no schema"),
        ('{"x": 5, "$ref": "#/x"}', "which is no schema"),
        ('{"x": {"type": "words"}, "$ref": "#/x"}', "no JSON Schema"),
        ('{"x": {"y": {"$ref": "#/nowhere"}}, "$ref": "#/x/y"}', "which is not in it"),
        ('{"$ref": "#"}', "without end"),
        ('{"$schema": 5}', "no text"),
        ('{"not": ' * 150 + "{}" + "}" * 150, "too deeply"),
    ],
)
def test_a_broken_schema_is_refused_at_once(schema, reason):
    with pytest.raises(ValueError, match=reason):
        AnsweringOptions(answer_schema=schema)


def test_a_schema_may_be_a_file_and_is_then_part_of_the_options(tmp_path):
    (tmp_path / "schema.json").write_text(SCHEMA)
    chosen = options(answer_schema=str(tmp_path / "schema.json"))
    assert chosen.answer_schema == SCHEMA
    with pytest.raises(ValueError, match="needs an answer_schema"):
        AnsweringOptions(ask_again=True)


@pytest.mark.parametrize(
    "schema",
    [
        {"$anchor": "root", "properties": {"a": {"$ref": "#root"}}},
        {
            "$id": "https://example.org/s",
            "$defs": {"b": {"$id": "b", "$defs": {"c": {}}}},
            "$ref": "b#/$defs/c",
        },
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"a": True},
            "$ref": "#/definitions/a",
        },
        {"$dynamicAnchor": "node", "properties": {"next": {"$dynamicRef": "#node"}}},
        {"components": {"schemas": {"A": {"type": "object"}}}, "$ref": "#/components/schemas/A"},
    ],
)
def test_schemas_of_every_kind_are_understood(schema):
    assert AnswerSchema(json.dumps(schema)).read('{"a": {}}') == '{"a": {}}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('As asked [in JSON]: {"a": 1}', '{"a": 1}'),
        ('The set {a} gives: {"a": 1}', '{"a": 1}'),
        ('[note] {"a": 1}', '{"a": 1}'),
        ('As said in [1], {"a": 1}', '{"a": 1}'),
        ('[true story] {"a": 1}', '{"a": 1}'),
        ('See [2024 report]: {"a": 1}', '{"a": 1}'),
        ('[3 items, {"a": 1}', None),
        ('{"b": [{"a": 1}, {"a": 2', None),  # a part of what is broken is not the answer
        ('{"a": 1e999}', None),
        ('{"a": 1, "a": 2}', None),
        (
            '{"a":[1234567890123456.78,1E2,-0,12345678901234567890123]}',
            '{"a": [1234567890123456.78, 1E2, -0, 12345678901234567890123]}',
        ),
        ('{"a": 1} {"a": 2}', '{"a": 1}'),
        ("```\n```", None),
        ('```{"a": 1}```', '{"a": 1}'),
    ],
)
def test_the_json_in_an_answer_is_found(answer, expected):
    schema = AnswerSchema('{"type": "object"}')
    if expected is None:
        with pytest.raises(InvalidAnswerError):
            schema.read(answer)
    else:
        assert schema.read(answer) == expected


def test_numbers_that_cannot_be_checked_fail_their_answer_alone():
    script = {"large": '{"a": 1' + "0" * 320 + "}", "infinite": '{"a": 1e999}', "right": '{"a": 0.5}'}
    model = scripted(lambda text: next(answer for name, answer in script.items() if name in text))
    schema = '{"properties": {"a": {"multipleOf": 0.01}}}'
    asked = options(answer_schema=schema, max_response_tokens=400, max_prompt_tokens=100)
    *failures, right = model.ask(list(script), asked)
    assert right.text == '{"a": 0.5}'
    assert all(failure.answer.startswith('{"a": 1') for failure in failures)


def test_an_answer_of_white_space_costs_no_time():
    for start in ("```json", "[", "{", ""):  # for hours, if each line were a beginning
        with pytest.raises(InvalidAnswerError):
            AnswerSchema("{}").read(start + "\n" * 1_000_000 + "x")


def test_escapes_that_are_no_characters_stay_escapes():
    assert AnswerSchema("{}").read('["\\ud800"]') == '["\\ud800"]'
    with pytest.raises(InvalidAnswerError, match="nested"):
        AnswerSchema("{}").read("[" * 100_000)


# Time


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A Llama that says the last token of its prompt for ever, or ends at once if that is an `x`."""
    folder = tmp_path_factory.mktemp("endless")
    size = 264
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=2**20,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=4,
    )
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer(chat=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :VOCABULARY] = torch.eye(VOCABULARY)
        model.lm_head.weight[:, :VOCABULARY] = torch.eye(VOCABULARY)
        ends = tokenizer("x")["input_ids"][0]
        model.lm_head.weight[4, ends], model.lm_head.weight[ends, ends] = 1.0, 0.0
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=4)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    convert(str(folder / "checkpoint"), folder / "m.pt", "float32", progress=False)
    return str(folder / "m.pt")


LONG = {"max_response_tokens": 200_000, "max_batch_tokens": 10**8, "max_response_seconds": 2.0}


@pytest.fixture
def ticking(monkeypatch):
    """Limits of time by a clock that goes on 0.01 s each time it is asked, as an engine does at each step."""
    ticks = itertools.count()
    monkeypatch.setattr(deadline.time, "monotonic", lambda: next(ticks) / 100)


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_a_response_without_an_end_is_ended_and_costs_its_neighbours_nothing(engine, endless, ticking):
    model = ModelSource(endless, dtype="float32", engine=engine).load()[0]
    prompts = [f"{n} x" for n in range(31)]
    prompts.insert(9, "y")
    model.ask(prompts, AnsweringOptions(max_response_tokens=2))  # whatever is done once
    answers = model.ask(prompts, AnsweringOptions(**LONG))
    late = answers.pop(9)
    assert isinstance(late, Failure)
    assert late.finish_reason == "time"
    assert "not complete after 2 s" in late.error
    assert {(answer.text, answer.finish_reason) for answer in answers} == {("", "stop")}
    [cut] = model.ask(["y"], AnsweringOptions(max_response_tokens=5, max_response_seconds=60))
    assert (cut.text, cut.finish_reason, cut.response_tokens) == ("yyyyy", "length", 5)


def test_a_text_that_ends_responses_ends_them_in_company_too(endless, ticking):
    """What follows is padding, of any length."""
    source = ModelSource(endless, dtype="float32", engine="torch")
    model = source.load()[0]
    model.engine.generation_config.stop_strings = ["aaa"]
    [alone] = model.ask(["a"], AnsweringOptions(max_response_tokens=20))
    timed = AnsweringOptions(**LONG | {"max_response_seconds": 1.0})
    for asked in (AnsweringOptions(max_response_tokens=20), timed):
        together, endless_one = model.ask(["a", "y"], asked)
        assert together == alone
        assert endless_one.finish_reason == ("time" if asked is timed else "length")
    assert (alone.text, alone.finish_reason) == ("aa", "stop")


def test_ctranslate2_has_no_time_for_long_prompts_beside_short_ones(endless, ticking):
    """Those are read a token a step, in which it is not asked for the time: so they are read apart."""
    model = ModelSource(endless, dtype="float32", engine="ctranslate2").load()[0]
    prompts = ["a y", "b" * 6000 + "y"]
    asked = AnsweringOptions(**LONG | {"max_response_seconds": 0.2})
    answers = model.ask(prompts, asked)
    assert [answer.finish_reason for answer in answers] == ["time", "time"]


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_a_prompt_of_one_token_leaves_the_answers_of_longer_ones_as_they_are(engine, endless):
    """CTranslate2 4.8.5 would begin these with the rest of their prompts."""
    model = ModelSource(endless, dtype="float32", engine=engine).load()[0]
    prompts = ["y", "ab x", "z", "abc", "x"]
    answers = model.ask(prompts, AnsweringOptions(max_response_tokens=30))
    assert [answer.text for answer in answers] == ["y" * 30, "", "z" * 30, "c" * 30, ""]


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_an_encoder_decoder_has_the_limit_too(engine, tmp_path, ticking):
    save_checkpoint("t5_distinct", tmp_path / "checkpoint")
    settings = GenerationConfig.from_pretrained(tmp_path / "checkpoint")
    settings.min_new_tokens = 150_000
    settings.save_pretrained(tmp_path / "checkpoint")
    convert(str(tmp_path / "checkpoint"), tmp_path / "m.pt", "float32", progress=False)
    model = ModelSource(str(tmp_path / "m.pt"), dtype="float32", engine=engine).load()[0]
    answers = model.ask(["a", "b"], AnsweringOptions(**LONG | {"max_response_seconds": 1.0}))
    assert [answer.finish_reason for answer in answers] == ["time", "time"]


def test_what_was_late_and_what_did_not_fit_are_counted(endless, ticking):
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.options.pipeline_options import PipelineOptions

    handler = LanguageModelHandler(
        endless,
        engine="torch",
        dtype="float32",
        answer_schema='{"type": "object"}',
        ask_again=True,
        **LONG | {"max_response_seconds": 0.3},
    )
    pipeline = beam.Pipeline(runner="FnApiRunner", options=PipelineOptions([]))
    pipeline | beam.Create(["a x", "y"]) | RunInference(handler)
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("LanguageModel"))["counters"]
    counts = {counter.key.metric.name: counter.committed for counter in found}
    # The empty answer of "a x" does not fit, and is asked for again, in vain.
    assert (counts["failed_prompts"], counts["asked_again"]) == (2, 1)
    assert (counts["late_responses"], counts["invalid_answers"]) == (1, 1)


def test_the_tiny_t5_runs_on_where_it_is_told_to():
    assert t5(distinct_head=True).config.eos_token_id == 1
