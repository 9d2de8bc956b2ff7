"""Each answering option has one home, and reaches a job from everywhere."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

import helpers
from helpers import dataflow, pipeline
from helpers.dataflow import job_options, jobs, submission
from helpers.load_state_dict import convert
from helpers.model_handler import AnsweringOptions, LanguageModelHandler
from helpers.model_handler.options import NAMES, answering_options
from helpers.pipeline import AskMessages, AskModel, CommandLineError
from helpers.pipeline.command_line import parse, parser

ROOT = Path(helpers.__file__).parent
DEFAULTS = {one.name: one.default for one in fields(AnsweringOptions)}

# A value other than the default, as a command line has it and as Python does.
OTHER = {
    "system_prompt": ("Be brief.", "Be brief."),
    "template": ("Translate: {text}", "Translate: {text}"),
    "prompt_format": ("conversation", "conversation"),
    "answer_format": ("record", "record"),
    "answer_schema": ('{"type": "object"}', '{"type": "object"}'),
    "ask_again": ("", True),
    "keep_reasoning": ("", True),
    "reasoning_marks": ("<a> </a>", "<a> </a>"),
    "max_response_seconds": ("20", 20.0),
    "max_response_tokens": ("7", 7),
    "max_prompt_tokens": ("100", 100),
    "truncate": ("", True),
    "temperature": ("0.5", 0.5),
    "top_p": ("0.9", 0.9),
    "seed": ("3", 3),
    "device": ("cpu", "cpu"),
    "engine": ("torch", "torch"),
    "dtype": ("float32", "float32"),
    "max_batch_size": ("4", 4),
    "max_batch_tokens": ("4096", 4096),
    "torch_threads": ("2", 2),
    "recompute": ("", True),
    "reload_seconds": ("60", 60.0),
    "cache_dir": ("cache", "cache"),
}
# What an option needs beside it.
BESIDE = {"ask_again": {"answer_schema": '{"type": "object"}'}}
ENTRANCES = (LanguageModelHandler, AskModel, AskMessages, pipeline.build, dataflow.submit, dataflow.preflight)
REQUIRED = ["--messages-topic=t", "--responses-topic=r", "--state-dict-path=p.pt", "--model-name=m"]


def test_the_list_of_values_is_complete():
    assert OTHER.keys() == set(NAMES)
    assert all(value != DEFAULTS[name] for name, (_, value) in OTHER.items())


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_each_entrance_has_each_option_with_its_default_and_explains_it(entrance):
    parameters = inspect.signature(entrance).parameters
    for one in fields(AnsweringOptions):
        assert parameters[one.name].default == one.default
        first_words = " ".join(one.metadata["explanation"].split()[:4])
        assert f"{one.name}: {first_words}" in " ".join(entrance.__doc__.split())
    assert "{options}" not in entrance.__doc__


@pytest.mark.parametrize("entrance", [LanguageModelHandler, AskModel, AskMessages])
def test_what_is_used_in_pipelines_shows_an_example(entrance):
    assert f"| {entrance.__name__}(" in entrance.__doc__ or f"({entrance.__name__}(" in entrance.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_each_option_and_leaves_out_what_is_not_given(name):
    text, value = OTHER[name]
    flag = f"--{name.replace('_', '-')}"
    beside = [f"--{other.replace('_', '-')}={given}" for other, given in BESIDE.get(name, {}).items()]
    given = parse([*REQUIRED, f"{flag}={text}" if text else flag, *beside])
    chosen = {key: given.arguments[key] for key in NAMES if key in given.arguments}
    assert chosen == {name: value} | BESIDE.get(name, {})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ask-again"], "needs an answer_schema"),
        (["--answer-schema=nowhere.json"], "no file of one"),
        (["--template={x}"], "prompt_format record"),
        (["--prompt-format=record"], "needs a template"),
        (["--engine=torch", "--dtype=int8"], "int8"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(arguments, reason):
    with pytest.raises(CommandLineError, match=reason):
        parse([*REQUIRED, *arguments])


@pytest.mark.parametrize("command", [["helpers.pipeline"], ["helpers.dataflow", "preflight"]])
def test_both_command_lines_explain_each_option(command):
    run = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0
    assert f"usage: python -m {' '.join(command)}" in run.stdout
    for one in fields(AnsweringOptions):
        assert f"--{one.name.replace('_', '-')}" in run.stdout


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory) -> tuple[str, str]:
    from tiny_models import save_checkpoint

    folder = tmp_path_factory.mktemp("model")
    save_checkpoint("llama", folder / "checkpoint")
    convert(str(folder / "checkpoint"), folder / "model.pt", progress=False)
    return str(folder / "checkpoint"), str(folder / "model.pt")


@pytest.fixture
def submitted(monkeypatch):
    """What a submission would build: the arguments of `build`, and Beam's options; nothing is submitted."""
    caught = []

    class Result:
        has_job = True

        def job_id(self):
            return "job"

    def start(beam_options, arguments):
        pipeline.build(beam.Pipeline(options=PipelineOptions([])), **arguments)
        caught.append((arguments, beam_options.get_all_options(drop_default=True)))
        return Result()

    monkeypatch.setattr(submission, "start", start)
    monkeypatch.setattr(submission, "check_name", lambda options: None)
    return caught


