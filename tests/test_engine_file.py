"""An engine's file: made once from the state dict or taken from beside it, whole or absent, and checked."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, byte_tokenizer, llama, save_checkpoint
from transformers import GenerationConfig, LlamaConfig, MistralConfig, MptConfig, MptForCausalLM

from helpers.files.cache import cache_folder
from helpers.load_state_dict import LoadError, convert, read_manifest
from helpers.load_state_dict.__main__ import main
from helpers.load_state_dict.engine_file import (
    EngineError,
    make,
    put_beside,
    read_engine_file,
    reference,
    why_not,
)
from helpers.load_state_dict.engine_file.description import DESCRIPTION, engine_folder
from helpers.load_state_dict.engine_file.variables import JoiningLater, _Joined
from helpers.load_state_dict.mapped_model import load_model
from helpers.model_handler import AnsweringOptions, LanguageModelHandler, Response
from helpers.model_handler.engines import choice, ctranslate2_engine
from helpers.model_handler.engines.ctranslate2_engine import STEP_ROWS, groups_by_length, why_not_on_gpu
from helpers.model_handler.local_engine_file import fetch_engine_file
from helpers.model_handler.served_model import ModelSource

OPTIONS = AnsweringOptions(max_response_tokens=8)
PROMPTS = ["Hi", "What is the capital of France?"]


@pytest.fixture
def state_dict(tmp_path):
    """A state dict of its own for each test: `model.pt`."""
    return converted(tmp_path)


@pytest.fixture
def wide(tmp_path):
    """One to round to int8: where a CPU has AVX2 only, that changes a narrower one's random weights more than
    is allowed."""
    return converted(tmp_path, width=64)


def converted(folder: Path, **shape: int) -> str:
    save_checkpoint("llama", folder / "checkpoint", **shape)
    convert(str(folder / "checkpoint"), folder / "model.pt", progress=False)
    return str(folder / "model.pt")


def load(path, cache, **source):
    return ModelSource(
        path, cache_dir=str(cache), **{"engine": "ctranslate2", "dtype": "float32"} | source
    ).load()[0]


def texts(model) -> list[str]:
    return [answer.text for answer in model.ask(PROMPTS, OPTIONS)]


def weights_in(cache) -> list[Path]:
    return sorted(Path(cache).glob("*/ctranslate2-*/model.bin"))


def test_it_is_made_once_and_anew_for_other_weights(state_dict, tmp_path):
    cache = tmp_path / "cache"
    first = texts(load(state_dict, cache))
    (made,) = weights_in(cache)
    before = made.stat().st_mtime_ns
    assert texts(load(state_dict, cache)) == first
    assert made.stat().st_mtime_ns == before
    model = save_checkpoint("llama", tmp_path / "other")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(tmp_path / "other")
    convert(str(tmp_path / "other"), state_dict, overwrite=True, progress=False)
    assert texts(load(state_dict, cache)) != first


def test_it_is_named_for_its_source_and_the_engines_version(state_dict, tmp_path, monkeypatch):
    load(state_dict, tmp_path / "cache")
    (made,) = weights_in(tmp_path / "cache")
    manifest = read_manifest(state_dict)
    assert manifest.version in made.parent.name
    found = fetch_engine_file(state_dict, "float32", tmp_path / "cache")
    assert found.file.engine_version in made.parent.name
    assert found.file.source == manifest.version


def test_one_beside_the_state_dict_is_used_where_it_is(state_dict, tmp_path, capsys):
    assert main(["local", *common(state_dict), "--engine-file", "float32"]) == 0
    assert "Wrote" in capsys.readouterr().out
    cache = tmp_path / "cache"
    assert texts(load(state_dict, cache)) == texts(load(state_dict, cache, engine="torch"))
    assert weights_in(cache) == []
    assert main(["local", *common(state_dict), "--engine-file", "float32"]) == 0
    assert "Nothing to do" in capsys.readouterr().out


def common(state_dict) -> list[str]:
    checkpoint = str(Path(state_dict).with_name("checkpoint"))
    return ["--model-name", checkpoint, "--state-dict-path", state_dict]


def test_one_in_the_cloud_is_fetched_without_the_state_dict(wide, tmp_path, bucket):
    path = f"gs://{bucket.name}/models/model.pt"
    checkpoint = str(Path(wide).with_name("checkpoint"))
    convert(checkpoint, path, progress=False, engine_file="int8")
    cache = tmp_path / "cache"
    model = load(path, cache, dtype="int8")
    assert all(isinstance(answer, Response) for answer in model.ask(PROMPTS, OPTIONS))
    assert len(weights_in(cache)) == 1
    assert list(cache.glob("*/*.pt")) == []
    # One for another dtype can be added to a state dict that is already there.
    convert(checkpoint, path, progress=False, engine_file="float32")
    assert texts(load(path, tmp_path / "other")) == texts(load(wide, cache))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another", "nonsense", "absent"])
def test_one_that_is_not_right_is_not_used(damage, state_dict, tmp_path, caplog):
    put_beside(state_dict, "float32", progress=False)
    right = texts(load(state_dict, tmp_path / "cache"))
    folder = Path(engine_folder(state_dict, "float32"))
    weights, description = folder / "model.bin", folder / DESCRIPTION
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "of another":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"source": "another"}))
    elif damage == "nonsense":
        description.write_text('{"engine": 1}')
    else:
        weights.unlink()
    assert texts(load(state_dict, tmp_path / "other")) == right
    assert len(weights_in(tmp_path / "other")) == 1, "it was made from the state dict instead"
    assert caplog.text
    put_beside(state_dict, "float32", progress=False)  # mends it
    assert read_engine_file(state_dict, "float32").damage_in(folder) == ""


def test_a_description_that_names_a_file_elsewhere_is_refused(state_dict, tmp_path):
    put_beside(state_dict, "float32", progress=False)
    description = Path(engine_folder(state_dict, "float32"), DESCRIPTION)
    values = json.loads(description.read_text())
    values["files"] = {"../../model.pt": "AAAAAA=="}
    values["sizes"] = {"../../model.pt": 1}
    description.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="does not describe"):
        read_engine_file(state_dict, "float32")


MAKE = """
import sys
from helpers.model_handler.local_engine_file import fetch_engine_file
from helpers.load_state_dict.engine_file import variables
if sys.argv[3] == "slowly":
    import time
    to_bytes = variables._Later.to_bytes
    def slowly(self):
        print("writing", flush=True)
        time.sleep(0.5)
        return to_bytes(self)
    variables._Later.to_bytes = slowly
