"""A state dict is judged by expected answers, alone and against the one that serves."""

import json

import pytest
import torch
from tiny_models import save_checkpoint

from helpers.load_state_dict import convert
from helpers.measuring import CaseError, evaluate, evaluation
from helpers.measuring.__main__ import main
from helpers.model_handler import Failure, Response

OPTIONS = {"max_response_tokens": 6}


@pytest.fixture(scope="module")
def state_dicts(tmp_path_factory):
    """Two state dicts of the same shape, with other weights."""
    paths = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("model")
        model = save_checkpoint("t5_distinct", folder / "checkpoint")
        if seed == 2:
            with torch.no_grad():
                model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape))
            model.save_pretrained(folder / "checkpoint")
        convert(str(folder / "checkpoint"), folder / "m.pt", "float32", progress=False)
        paths.append(str(folder / "m.pt"))
    return paths


def answers_of(path, prompts):
    return [
        one.answer
        for one in evaluate(path, [{"prompt": p, "pattern": ""} for p in prompts], **OPTIONS).outcomes
    ]


def test_the_share_right_and_what_changed(state_dicts, tmp_path, capsys):
    old, new = state_dicts
    prompts = ["one", "two", "three"]
    before, now = answers_of(old, prompts), answers_of(new, prompts)
    assert before != now
    cases = [
        {"prompt": "one", "exact": before[0]},
        {"prompt": "two", "exact": now[1]},
        {"prompt": "three", "contains": "no model says this"},
        {"prompt": "", "contains": ""},
    ]
    found = evaluate(new, cases, against=old, **OPTIONS)
    assert found.right == 0.25
    assert [one.prompt for one in found.changed] == prompts
    assert [one.prompt for one in found.lost] == ["one"]
    assert [one.prompt for one in found.gained] == ["two"]
    assert found.outcomes[3].wrong == "no answer"
    assert "empty" in found.outcomes[3].answer

    (tmp_path / "cases.jsonl").write_text("\n\n".join(map(json.dumps, cases)))
    arguments = ["evaluate", "--state-dict-path", new, "--cases", str(tmp_path / "cases.jsonl")]
    arguments += ["--against", old, "--max-response-tokens", "6"]
    assert main(arguments) == 0
    assert "1 of 4 right, 3 changed, 1 lost, 1 gained" in capsys.readouterr().out
    assert main([*arguments, "--json", "--at-least", "0.5"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["right"] == 0.25
    assert "2 are wanted" in printed.err
    for share in ("nan", "-1", "90"):
        with pytest.raises(SystemExit):
            main([*arguments, "--at-least", share])
    assert "from 0 to 1" in capsys.readouterr().err
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one\u2028two", "pattern": ""}\n')
    assert len(evaluate(new, tmp_path / "lines.jsonl", **OPTIONS).outcomes) == 1
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(CaseError, match=r"latin.jsonl is not UTF-8"):
        evaluate(new, tmp_path / "latin.jsonl")
    assert main([*arguments[:-2], "--engine", "torch", "--cases", "nowhere.jsonl"]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "text", "wrong"),
    [
        ({"exact": "Paris"}, " Paris\n", ""),
        ({"exact": "Paris"}, "paris", "not exactly 'Paris'"),
        ({"contains": "paris"}, "It is PARIS.", ""),
        ({"contains": "rome"}, "It is PARIS.", "without 'rome'"),
        ({"pattern": r"\b\d{4}\b"}, "in 1969", ""),
        ({"pattern": r"^\d+$"}, "in 1969", "without the pattern '^\\\\d+$'"),
        ({"field": {"kind": "bill", "of.n": 2}}, '```json\n{"kind": "bill", "of": {"n": 2}}\n```', ""),
        ({"field": {"kind": "bill"}}, '{"kind": "fault"}', "kind is 'fault', not 'bill'"),
        ({"field": {"n": True}}, '{"n": 1}', "n is 1, not True"),
        ({"field": {"n": {"b": True}}}, '{"n": {"b": 1}}', "n is {'b': 1}, not {'b': True}"),
        ({"field": {"n": 1}}, "[1]", "n is None, not 1"),
        ({"field": {"n": 1}}, "none", "it is not JSON"),
        ({"contains": "a", "exact": "ab"}, "a", "not exactly 'ab'"),
    ],
)
def test_what_is_right(case, text, wrong):
    assert evaluation._wrong(case, Response(text, 1, 1)) == wrong
    assert evaluation._wrong(case, Failure("late")) == "no answer"


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        ([], "no cases"),
        ([{"exact": "x"}], "case 1 is no object with a prompt"),
        ([{"prompt": "x"}], "what its answer must be"),
        ([{"prompt": "x", "matches": "y"}], "'matches'"),
        ([{"prompt": "x", "exact": "y"}, {"prompt": "x", "pattern": "("}], "case 2 has a pattern"),
        ([{"prompt": "x", "exact": 1}], "no text"),
        ([{"prompt": 7, "exact": "x"}], "no text, record or conversation"),
        ([{"prompt": "x", "field": "kind"}], "no object of names"),
        ("{", "line 1 of .* is not JSON"),
        ('{"prompt": "x", "exact": "y"}\n[]', "line 2"),
    ],
)
def test_cases_that_cannot_be_judged_are_refused_before_a_model_is_loaded(cases, reason, tmp_path):
    if isinstance(cases, str):
        (tmp_path / "cases.jsonl").write_text(cases)
        cases = tmp_path / "cases.jsonl"
    with pytest.raises(CaseError, match=reason):
        evaluate("nowhere.pt", cases)
