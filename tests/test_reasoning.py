"""Reasoning models: what they think before their answer is no part of it, and is counted apart."""

import json
import re
from pathlib import Path

import pytest
from test_pipeline import RESPONSE
from tiny_models import byte_tokenizer, llama

from helpers.model_handler import AnsweringOptions, Failure, Response
from helpers.model_handler.engines.engine import Generated
from helpers.model_handler.engines.torch_engine import TorchEngine
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.reasoning import PUBLISHED
from helpers.pipeline.transforms import to_response

PAGE = Path(__file__).parents[1] / "docs" / "messages.md"
SCHEMA = json.dumps(
    {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
)
GOOD, BAD = '{"mood": "good"}', '{"mood": "bad"}'


class Thinker(TorchEngine):
    """Says the same to every prompt, up to the most tokens."""

    def __init__(self, says, tokenizer) -> None:
        self.says = says
        super().__init__(llama(), tokenizer)

    def generate(self, prompts, options, prefix_tokens=0, is_abandoned=None):
        ids = self._tokenizer(self.says)["input_ids"]
        most = options.max_response_tokens
        return [Generated(ids[:most], "length" if len(ids) > most else "stop") for _ in prompts]


def thinker(says, *, opens=False, names=("<think>", "</think>")) -> LanguageModel:
    """A model whose template names the marks of its thinking, and may begin it."""
    tokenizer = byte_tokenizer(chat=True)
    if names:
        begin, end = names
        tokenizer.chat_template += f"{{# what was thought stands between {begin} and {end} #}}"
        if opens:
            tokenizer.chat_template += f"{begin}\n"
    return LanguageModel(Thinker(says, tokenizer), tokenizer)


def ask(model, prompt="Hi", **options) -> Response | Failure:
    [answer] = model.ask([prompt], AnsweringOptions(**{"max_response_tokens": 200} | options))
    return answer


@pytest.mark.parametrize("begin, end", PUBLISHED)
def test_the_answer_is_what_follows_the_thinking(begin, end):
    thinking = f"{begin}Maybe {GOOD}? No.{end}"
    answer = ask(thinker(f"{thinking}\n\n{BAD} ", names=(begin, end)))
    assert (answer.text, answer.finish_reason) == (BAD, "stop")
    assert answer.reasoning_tokens == len(thinking.encode())
    assert answer.response_tokens == len(BAD) + 3


SAID = {
    "nested": (f"<think>a <think>{GOOD}</think> b</think>{BAD}", BAD),
    "one more beginning": (f"<think>a <think> {GOOD}</think>{BAD}", BAD),
    "one more end": (f"<think>{GOOD}</think> b</think>{BAD}", BAD),
    "no beginning": (f"{GOOD}</think>{BAD}", BAD),
    "once more": (f"<think>a</think>{GOOD}<think>b</think>{BAD}", BAD),
    "without end": (f"<think>{GOOD}", None),
    "begun again": (f"<think>a</think>{GOOD}<think>b", None),
    "nothing follows": (f"<think>{GOOD}</think>", None),
    "none": (BAD, BAD),
    "marks in an answer": ("Write <think> first.", "Write <think> first."),
}


@pytest.mark.parametrize("name", SAID)
def test_no_draft_is_taken_for_the_answer(name):
    said, answer = SAID[name]
    assert ask(thinker(said)).text == (answer or "")
    validated = ask(thinker(said), answer_schema=SCHEMA)
    if answer == BAD:
        assert validated.text == BAD
    else:
        assert isinstance(validated, Failure)


def test_a_template_may_begin_the_thinking():
    model = thinker(f"Maybe {GOOD}?</think>{BAD}", opens=True)
    assert ask(model).text == BAD
    assert ask(thinker(f"Maybe {GOOD}?", opens=True), answer_schema=SCHEMA).finish_reason == "stop"


def test_marks_in_a_prompt_begin_nothing():
    assert ask(thinker("Yes."), prompt="Say <think>").text == "Yes."


def test_marks_that_nothing_names_are_looked_for_where_json_is():
    model = thinker(f"<think>{GOOD}</think>{BAD}", names=())
    assert ask(model).text == f"<think>{GOOD}</think>{BAD}"
    assert ask(model, answer_schema=SCHEMA).text == BAD
    assert ask(model, answer_schema=SCHEMA, reasoning_marks="none").text == GOOD


def test_marks_can_be_given():
    said = f"Thinking: {GOOD} So: {BAD}"
    assert ask(thinker(said), reasoning_marks="Thinking: So:").text == BAD
    assert ask(thinker("<think>a</think>b"), reasoning_marks="none").text == "<think>a</think>b"


@pytest.mark.parametrize(
    "options", [{"reasoning_marks": "<think>"}, {"keep_reasoning": True, "answer_schema": SCHEMA}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AnsweringOptions(**options)


def test_a_response_says_how_much_was_thought():
    message = type("Message", (), {"attributes": {}, "message_id": "1", "ordering_key": ""})()
    attributes = to_response((message, RESPONSE), "model", "text").attributes
    assert "reasoning_tokens" not in attributes
    thought = Response("text", 3, 2, "stop", reasoning_tokens=7)
    assert to_response((message, thought), "model", "text").attributes["reasoning_tokens"] == "7"


def test_the_page_says_what_is_so():
    """Each row of the table in docs/messages.md, by a model that does what its first cell says."""
    rows = re.findall(r"^\| ((?:thinks|is cut|ends).*) \|$", PAGE.read_text(), re.MULTILINE)
    found = {row.split(" | ")[0]: row.split(" | ")[1:] for row in rows}
    thinking, answer = "<think>so</think>", '{"mood":"bad"}'
    whole = thinking + answer
    cases = {
        "thinks, then answers": (whole, {}),
        "is cut in its answer": (whole, {"max_response_tokens": len(thinking) + 5}),
        "is cut while it thinks": (whole, {"max_response_tokens": 9}),
        "ends while it thinks": ("<think>so", {}),
        "thinks, then answers, with `keep_reasoning`": (whole, {"keep_reasoning": True}),
    }
    assert found.keys() == cases.keys()
    for name, (says, options) in cases.items():
        got = ask(thinker(says), **options)
        said = says[: options.get("max_response_tokens", len(says))]
        text, finish_reason, response_tokens, reasoning_tokens, with_schema = found[name]
        after = said.partition("</think>")[2]
        texts = {
            "the answer": answer,
            "what there is of it": after,
            "empty": "",
            "thinking and answer": whole,
        }
        counts = {
            "the answer's": len(after),
            "the thinking's, marks included": len(thinking),
            "all": len(said),
            "0": 0,
        }
        assert got.text == texts[text], name
        assert f"`{got.finish_reason}`" == finish_reason, name
        assert got.response_tokens == counts[response_tokens], name
        assert got.reasoning_tokens == counts[reasoning_tokens], name
        if with_schema == "refused":
            continue
        validated = ask(thinker(says), answer_schema=SCHEMA, **options)
        expected = {"dead letter": Failure, "the answer's JSON": Response}[with_schema]
        assert isinstance(validated, expected), name
        assert isinstance(validated, Response) or validated.finish_reason == got.finish_reason