print(fetch_engine_file(sys.argv[1], "float32", sys.argv[2]).folder, flush=True)
"""


def start(state_dict, cache, how="") -> subprocess.Popen:
    command = [sys.executable, "-c", MAKE, state_dict, str(cache), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_whoever_is_killed_leaves_nothing_that_is_used(state_dict, tmp_path):
    cache = tmp_path / "cache"
    process = start(state_dict, cache, "slowly")
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert weights_in(cache) == [] or "partial" in weights_in(cache)[0].parent.name
    load(state_dict, cache)
    assert [file.parent.name.endswith("partial") for file in weights_in(cache)] == [False]


def test_two_processes_make_one(state_dict, tmp_path):
    cache = tmp_path / "cache"
    processes = [start(state_dict, cache, "slowly") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert sorted("writing" in output for output in outputs) == [False, True]
    assert outputs[0][-1] == outputs[1][-1]


def test_a_full_disk_leaves_nothing_and_says_so(state_dict, tmp_path):
    manifest = read_manifest(state_dict)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError, match="free some space"):
            make(state_dict, state_dict.removesuffix(".pt"), manifest.version, tmp_path / "engine", "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("engine*"))


def checkpoint_with(folder, config=None, settings=None) -> str:
    """A Llama with another config or other settings of the publisher's than usual."""
    model = llama()
    for name, value in (config or {}).items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**{"eos_token_id": 4, "pad_token_id": 0} | (settings or {}))
    model.save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    path = str(folder) + ".pt"
    convert(str(folder), path, "float32", progress=False)
    return path