@pytest.mark.parametrize("name", NAMES)
def test_each_option_reaches_a_job_from_python_and_from_the_command_line_alike(name, state_dict, submitted):
    text, value = OTHER[name]
    model_name, path = state_dict
    where = {"project": "my-project", "location": "us-central1", "temp_location": "gs://bucket/temp"}
    streams = {
        "messages_topic": "projects/my-project/topics/m",
        "responses_topic": "projects/my-project/topics/r",
    }
    dataflow.submit(
        job_name="a-job",
        model_name=model_name,
        state_dict_path=path,
        **where,
        **streams,
        **{name: value},
        **BESIDE.get(name, {}),
    )
    flag = f"--{name.replace('_', '-')}"
    pipeline.run(
        [
            *(f"--{key.replace('_', '-')}={stream}" for key, stream in streams.items()),
            f"--model-name={model_name}",
            f"--state-dict-path={path}",
            f"{flag}={text}" if text else flag,
            *(f"--{other.replace('_', '-')}={given}" for other, given in BESIDE.get(name, {}).items()),
            "--runner=DataflowRunner",
            *("--project=my-project", "--region=us-central1", "--temp_location=gs://bucket/temp"),
            "--job_name=a-job",
        ]
    )
    (from_python, options), (from_command_line, same_options) = submitted
    assert from_python[name] == value
    assert {key: item for key, item in from_python.items() if item is not None} == from_command_line
    for varying in ("extra_packages", "labels", "requirements_file"):
        options.pop(varying), same_options.pop(varying)
    assert options == same_options


def test_what_the_user_gives_to_beam_wins_over_what_is_chosen(state_dict, submitted):
    arguments = {
        "job_name": "a-job",
        "model_name": state_dict[0],
        "state_dict_path": state_dict[1],
        "project": "my-project",
        "location": "us-central1",
        "temp_location": "gs://bucket/temp",
        "messages_topic": "projects/my-project/topics/m",
        "responses_topic": "projects/my-project/topics/r",
    }
    dataflow.submit(**arguments, machine_type="n4-standard-2", beam_options=["--machine_type=c3-standard-4"])
    assert submitted[0][1]["machine_type"] == "c3-standard-4"
    with pytest.raises(pipeline.CommandLineError, match="there is no option --max_num_worker: do you mean"):
        dataflow.submit(**arguments, beam_options=["--max_num_worker=3"])


def test_the_workload_that_a_machine_is_sized_for_comes_from_the_options():
    assert AnsweringOptions().workload() == {
        "batch_size": 32,
        "prompt_tokens": 512,
        "response_tokens": DEFAULTS["max_response_tokens"],
    }
    few = AnsweringOptions(max_batch_tokens=2048, max_response_tokens=512)
    assert few.workload() == {"batch_size": 2, "prompt_tokens": 512, "response_tokens": 512}
    assert job_options.AnsweringOptions is jobs.answering_options({}).__class__


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_response_tokens": 0}, ValueError, "max_response_tokens is 0: it must be 1 or more"),
        ({"max_response_tokens": 2.5}, ValueError, "it must be a whole number"),
        ({"max_response_tokens": True}, ValueError, "it must be a whole number"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5: it must be above 0 and at most 1"),
        ({"temperature": float("nan")}, ValueError, "it must be 0 or more"),
        ({"reload_seconds": float("inf")}, ValueError, "it must be above 0"),
        ({"dtype": "int4"}, ValueError, "it must be one of auto, float16"),
        ({"truncate": "no"}, ValueError, "it must be True or False"),
        ({"seed": -1}, ValueError, "it must be 0 or more"),
        ({"max_batch_tokens": 256}, ValueError, "ask for shorter responses, or raise max_batch_tokens"),
        (
            {"max_batch_sice": 4},
            TypeError,
            "there is no option max_batch_sice=4: do you mean max_batch_size",
        ),
    ],
)
def test_what_an_option_does_not_take_is_told_with_what_it_takes(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        answering_options(values)
    with pytest.raises(error, match=re.escape(message)):
        AskModel("model", "model.pt", **values)


def test_a_model_and_a_path_in_each_others_place_are_told():
    with pytest.raises(ValueError, match="not the path of a state dict"):
        AskModel("gs://bucket/model.pt", "google/flan-t5-small")
    with pytest.raises(ValueError, match="not the path of a state dict"):
        LanguageModelHandler("google/flan-t5-small", "gs://bucket/model.pt")


def test_no_second_default_of_an_option_stands_in_the_source():
    """A parameter or field of an option's name has no default of its own, but what the options have."""
    seen = []
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                positional = [*node.args.posonlyargs, *node.args.args]
                named = positional[len(positional) - len(node.args.defaults) :]
                pairs = [*zip(named, node.args.defaults, strict=True)]
                pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                found = [(argument.arg, default) for argument, default in pairs if default is not None]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found = [(node.target.id, node.value)]
            else:
                continue
            for name, default in found:
                is_literal = isinstance(default, ast.Constant) and default.value is not None
                if name in NAMES and is_literal:
                    seen.append(f"{path.relative_to(ROOT)}: {name} = {default.value!r}")
    # A state dict's dtype, and a bundle's, are other things than the dtype to compute in.
    assert [one for one in seen if ": dtype" not in one] == []
    source = (ROOT / "model_handler" / "options.py").read_text()
    for number in ("32_768", "32,"):
        assert source.count(number) == 1


def test_the_parser_has_no_defaults():
    assert all(action.default in ("==SUPPRESS==", None) for action in parser()._actions)
