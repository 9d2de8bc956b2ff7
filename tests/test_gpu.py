"""What only a GPU shows. CI has none: run `pytest -m gpu tests/test_gpu.py` on a machine that does."""

import gc

import apache_beam as beam
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from tiny_models import KINDS, save_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers.load_state_dict import convert
from helpers.model_handler import AnsweringOptions, Failure, LanguageModelHandler, Response
from helpers.model_handler.engines.choice import choose
from helpers.model_handler.engines.ctranslate2_engine import why_not_on_gpu
from helpers.model_handler.served_model import ModelSource

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

PROMPTS = ["Hi", "What is the capital of France?", "é", "Write one sentence about the sea.", "a b"]


@pytest.fixture(params=["torch", "ctranslate2"])
def engine(request):
    """Each engine that computes on the GPU here."""
    if request.param == "ctranslate2" and (reason := why_not_on_gpu()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    """A checkpoint of each kind, and the state dict made from it."""
    save_checkpoint(request.param, tmp_path / "checkpoint")
    convert(str(tmp_path / "checkpoint"), tmp_path / "model.pt", "float32", progress=False)
    return tmp_path


def test_auto_computes_on_the_gpu_in_bfloat16_where_it_can():
    chosen = choose()
    has_bfloat16 = torch.cuda.is_bf16_supported(False)
    assert chosen.device.type == "cuda"
    assert chosen.dtype == ("bfloat16" if has_bfloat16 else "float32")
    assert chosen.engine == ("ctranslate2" if has_bfloat16 and not why_not_on_gpu() else "torch")


def test_answers_in_float32_are_those_of_plain_transformers_on_the_gpu(checkpoint, engine):
    model = ModelSource(str(checkpoint / "model.pt"), dtype="float32", engine=engine).load()[0]
    assert model.engine.device.startswith("cuda")
    kind = AutoModelForSeq2SeqLM if model.is_encoder_decoder else AutoModelForCausalLM
    plain = kind.from_pretrained(checkpoint / "checkpoint").to("cuda").eval()
    answers = model.ask(PROMPTS, AnsweringOptions(max_response_tokens=12))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([model.encode(prompt)], device="cuda")
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        start = 1 if model.is_encoder_decoder else ids.shape[1]
        assert answer.text == model.tokenizer.decode(output[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("torch", "bfloat16"), ("torch", "float16"), ("ctranslate2", "bfloat16")],
    indirect=["engine"],
)
def test_smaller_dtypes_answer(checkpoint, engine, dtype):
    model = ModelSource(str(checkpoint / "model.pt"), dtype=dtype, engine=engine).load()[0]
    assert (model.engine.name, model.engine.dtype) == (engine, dtype)
    answers = model.ask(PROMPTS, AnsweringOptions(max_response_tokens=12))
    assert all(isinstance(answer, Response) for answer in answers)


def test_a_batch_that_the_gpu_has_no_room_for_is_halved_until_it_fits(checkpoint):
    model = ModelSource(str(checkpoint / "model.pt"), dtype="float32", engine="torch").load()[0]
    prompts = [f"{n} " * 150 for n in range(100, 164)]
    options = AnsweringOptions(
        max_response_tokens=2, max_prompt_tokens=1024, max_batch_size=64, max_batch_tokens=10**6
    )
    if not model.is_encoder_decoder:
        prompts = [prompt[:450] for prompt in prompts]
    sizes = []
    free = model.ask(prompts[:2], options)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 150e6) / total)
    try:
        answers = model.ask(prompts, options, on_batch=lambda batch: sizes.append(batch.size))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(isinstance(answer, Response) for answer in answers)
    assert [answer.text for answer in answers[:2]] == [answer.text for answer in free]
    assert sum(sizes) == len(prompts)
    assert max(sizes) < 64 or not model.is_encoder_decoder, "nothing was halved: the test shows nothing"


def test_a_batch_that_ctranslate2_has_no_room_for_is_halved_too(tmp_path, monkeypatch):
    """All of the GPU but a little is taken, so that CUDA itself runs out."""
    if reason := why_not_on_gpu():
        pytest.skip(reason)
    save_checkpoint("t5_distinct", tmp_path / "checkpoint")
    convert(str(tmp_path / "checkpoint"), tmp_path / "model.pt", "float32", progress=False)
    model = ModelSource(str(tmp_path / "model.pt"), dtype="float32", engine="ctranslate2").load()[0]
    prompts = [f"{n} " * 250 for n in range(100, 228)]
    options = AnsweringOptions(
        max_response_tokens=2, max_prompt_tokens=1024, max_batch_size=128, max_batch_tokens=10**6
    )
    expected = model.ask(prompts[:1], options)
    torch.cuda.empty_cache()
    room, sizes = 600 * 2**20, []
    taken = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device="cuda")
    answers = model.ask(prompts, options, on_batch=lambda batch: sizes.append(batch.size))
    del taken
    torch.cuda.empty_cache()
    assert all(isinstance(answer, Response) for answer in answers)
    assert answers[0].text == expected[0].text
    assert max(sizes) < 128, "nothing was halved: the test shows nothing"


def test_weights_that_were_replaced_leave_the_gpu(checkpoint, engine):
    path = str(checkpoint / "model.pt")
    model = ModelSource(path, engine=engine).load()[0]
    model.ask(PROMPTS, AnsweringOptions(max_response_tokens=2))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        model.take_over(ModelSource(path, engine=engine).load()[0])
        model.ask(PROMPTS, AnsweringOptions(max_response_tokens=2))
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= before - 64 * 2**20


def test_a_pipeline_answers_on_the_gpu_and_a_bad_prompt_costs_no_other(checkpoint, engine):
    results = []
    prompts = [*PROMPTS, "", "x" * 10**6]
    with beam.Pipeline(runner="DirectRunner", options=beam.options.pipeline_options.PipelineOptions([])) as p:
        handler = LanguageModelHandler(str(checkpoint / "model.pt"), max_response_tokens=8, engine=engine)
        (
            p
            | beam.Create(prompts)
            | RunInference(handler)
            | beam.combiners.ToList()
            | beam.io.WriteToText(str(checkpoint / "out"), coder=beam.coders.PickleCoder())
        )
    for file in checkpoint.glob("out*"):
        results += beam.coders.PickleCoder().decode(file.read_bytes().rstrip(b"\n"))
    failed = {result.example for result in results if isinstance(result.inference, Failure)}
    assert len(results) == len(prompts)
    assert failed == {"", "x" * 10**6}
