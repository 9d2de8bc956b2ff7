"""The handler in Beam: loaded once, pickled small, and one bad prompt harms nobody."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import apache_beam as beam
import pytest
import torch
from apache_beam.internal import pickler
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream
from apache_beam.testing.util import assert_that, equal_to
from conftest import wait_until
from tiny_models import save_checkpoint

from helpers.load_state_dict import LoadError, WrongModelError, convert
from helpers.model_handler import NAMESPACE, LanguageModelHandler, engine_thread, served_model
from helpers.model_handler.engines import choice
from helpers.model_handler.language_model import Failure
from helpers.model_handler.local_state_dict import fetch
from helpers.pipeline.transforms import AskModel, FailedPromptError

RUNNERS = ["BundleBasedDirectRunner", "FnApiRunner"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint's folder and the state dict made from it."""
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint("llama", folder / "checkpoint")
    convert(str(folder / "checkpoint"), folder / "model.pt", progress=False)
    return str(folder / "checkpoint"), str(folder / "model.pt")


@pytest.fixture(autouse=True, params=[{"avx512_bf16": True}, {"avx2": True}], ids=["AVX512-BF16", "AVX2"])
def cpu(request, monkeypatch):
    """Stands for a kind of CPU: on one, torch computes in bfloat16, on the other CTranslate2 in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: request.param)
    monkeypatch.setattr(choice, "is_x86", lambda: True)


@pytest.fixture(autouse=True)
def nothing_loaded():
    served_model._served.clear()
    served_model.take_counts()


def loaded(result) -> int:
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_name("models_loaded"))["counters"]
    return sum(counter.attempted for counter in counters)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_process_loads_the_model_once(runner, llama, tmp_path):
    """Two RunInference steps and, on the bundle-based runner, a bundle for each element."""
    pipeline = beam.Pipeline(runner=runner)
    prompts = pipeline | beam.Create([f"prompt {n}" for n in range(10)]) | beam.Reshuffle()
    for step in ("a", "b"):
        handler = LanguageModelHandler(llama[1], max_response_tokens=2, cache_dir=str(tmp_path))
        prompts | step >> RunInference(handler)
    result = pipeline.run()
    result.wait_until_finish()
    assert loaded(result) == 1


def test_a_handler_pickles_small_also_after_it_has_loaded(llama):
    handler = LanguageModelHandler(llama[1], max_response_tokens=3)
    before = list(handler.run_inference(["Hi"], handler.load_model()))
    pickled = pickler.dumps(handler)
    assert len(pickled) < 10_000
    again = pickler.loads(pickled)
    assert list(again.run_inference(["Hi"], again.load_model())) == before


def test_load_model_gives_model_and_tokenizer(llama):
    language_model = LanguageModelHandler(llama[1], llama[0], dtype="float32").load_model()
    assert language_model.model.dtype == torch.float32
    assert language_model.tokenizer.padding_side == "left"


def test_ten_prompts_of_mixed_length_through_a_stream_come_back_as_ten_responses(llama, tmp_path):
    """The published sample's own test, but its ten prompts are alike."""
    prompts = ["Hi", "a longer prompt than that", "x", "What is it?", "yes"] * 2
    stream = TestStream().add_elements(prompts[:4]).add_elements(prompts[4:]).advance_watermark_to_infinity()
    pipeline = beam.Pipeline("BundleBasedDirectRunner", options=PipelineOptions(streaming=True))
    responses = pipeline | stream | AskModel(llama[0], llama[1], max_response_tokens=4)
    responses | beam.Map(note, str(tmp_path / "responses"))  # this runner's metrics miss all but one bundle
    pipeline.run().wait_until_finish()
    assert (tmp_path / "responses").read_text().split() == ["str"] * 10


def note(element, file: str) -> None:
    with open(file, "a") as notes:
        notes.write(type(element).__name__ + "\n")


