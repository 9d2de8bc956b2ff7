"""Prompts as people have them: with instruction and template, as records and as conversations."""

import json
from pathlib import Path

import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, llama, save_checkpoint, t5
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.load_state_dict import LoadError, convert
from helpers.model_handler import AnsweringOptions, Failure, Response
from helpers.model_handler.encoding import Encoder
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.prompt_check import check_around_prompts
from helpers.model_handler.prompts import RECORD, PromptError, Request, parse_prompt, parse_template
from helpers.model_handler.served_model import ModelSource

# In the manner of three makers. The second refuses a system prompt, the third says it with the user's turn.
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INSTRUCTION = (
    "{% set told = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set told.text = '<<SYS>>' ~ m.content ~ '<</SYS>>' %}{% elif m.role == 'user' %}"
    "[INST] {{ told.text }}{{ m.content }} [/INST]{% set told.text = '' %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
TEMPLATES = {"ChatML": CHATML, "refuses a system prompt": REFUSES, "instruction": INSTRUCTION}

CONVERSATION = [
    {"role": "user", "content": "Name a sea."},
    {"role": "assistant", "content": "The Baltic."},
    {"role": "user", "content": "And {another} one?"},
]


def options(**values) -> AnsweringOptions:
    return AnsweringOptions(**{"max_response_tokens": 8} | values)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny chat model with each template, and its checkpoint; and a model without one."""
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("chat")
        save_checkpoint("llama", folder / "checkpoint")
        (folder / "checkpoint" / "chat_template.jinja").write_text(template)
        convert(str(folder / "checkpoint"), folder / "m.pt", "float32", progress=False)
        found[name] = (
            ModelSource(str(folder / "m.pt"), dtype="float32", engine="torch").load()[0],
            folder / "checkpoint",
        )
    folder = tmp_path_factory.mktemp("t5")
    save_checkpoint("t5_distinct", folder / "checkpoint")
    convert(str(folder / "checkpoint"), folder / "m.pt", "float32", progress=False)
    found["t5"] = ModelSource(str(folder / "m.pt"), dtype="float32", engine="torch").load()[0], folder
    return found


@pytest.fixture(scope="module")
def model(models):
    return models["ChatML"][0]


def plain_transformers(checkpoint, turns) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = AutoModelForCausalLM.from_pretrained(checkpoint).generate(
        **inputs, max_new_tokens=8, do_sample=False
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("told", [[], [{"role": "system", "content": "Be brief."}]], ids=["", "told"])
def test_a_conversation_is_answered_as_by_plain_transformers(name, told, models):
    model, checkpoint = models[name]
    turns = [*told, *CONVERSATION]
    [answer] = model.ask([turns], options())
    if told and name == "refuses a system prompt":
        first = {"role": "user", "content": "Be brief.\n\nName a sea."}
        turns = [first, *CONVERSATION[1:]]
    assert answer.text == plain_transformers(checkpoint, turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_instruction_is_the_first_that_the_model_is_told(name, models):
    model, checkpoint = models[name]
    asked = options(system_prompt="Be brief.", template="Please: {text}!")
    [answer] = model.ask(["name a sea"], asked)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Please: name a sea!"}]
    if name == "refuses a system prompt":
        turns = [{"role": "user", "content": "Be brief.\n\nPlease: name a sea!"}]
    assert answer.text == plain_transformers(checkpoint, turns)


def test_a_conversations_own_instruction_follows_the_jobs(model):
    own = [{"role": "system", "content": "Be rude."}, *CONVERSATION]
    both = [{"role": "system", "content": "Be brief.\n\nBe rude."}, *CONVERSATION]
    assert model.encode(own, options(system_prompt="Be brief.")) == model.encode(both, options())


def test_without_a_chat_template_the_instruction_stands_before_the_prompt(models):
    model = models["t5"][0]
    asked = options(system_prompt="Be brief.", template="Q: {text}")
    assert model.encode("Why?", asked) == model.encode("Be brief.\n\nQ: Why?", options())
    [answer] = model.ask([CONVERSATION], options())
    assert "no chat template" in answer.error


def test_what_stands_before_the_prompts_is_kept(model):
    asked = options(system_prompt="You are the assistant of a shop.", template="A customer writes: {text}")
    ids = [model.encode(prompt, asked) for prompt in ("Hello", "Where is my order?")]
    kept = model._encoder.prefix_tokens(ids, asked)
    assert model.tokenizer.decode(ids[0][:kept]).endswith("A customer writes: ")
    record = options(
        system_prompt="You are the assistant of a shop.",
        template="About {order.id}: {text}",
        prompt_format="record",
    )
    ids = [model.encode({"order": {"id": n}, "text": "Where?"}, record) for n in (1, 2)]
    kept = model._encoder.prefix_tokens(ids, record)
    assert model.tokenizer.decode(ids[0][:kept]).endswith("About ")
    # And what is not kept is computed alike.
    together = model.ask(["Hello", "Where is my order?"], asked)
    assert together == model.ask(["Hello", "Where is my order?"], replaced(asked, recompute=True))


def replaced(asked: AnsweringOptions, **values) -> AnsweringOptions:
    from dataclasses import replace

    return replace(asked, **values)


def test_a_record_is_asked_about_with_its_fields():
    asked = options(template="{title} ({tags}, {n}, {on}): {a.b} {{x}}", prompt_format="record")
    record = {"title": "{n}", "tags": ["é", "b"], "n": 1.5, "on": None, "a": {"b": "{{"}, "more": 1}
    assert Request(record, template=asked.template).turns() == [
        {"role": "user", "content": '{n} (["é", "b"], 1.5, null): {{ {x}'}
    ]
    with pytest.raises(PromptError, match=r"no field 'a\.b'"):
        Request(record | {"a": 1}, template=asked.template)
    with pytest.raises(PromptError, match="no template"):
        Request(record)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "end with a turn of the user"),
        ([{"role": "user"}], "no object with a text"),
        (["Hi"], "no object with a text"),
        ([{"role": "user", "content": ["Hi"]}], "no object with a text"),
        ([{"role": "tool", "content": "x"}], "the role 'tool'"),
        ([{"content": "x"}], "the role 'None'"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "'tool_calls'"),
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "begin with a turn"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "end with a turn"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "only the first"),
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
    ],
)
def test_what_is_no_conversation_fails_and_says_why(turns, reason, model):
    good, bad = model.ask([CONVERSATION, turns], options())
    assert isinstance(good, Response)
    assert reason in bad.error


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("{", "record", "not JSON"),
        ("[]", "record", "not an object"),
        ('{"a": NaN}', "record", "NaN"),
        ('{"a": 1, "a": 2}', "record", "'a' twice"),
        ("[" * 100_000, "conversation", "not JSON"),
        ("{}", "conversation", "not a list"),
        ("x", "poem", "no prompt_format 'poem'"),
    ],
)
def test_a_message_that_is_not_of_its_format_says_so(text, kind, reason):
    with pytest.raises(PromptError, match=reason):
        parse_prompt(text, kind, "{a}")


@pytest.mark.parametrize("number", ["1234567890123456.78", "12345678901234567890123", "1e400", "-0", "1E2"])
def test_numbers_of_a_record_stay_as_they_are_written(number):
    record = parse_prompt(
        f'{{"n": {number}, "in": [{{"a": {number}}}], "text": "1.0"}}', RECORD, "{n} {in} {text}"
    )
    assert record == {"n": number, "in": f'[{{"a": {number}}}]', "text": "1.0"}


def test_numbers_that_are_none_are_refused():
    with pytest.raises(PromptError, match="cannot be written"):
        Request({"n": float("inf")}, template="{n}")


PARTS = (
    "{% for m in messages %}<|start|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
)
PARTS_OR_ERROR = PARTS.replace(
    "{% for part", "{% if m.content is string %}{{ raise_exception('no') }}{% endif %}{% for part", 1
)


@pytest.mark.parametrize("template", [PARTS, PARTS_OR_ERROR])
def test_a_template_of_parts_is_given_parts(template):
    tokenizer = byte_tokenizer(chat=True)
    usual = Encoder(tokenizer, llama().config, False).encode("Hi", options(system_prompt="Be kind."))
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, llama().config, False)
    encoder.check(options())
    assert encoder.encode("Hi", options(system_prompt="Be kind.")) == usual


def test_a_template_that_leaves_out_what_the_user_says_is_refused():
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}<|start|>{{ m.text }}<|end|>{% endfor %}"
    with pytest.raises(PromptError, match="leaves out what the user says"):
        Encoder(tokenizer, llama().config, False).check(options())


def test_an_encoder_decoder_has_its_chat_template_too():
    tokenizer = byte_tokenizer(chat=True)
    encoder = Encoder(tokenizer, t5(distinct_head=False).config, True)
    expected = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=True)
    assert encoder.encode(CONVERSATION, options()) == expected["input_ids"]
    encoder.check(options(prompt_format="conversation"))


def test_a_text_of_no_tokens_is_empty():
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    encoder = Encoder(tokenizer, t5(distinct_head=False).config, True)
    with pytest.raises(PromptError, match="empty"):
        encoder.encode("\u200b", options())


def test_a_cut_never_ends_within_a_character():
    tokenizer = byte_tokenizer(chat=False)
    encoder = Encoder(tokenizer, t5(distinct_head=False).config, True)
    for limit in range(3, 9):
        ids = encoder.encode("é€é€", options(max_prompt_tokens=limit, truncate=True))
        assert "é€é€".startswith(tokenizer.decode(ids, skip_special_tokens=True))
        assert len(ids) <= limit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"template": "{text:>10}"}, "no field"),
        ({"template": "{text!r}"}, "no field"),
        ({"template": "{0}"}, "no field"),
        ({"template": "{}"}, "no field"),
        ({"template": "{"}, "no field"),
        ({"template": "same for all"}, "has no field"),
        ({"template": "{ticket}"}, "prompt_format record"),
        ({"prompt_format": "record"}, "needs a template"),
        ({"prompt_format": "conversation", "template": "{text}"}, "not for conversations"),
        ({"prompt_format": "poem"}, "one of text, record, conversation"),
        ({"system_prompt": " "}, "empty"),
        ({"system_prompt": Path("x")}, "must be text"),
        ({"template": Path("x")}, "must be text"),
    ],
)
def test_what_cannot_be_put_around_prompts_is_refused_at_once(values, reason):
    with pytest.raises(ValueError, match=reason):
        options(**values)


def test_an_instruction_that_leaves_no_room_is_found_before_there_is_a_job(models, tmp_path):
    model, checkpoint = models["ChatML"]
    long = options(system_prompt="word " * 200)
    with pytest.raises(LoadError, match="leave no room"):
        model.check(long)
    convert(str(checkpoint), tmp_path / "m.pt", progress=False)
    with pytest.raises(PromptError, match="leave no room"):
        check_around_prompts(str(tmp_path / "m.pt"), long)
    assert check_around_prompts(str(tmp_path / "m.pt"), options(system_prompt="Be brief."))
    assert not check_around_prompts("nowhere.pt", options())
    with pytest.raises(LoadError, match="no conversations"):
        models["t5"][0].check(options(prompt_format="conversation"))


def test_a_conversation_that_is_too_long_loses_its_oldest_exchanges(model):
    turns = [turn for n in range(60) for turn in CONVERSATION[:2]] + CONVERSATION[2:]
    [refused] = model.ask([turns], options())
    assert isinstance(refused, Failure)
    cut = model.encode(turns, options(truncate=True, system_prompt="Be brief."))
    text = model.tokenizer.decode(cut)
    assert 400 < len(cut) <= 504
    assert text.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nName a sea.")
    assert "And {another} one?" in text
    # What is left of a conversation whose last turn is too long by itself is the beginning of that turn.
    last = [*CONVERSATION[:2], {"role": "user", "content": "word " * 9000}]
    text = model.tokenizer.decode(model.encode(last, options(truncate=True)))
    assert text.startswith("<|start|>user\nword word")
    assert text.endswith("<|end|>\n<|start|>assistant\n")


def test_a_record_that_is_too_long_loses_of_its_longest_field_alone(model):
    asked = options(template="{id}: {text} (be brief)", prompt_format="record", truncate=True)
    text = model.tokenizer.decode(model.encode({"id": 7, "text": "word " * 900}, asked))
    assert text.startswith("<|start|>user\n7: word word")
    assert text.endswith(" (be brief)<|end|>\n<|start|>assistant\n")


def test_a_field_that_is_asked_about_twice_is_cut_in_both_places(model):
    asked = options(template="Summarize: {text}\nSo, summarize: {text}", truncate=True)
    text = model.tokenizer.decode(model.encode("word " * 300, asked))
    assert text.count("word word") >= 2
    assert "\nSo, summarize: word word" in text


def test_what_is_not_cut_and_leaves_no_room_is_refused_unread(models):
    record = options(template="{a} {b}", prompt_format="record", truncate=True)
    for name in ("t5", "ChatML"):
        told = [{"role": "system", "content": "x" * 5_000_000}, *CONVERSATION[2:]]
        for prompt in (told, {"a": "x" * 3_000_000, "b": "y" * 3_000_000}):
            [answer] = models[name][0].ask([prompt], record)
            assert "leaves no room beside what is not cut" in answer.error


def test_a_template_that_was_slow_once_still_takes_system_prompts(models, monkeypatch):
    from helpers.model_handler import chat_template
    from helpers.model_handler.encoding import Encoder

    checked = models["ChatML"][0]
    encoder = Encoder(checked.tokenizer, checked.engine.config, False)
    asked = options(system_prompt="Be brief.")
    stopped = {"error": "it took longer than it may", "was_stopped": True}
    with monkeypatch.context() as busy:
        busy.setattr(chat_template._Process, "_answer", lambda self, _: self._end() or stopped)
        with pytest.raises(PromptError, match="longer than"):
            encoder.encode("Hi", asked)
    assert "<|start|>system\nBe brief." in checked.tokenizer.decode(encoder.encode("Hi", asked))


def test_a_model_that_cannot_be_asked_alike_does_not_take_over(models):
    from helpers.model_handler.language_model import OtherModelError

    chat = LanguageModel(models["ChatML"][0].engine, models["ChatML"][0].tokenizer)
    chat.check(options(prompt_format="conversation"))
    plain = AutoTokenizer.from_pretrained(models["ChatML"][1])
    plain.chat_template = None
    with pytest.raises(OtherModelError, match="no chat template"):
        chat.take_over(LanguageModel(chat.engine, plain))


def test_a_conversation_of_very_many_turns_is_cut_in_few_steps(model, monkeypatch):
    from helpers.model_handler import chat_template

    monkeypatch.setattr(chat_template, "SECONDS", PATIENCE)
    render, renders = chat_template.ChatTemplate.render, []
    monkeypatch.setattr(
        chat_template.ChatTemplate, "render", lambda *given: renders.append(1) or render(*given)
    )
    turns = [{"role": role, "content": "x"} for _ in range(50_000) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "y"})
    [refused] = model.ask([turns], options())
    assert isinstance(refused, Failure)
    assert isinstance(model.ask([turns], options(truncate=True))[0], Response)
    assert len(renders) < 60


BRACES = st.text(alphabet="{}ab.!:[]0 \x00\ud800é", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | BRACES | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(BRACES, children, max_size=3),
    max_leaves=6,
)


@given(template=st.one_of(BRACES, st.text(max_size=20)), record=st.dictionaries(BRACES, VALUES, max_size=4))
def test_whatever_template_and_record_come_together_nothing_is_evaluated(template, record):
    """Only named fields are replaced: so a template without its fields is in the text, piece by piece."""
    try:
        parsed = parse_template(template)
    except ValueError:
        return
    known = {name: f"<{name}>" for name in parsed.fields}
    expected = template.replace("{{", "\0").replace("}}", "\1")
    if "\0" not in template and "\1" not in template and "{{{" not in template and "}}}" not in template:
        for name, value in known.items():
            expected = expected.replace("{" + name + "}", value)
        assert parsed.fill(known) == expected.replace("\0", "{").replace("\1", "}")
    asked = AnsweringOptions(template=template, prompt_format="record")
    try:
        turns = Request(record, template=asked.template).turns()
    except PromptError:
        return
    assert [turn["role"] for turn in turns] == ["user"]


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.lists(
        st.one_of(
            st.text(max_size=40),
            st.dictionaries(st.sampled_from(["text", "id", "x"]), VALUES, max_size=3),
            st.lists(
                st.fixed_dictionaries(
                    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES}
                ),
                max_size=4,
            ),
            VALUES,
        ),
        max_size=8,
    )
)
def test_each_prompt_has_an_answer_or_a_reason(prompts, model):
    asked = options(template="{text} {id}", prompt_format="record", max_response_tokens=2)
    answers = model.ask(prompts, asked)
    assert len(answers) == len(prompts)
    for answer in answers:
        assert isinstance(answer, Response) or answer.error


def test_a_message_of_megabytes_fails_fast_in_every_format(model):
    big = "{" * 3_000_000
    asked = options(template="{text}", prompt_format="record")
    conversation = [{"role": "user", "content": big}]
    for prompt in (big, {"text": big}, conversation, {"text": [big]}):
        [answer] = model.ask([prompt], asked)
        assert "too many by far" in answer.error
    with pytest.raises(PromptError, match="not JSON"):
        parse_prompt(big, "record")
    assert parse_prompt(json.dumps({"text": big, "more": 1}), "record", "{text}") == {"text": big}


def test_the_tiny_model_has_the_positions_that_these_tests_rest_on():
    assert llama().config.max_position_embeddings == 512