def test_a_model_that_the_converter_misreads_is_left_to_torch(tmp_path, caplog):
    """CTranslate2's loader takes every Llama for one with SwiGLU: its file would give other answers."""
    path = checkpoint_with(tmp_path / "m", {"hidden_act": "gelu"})
    cache = tmp_path / "cache"
    with pytest.raises(LoadError, match="does not compute what transformers does"):
        load(path, cache)
    assert weights_in(cache) == []
    with pytest.raises(EngineError, match="does not compute what transformers does"):
        load(path, cache)  # without making it again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        model = load(path, cache, engine=None)
    assert model.engine.name == "torch"
    assert "Computing with torch" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"stop_strings": ["a"]},
        {"bad_words_ids": [[9]]},
    ],
)
def test_settings_of_the_publishers_that_it_does_not_honour_are_left_to_torch(settings, tmp_path, caplog):
    path = checkpoint_with(tmp_path / "m", settings=settings)
    with pytest.raises(LoadError, match=next(iter(settings))):
        load(path, tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        assert load(path, tmp_path / "cache", engine=None).engine.name == "torch"


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": list(range(60, 120))},
        {"min_new_tokens": 6},
        {"eos_token_id": [4, *range(60, 160)]},
        {"repetition_penalty": 1.0},
    ],
)
def test_settings_that_both_honour_mean_the_same(settings, tmp_path):
    path = checkpoint_with(tmp_path / "m", settings=settings)
    both = [load(path, tmp_path / "cache", engine=engine) for engine in ("torch", "ctranslate2")]
    prompts = [f"{n}?" * (1 + n % 5) for n in range(24)]
    one, other = ([vars(answer) for answer in model.ask(prompts, OPTIONS)] for model in both)
    assert one == other
    assert len({answer["text"] for answer in one}) > 8


def test_sampling_draws_from_the_same_distribution(state_dict, tmp_path):
    """The first tokens of many responses: their frequencies differ by no more than chance."""
    counts = []
    options = AnsweringOptions(
        max_response_tokens=1, temperature=0.7, top_p=0.8, max_batch_size=512, max_batch_tokens=10**6
    )
    for engine in ("torch", "ctranslate2"):
        model = load(state_dict, tmp_path / "cache", engine=engine)
        ids = model.encode(PROMPTS[1], options)
        drawn = [token for _ in range(8) for (token,), _ in model.engine.generate([ids] * 500, options)]
        counts.append(torch.bincount(torch.tensor(drawn), minlength=model.engine.rows) / len(drawn))
    assert (counts[0] > 0.02).sum() > 3
    assert float((counts[0] - counts[1]).abs().sum()) / 2 < 0.06


def test_a_prefix_that_all_prompts_share_changes_no_answer(state_dict, tmp_path):
    tokenizer = with_system_prompt()
    folder = tmp_path / "system"
    save_checkpoint("llama", folder)
    tokenizer.save_pretrained(folder)
    convert(str(folder), tmp_path / "system.pt", "float32", progress=False)
    prompts = [f"{n}?" * (1 + n % 5) for n in range(24)]
    for engine in ("torch", "ctranslate2"):
        model = load(str(tmp_path / "system.pt"), tmp_path / "cache", engine=engine)
        assert (
            model._encoder.prefix_tokens([model.encode(prompt) for prompt in prompts], AnsweringOptions())
            > 60
        )
        kept = model.ask(prompts, OPTIONS)
        assert engine != "torch" or model.engine._prefix._state is not None
        assert model.ask(prompts, AnsweringOptions(max_response_tokens=8, recompute=True)) == kept
        assert model.ask(prompts[:1], OPTIONS) == kept[:1]
        assert len({answer.text for answer in kept}) > 8


def test_prompts_that_are_equal_are_computed_once(state_dict, tmp_path):
    model = load(state_dict, tmp_path / "cache")
    sizes: list[int] = []
    ask = {"on_batch": lambda batch: sizes.append(batch.size)}
    answers = model.ask(["Hi", "a b", "Hi", "", "Hi"], OPTIONS, **ask)
    assert answers[0] == answers[2] == answers[4] != answers[1]
    assert sizes == [2]
    model.ask(["Hi"] * 3, AnsweringOptions(max_response_tokens=8, recompute=True), **ask)
    model.ask(["Hi"] * 3, AnsweringOptions(max_response_tokens=8, temperature=1.0), **ask)
    assert sizes == [2, 3, 3]