def test_keys_and_failures_come_out_with_their_prompts(llama):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        prompts = pipeline | beam.Create([(1, "Hi"), (2, ""), (3, "x")])
        answered, failed = prompts | AskModel(*llama, 4, keyed=True).with_exception_handling()
        assert_that(answered | beam.Keys(), equal_to([1, 3]), label="answered")
        assert_that(failed, equal_to([((2, ""), "the prompt is empty")]), label="failed")


def test_a_failure_that_nobody_asked_for_is_an_error(llama):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    pipeline | beam.Create(["Hi", ""]) | AskModel(*llama, 4)
    with pytest.raises(Exception, match="the prompt is empty") as error:
        pipeline.run().wait_until_finish()
    assert isinstance(error.value, FailedPromptError)


def test_results_are_in_the_order_of_their_prompts(llama):
    handler = LanguageModelHandler(llama[1], max_response_tokens=4)
    prompts = ["a long prompt to sort first", "", "Hi", "x"]
    results = list(handler.run_inference(prompts, handler.load_model()))
    assert [result.example for result in results] == prompts
    assert [type(result.inference) for result in results] == [str, Failure, str, str]


def test_a_conversion_for_this_machine_is_made_once_and_mapped(llama, tmp_path):
    first = fetch(llama[1], torch.bfloat16, tmp_path)
    changed = first.file.stat().st_mtime_ns
    second = fetch(llama[1], torch.bfloat16, tmp_path)
    assert first == second
    assert second.file.stat().st_mtime_ns == changed
    converted = torch.load(first.file, weights_only=True)
    expected = {k: v.to(torch.bfloat16) for k, v in torch.load(llama[1], weights_only=True).items()}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    tied = converted["lm_head.weight"], converted["model.embed_tokens.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_a_conversion_that_overflows_is_refused(llama, tmp_path):
    big = changed_checkpoint(llama[0], tmp_path / "checkpoint", scale=1e6)
    convert(big, tmp_path / "big.pt", "float32", progress=False)
    with pytest.raises(LoadError, match="does not fit into float16"):
        fetch(str(tmp_path / "big.pt"), torch.float16, tmp_path / "cache")


def test_a_state_dict_of_another_model_is_refused(llama):
    with pytest.raises(WrongModelError, match="was made from"):
        LanguageModelHandler(llama[1], "google/flan-t5-small").load_model()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_state_dict_is_refused(damage, llama, tmp_path):
    path = tmp_path / "model.pt"
    convert(llama[0], path, progress=False)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-1000:]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match="damaged"):
        LanguageModelHandler(str(path), cache_dir=str(tmp_path / "cache")).load_model()


def test_a_state_dict_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="load_state_dict"):
        LanguageModelHandler(str(tmp_path / "absent.pt")).load_model()


def answer(handler, prompts) -> list:
    return [result.inference for result in handler.run_inference(prompts, handler.load_model())]


def changed_checkpoint(folder, target, kind="llama", scale=1.0) -> str:
    """The checkpoint with other weights, under the same name as a model."""
    model = save_checkpoint(kind, target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0) * scale)
    model.save_pretrained(target)
    return str(target)


def test_a_new_state_dict_is_taken_up_while_serving(llama, tmp_path):
    checkpoint, path = tmp_path / "checkpoint", tmp_path / "model.pt"
    save_checkpoint("llama", checkpoint)
    convert(str(checkpoint), path, "float32", progress=False)
    options = {"max_response_tokens": 8, "dtype": "float32", "cache_dir": str(tmp_path / "cache")}
    handler = LanguageModelHandler(str(path), reload_seconds=0.05, **options)
    prompts = ["Hi", "a longer prompt"]
    old = answer(handler, prompts)
    changed_checkpoint(checkpoint, checkpoint)
    convert(str(checkpoint), path, "float32", overwrite=True, progress=False)
    new = answer(LanguageModelHandler(str(path), **options | {"cache_dir": str(tmp_path / "other")}), prompts)
    assert new != old
    wait_until(lambda: answer(handler, prompts) == new, "the new state dict was not taken up")


def copies(cache) -> list:
    """What the engines read: a state dict in their dtype, or an engine's own file."""
    return [*cache.glob("*/*.pt"), *cache.glob("*/ctranslate2-*/model.bin")]


def test_a_swap_leaves_one_copy_on_the_disk(llama, tmp_path):
    checkpoint, path, cache = tmp_path / "checkpoint", tmp_path / "model.pt", tmp_path / "cache"
    convert(llama[0], path, "float16", progress=False)
    options = {"max_response_tokens": 2, "dtype": "float32", "cache_dir": str(cache)}
    handler = LanguageModelHandler(str(path), reload_seconds=0.05, **options)
    answer(handler, ["Hi"])
    (first,) = copies(cache)
    convert(changed_checkpoint(llama[0], checkpoint), path, "float16", overwrite=True, progress=False)
    wait_until(lambda: not first.exists(), "the old copy is still there")
    assert len(copies(cache)) == 1
    assert answer(handler, ["Hi"])


def test_who_converts_again_gets_the_new_weights_in_the_same_process(llama, tmp_path):
    path = tmp_path / "model.pt"
    convert(llama[0], path, "float32", progress=False)
    handler = LanguageModelHandler(str(path), max_response_tokens=8)
    old = answer(handler, ["Hi"])
    assert answer(handler, ["Hi"]) == old
    assert served_model.take_counts()["models_loaded"] == 0  # counted by the answers: one load for both
    shutil.rmtree(path.with_suffix(""))
    path.unlink()
    convert(changed_checkpoint(llama[0], tmp_path / "c", "t5_tied"), path, "float32", progress=False)
    assert answer(handler, ["Hi"]) != old


def test_a_watch_can_be_asked_for_later(llama, tmp_path):
    path = tmp_path / "model.pt"
    convert(llama[0], path, "float32", progress=False)
    model = LanguageModelHandler(str(path)).load_model()
    weights = model.model
    assert LanguageModelHandler(str(path), reload_seconds=0.05).load_model() is model
    convert(changed_checkpoint(llama[0], tmp_path / "c"), path, "float32", overwrite=True, progress=False)
    wait_until(lambda: model.model is not weights, "nobody looked for new weights")


def test_the_old_state_dict_serves_on_when_the_new_one_is_of_another_kind_or_gone(llama, tmp_path, caplog):
    checkpoint, path = tmp_path / "checkpoint", tmp_path / "model.pt"
    save_checkpoint("llama", checkpoint)
    convert(str(checkpoint), path, "float32", progress=False)
    handler = LanguageModelHandler(str(path), max_response_tokens=4, reload_seconds=0.05, dtype="float32")
    old = answer(handler, ["Hi"])
    shutil.rmtree(checkpoint)
    save_checkpoint("t5_tied", checkpoint)
    convert(str(checkpoint), path, "float32", overwrite=True, progress=False)
    wait_until(lambda: "another architecture" in caplog.text, "the watch did not look")
    path.unlink()
    shutil.rmtree(path.with_suffix(""))
    wait_until(lambda: "does not exist" in caplog.text, "the watch did not look again")
    assert answer(handler, ["Hi"]) == old


def test_a_replacement_that_is_not_whole_leaves_the_old_model_to_a_process_that_only_asks(llama, tmp_path):
    path = tmp_path / "model.pt"
    convert(llama[0], path, "float32", progress=False)
    handler = LanguageModelHandler(str(path), max_response_tokens=4)
    old = answer(handler, ["Hi"])
    manifest = path.with_suffix("") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"crc32c": "AAAAAA=="}))
    assert answer(handler, ["Hi"]) == old, "as while another state dict is being uploaded"


def test_a_tokenizer_with_other_words_does_not_take_over(llama):
    model, other = (served_model.ModelSource(llama[1], dtype="float32").load()[0] for _ in range(2))
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="another vocabulary"):
        model.take_over(other)