def test_int8_is_made_only_when_it_is_asked_for(wide, tmp_path):
    handler = LanguageModelHandler(wide, dtype="int8", cache_dir=str(tmp_path / "cache"))
    assert handler.load_model().engine.dtype == "int8"
    small = weights_in(tmp_path / "cache")[0].stat().st_size
    load(wide, tmp_path / "other")
    assert small < 0.5 * weights_in(tmp_path / "other")[0].stat().st_size


def test_the_transformers_model_is_there_for_those_who_ask(state_dict, tmp_path):
    model = load(state_dict, tmp_path / "cache")
    assert model.model.dtype == torch.float32
    assert model.model is model.model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"engine": "torch", "dtype": "int8"}, "torch does not compute in int8"),
        ({"dtype": "float16"}, "ctranslate2 does not compute in float16"),
        ({"dtype": "bfloat16"}, "does not compute in bfloat16 on this cpu"),
        ({"device": "cuda"}, "GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(source, message, state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ctranslate2.get_supported_compute_types", lambda device: {"float32"})
    with pytest.raises(LoadError, match=message):
        load(state_dict, tmp_path / "cache", **source)


def test_an_engine_that_is_not_installed_is_named(state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.model_handler.engines.choice.engine_version", lambda: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for source in ({}, {"engine": None, "dtype": "int8"}):
        with pytest.raises(LoadError, match="pip install ctranslate2"):
            load(state_dict, tmp_path / "cache", **source)
    assert load(state_dict, tmp_path / "cache", engine=None, dtype=None).engine.name == "torch"


def test_a_seed_leaves_the_choice_to_torch(state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    options = {"cache_dir": str(tmp_path / "cache"), "temperature": 1.0, "seed": 3}
    assert LanguageModelHandler(state_dict, **options).load_model().engine.name == "torch"
    for asked in ({"engine": "ctranslate2"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="cannot repeat"):
            LanguageModelHandler(state_dict, **options | asked)


def test_matrices_are_joined_only_when_they_are_written():
    parts = [torch.randn(3, 4), torch.randn(2, 4)]
    with JoiningLater():
        joined = torch.cat(parts)
    assert isinstance(joined, _Joined)
    assert joined.shape == (5, 4)
    assert torch.equal(joined * 1, torch.cat(parts))


def test_the_tolerance_tells_right_from_wrong():
    """What has nothing to do with the model is 1.1 standard deviations away, by chance alone."""
    torch.manual_seed(0)
    one, other = torch.randn(2, 10_000)
    unrelated = float((one - other).abs().mean() / other.std())
    assert max(ctranslate2_engine.TOLERANCE.values()) < 0.6 * unrelated


def test_the_wait_for_another_process_is_bounded(state_dict, tmp_path, monkeypatch):
    from filelock import FileLock, Timeout

    monkeypatch.setattr("helpers.model_handler.local_engine_file.LOCK_SECONDS", 0.1)
    load(state_dict, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    with FileLock(folder / "engine.lock"), pytest.raises(Timeout):
        fetch_engine_file(state_dict, "float32", tmp_path / "cache")


def test_a_damaged_state_dict_makes_no_engines_file(state_dict):
    data = bytearray(Path(state_dict).read_bytes())
    data[len(data) // 2] ^= 1
    Path(state_dict).write_bytes(data)
    with pytest.raises(EngineError, match="is damaged"):
        put_beside(state_dict, "float32", progress=False)
    assert not Path(engine_folder(state_dict, "float32")).exists()


def test_what_a_killed_upload_left_is_no_obstacle(state_dict, bucket):
    path = f"gs://{bucket.name}/model.pt"
    convert(str(Path(state_dict).with_name("checkpoint")), path, progress=False)
    work = cache_folder("conversions") / f"{read_manifest(path).version}-int8"
    (work / "left").mkdir(parents=True)
    put_beside(path, "int8", progress=False)
    assert not work.exists()
    assert read_engine_file(path, "int8").dtype == "int8"


@pytest.mark.parametrize(
    ("first", "second"),
    [("torch", "ctranslate2"), ("ctranslate2", "torch_packed"), ("torch_packed", "torch")],
)
def test_one_engine_takes_over_from_the_other(first, second, state_dict, tmp_path):
    """As after a load that fell back to torch; settings that shape no weight are no obstacle either."""
    model = load(state_dict, tmp_path / "cache", engine=first)
    before = texts(model)
    other = load(state_dict, tmp_path / "cache", engine=second)
    other.engine.config.use_cache = False
    model.take_over(other)
    assert (model.engine.name, texts(model)) == (second, before)


def test_a_kept_prefix_does_not_outlive_its_weights(tmp_path):
    for name, flip in (("one", False), ("other", True)):
        model = save_checkpoint("llama", tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters() if flip else ():
                parameter.copy_(parameter.flip(0))
        model.save_pretrained(tmp_path / name)
        with_system_prompt().save_pretrained(tmp_path / name)
        convert(str(tmp_path / name), tmp_path / f"{name}.pt", "float32", progress=False)
    for engine in ("torch", "torch_packed", "ctranslate2"):
        one, other = (
            load(str(tmp_path / f"{name}.pt"), tmp_path / "cache", engine=engine) for name in ("one", "other")
        )
        before, expected = texts(one), texts(other)
        one.take_over(other)
        assert texts(one) == expected != before


def with_system_prompt():
    tokenizer = byte_tokenizer(chat=True)
    words = "You are a helpful assistant, and you answer in one short sentence. "
    tokenizer.chat_template = "{{ '" + words + "' }}" + tokenizer.chat_template
    return tokenizer


def test_a_prefix_is_kept_only_where_positions_are_said(tmp_path):
    """MPT counts its keys, padding included: a prefix before the padding would be at another distance."""
    torch.manual_seed(3)
    config = MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=256)
    model = MptForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.generation_config = GenerationConfig(eos_token_id=4, pad_token_id=0)
    model.save_pretrained(tmp_path / "mpt")
    with_system_prompt().save_pretrained(tmp_path / "mpt")
    convert(str(tmp_path / "mpt"), tmp_path / "mpt.pt", "float32", progress=False)
    loaded = load(str(tmp_path / "mpt.pt"), tmp_path / "cache", engine="torch")
    prompts = [f"{n}?" * (1 + n % 5) for n in range(12)]
    kept = loaded.ask(prompts, OPTIONS)
    assert loaded.engine._prefix._state is None
    assert loaded.ask(prompts, AnsweringOptions(max_response_tokens=8, recompute=True)) == kept


def test_a_publisher_who_uses_no_cache_is_heeded(tmp_path):
    path = checkpoint_with(tmp_path / "m", settings={"use_cache": False})
    with_system_prompt().save_pretrained(tmp_path / "m")
    convert(str(tmp_path / "m"), path, "float32", overwrite=True, progress=False)
    prompts = [f"{n}?" * (1 + n % 5) for n in range(12)]
    usual, kept = AnsweringOptions(max_response_tokens=8, recompute=True), OPTIONS
    model = load(path, tmp_path / "cache", engine="torch")
    assert model.ask(prompts, kept) == model.ask(prompts, usual)


def test_parts_of_a_model_in_bfloat16_are_widened_together(tmp_path, monkeypatch):
    """T5's feed-forward layers look at each other's dtypes."""
    monkeypatch.setattr("helpers.load_state_dict.engine_file.reference.PART_BYTES", 1)
    save_checkpoint("t5_distinct", tmp_path / "t5")
    for dtype in ("bfloat16", "float16"):
        path = tmp_path / f"{dtype}.pt"
        convert(str(tmp_path / "t5"), path, dtype, progress=False)
        model = load(str(path), tmp_path / "cache")
        assert texts(model) == texts(load(str(path), tmp_path / "cache", engine="torch"))


def test_a_sample_is_the_same_however_much_of_the_model_is_widened_at_once(tmp_path, monkeypatch):
    """A list of layers that is small enough would be taken for a part, and is never called."""
    for kind in ("t5_distinct", "llama"):
        save_checkpoint(kind, tmp_path / kind)
        convert(str(tmp_path / kind), tmp_path / f"{kind}.pt", progress=False)
        model, _ = load_model(tmp_path / f"{kind}.pt", tmp_path / kind, as_stored=True)
        sizes = {4 * sum(p.numel() for p in module.parameters()) for module in model.modules()}
        samples = []
        for size in sorted(sizes):
            monkeypatch.setattr(reference, "PART_BYTES", size)
            samples.append(reference.reference_of(model.eval(), 0, lambda weight: None).log_probabilities)
        assert len(samples) > 5
        assert all(one == pytest.approx(samples[-1], abs=1e-4) for one in samples)


@pytest.mark.parametrize("error", [MemoryError("none left"), OSError(28, "No space left on device")])
def test_a_lack_that_may_pass_is_not_noted_and_costs_no_answer(error, state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with monkeypatch.context() as patch:
        patch.setattr(
            "helpers.load_state_dict.engine_file.making._write", lambda *_: (_ for _ in ()).throw(error)
        )
        assert load(state_dict, tmp_path / "cache", engine=None).engine.name == "torch"
        with pytest.raises(type(error)):
            load(state_dict, tmp_path / "cache")
    assert load(state_dict, tmp_path / "cache", engine=None).engine.name == "ctranslate2"


@pytest.mark.parametrize(
    "settings",
    [{"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {"sliding_window": 64}],
)
def test_what_only_long_prompts_would_show_is_left_to_torch(settings, tmp_path):
    """Mistral with a window of 64 tokens gave other answers beyond it, and the same ones within."""
    kind = MistralConfig if "sliding_window" in settings else LlamaConfig
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=4,
        pad_token_id=0,
        **settings,
    )
    (tmp_path / "m").mkdir()
    config.save_pretrained(tmp_path / "m")
    assert "use engine torch" in why_not(tmp_path / "m")


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=32), response=st.integers(1, 300))
def test_groups_hold_each_prompt_once_and_cost_no_more_than_one(lengths, response):
    groups = groups_by_length(lengths, response, STEP_ROWS["cpu"])

    def cost(rows):
        spread = max(lengths[row] for row in rows) - min(lengths[row] for row in rows)
        return (spread + response) * (len(rows) + STEP_ROWS["cpu"])

    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert sum(map(cost, groups)) <= cost(range(len(lengths)))


def test_prompts_of_one_length_stay_together_and_very_different_ones_do_not():
    assert groups_by_length([20] * 32, 32, STEP_ROWS["cpu"]) == [list(range(32))]
    assert sorted(map(sorted, groups_by_length([20, 300] * 8, 16, STEP_ROWS["cpu"]))) == [
        list(range(0, 16, 2)),
        list(range(1, 16, 2)),
    ]


def test_a_gpu_without_its_library_names_the_package(monkeypatch):
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 0)
    assert "finds no GPU" in why_not_on_gpu.__wrapped__()
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install nvidia-cublas-cu12" in why_not_on_gpu.__wrapped__()


def test_the_library_is_found_in_its_package(monkeypatch, tmp_path):
    asked = []

    def load(path, mode=None):
        asked.append(path)
        if mode is None:
            raise OSError("not in a folder that is searched")

    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 1)
    monkeypatch.setattr("ctypes.CDLL", load)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert not why_not_on_gpu.__wrapped__()
    # The one that the other needs comes first.
    assert asked[1:] == [str(tmp_path / "lib" / f"lib{name}.so.12") for name in ("cublasLt", "cublas")]


def test_integers_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(choice, "why_not_on_gpu", lambda: "")
    monkeypatch.setattr("ctranslate2.get_supported_compute_types", lambda device: {"float32", "bfloat16"})
    with pytest.raises(LoadError, match="int8 on this cuda: use float32 or bfloat16, or device cpu"):
        choice.choose(dtype="int8")
    assert choice.choose(engine="ctranslate2").dtype == "bfloat16"