def test_a_response_as_long_as_the_model_leaves_no_room_for_a_prompt(llama):
    with pytest.raises(LoadError, match="512 positions"):
        LanguageModelHandler(llama[1], max_response_tokens=512).load_model()
    with pytest.raises(ValueError, match="shorter responses"):
        LanguageModelHandler(llama[1], max_response_tokens=512, max_batch_tokens=512)


def test_beams_own_model_update_changes_the_path_and_frees_the_old_model(llama, tmp_path):
    checkpoint = changed_checkpoint(llama[0], tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "new.pt", progress=False)
    handler = LanguageModelHandler(llama[1], max_response_tokens=4)
    first = handler.load_model()
    handler.update_model_path(str(tmp_path / "new.pt"))
    assert handler.load_model() is not first
    assert len(served_model._served) == 1


def test_the_first_model_is_freed_however_often_the_path_changes(llama, tmp_path):
    checkpoint = changed_checkpoint(llama[0], tmp_path / "checkpoint")
    for name in ("second", "third"):
        convert(checkpoint, tmp_path / f"{name}.pt", progress=False)
    handler = LanguageModelHandler(llama[1], max_response_tokens=4)
    handler.load_model()
    handler.update_model_path(str(tmp_path / "second.pt"))
    handler.update_model_path(str(tmp_path / "third.pt"))
    handler.load_model()
    assert [source.state_dict_path for source in served_model._served] == [str(tmp_path / "third.pt")]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_response_tokens": 0},
        {"max_batch_size": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"max_response_seconds": 0},
        {"reload_seconds": float("nan")},
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_runs(arguments):
    with pytest.raises(ValueError, match="must be"):
        LanguageModelHandler("model.pt", **arguments)


def test_the_pipelines_counters_add_up(llama):
    pipeline = beam.Pipeline(runner="FnApiRunner")
    pipeline | beam.Create(["Hi", "", "x"]) | AskModel(*llama, 4).with_exception_handling()
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(NAMESPACE))["counters"]
    values = {counter.key.metric.name: counter.committed for counter in counters}
    assert values["failed_prompts"] == 1
    assert values["prompt_tokens"] > 0
    assert 2 <= values["response_tokens"] <= 8


def test_a_worker_says_at_start_what_it_is(caplog, llama):
    """Machine, versions, engine and dtype: what only a real worker can tell is then in every job's log."""
    with caplog.at_level("INFO", logger="helpers.model_handler"):
        served_model.ModelSource(str(llama[1]), dtype="float32", engine="torch").load()
    [machine] = [one.getMessage() for one in caplog.records if one.getMessage().startswith("This machine")]
    for part in ("processor", "vCPUs", "torch threads", "memory", "disk", "Python", "transformers"):
        assert part in machine
    assert any("to compute with torch in float32" in one.getMessage() for one in caplog.records)


def test_torchs_threads_are_those_of_the_thread_that_computes(llama):
    before = engine_thread.run(torch.get_num_threads)
    try:
        LanguageModelHandler(llama[1], torch_threads=before + 1).load_model()
        assert engine_thread.run(torch.get_num_threads) == before + 1
    finally:
        torch.set_num_threads(before)
        engine_thread.run(lambda: torch.set_num_threads(before))


def test_prompts_of_many_threads_are_answered_as_each_alone_and_together(llama, tmp_path):
    handler = LanguageModelHandler(llama[1], max_response_tokens=6, cache_dir=str(tmp_path), recompute=True)
    model = handler.load_model()
    prompts = [f"{n % 11} times " * (1 + n % 4) for n in range(48)]
    alone = [next(iter(handler.run_inference([prompt], model))).inference for prompt in prompts]
    sizes = []
    compute = model.engine.generate
    model.engine.generate = lambda batch, *more: sizes.append(len(batch)) or compute(batch, *more)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda prompt: next(iter(handler.run_inference([prompt], model))), prompts))
    assert [result.inference for result in results] == alone
    assert sum(sizes) == len(prompts) and len(sizes) < len(prompts)
