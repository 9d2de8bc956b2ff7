"""The steps of a lone response use another routine than all others, with the same result."""

import pytest
import torch
from tiny_models import save_checkpoint

from helpers.serving.single_row import is_worthwhile, speed_up_single_rows

PROMPT = torch.arange(3, 12).reshape(1, -1)


@pytest.fixture(params=("llama", "t5_distinct"), scope="module")
def model(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param)).to(torch.bfloat16)


@pytest.fixture
def steps(model):
    """For each pass through the model, with the hooks in place: rows, positions, whether oneDNN was on."""
    seen = []

    def note(module, args, kwargs):
        ids = kwargs["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
        seen.append((*ids.shape, torch.backends.mkldnn.enabled))

    speed_up_single_rows(model)
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()


def generate(model, prompts):
    return model.generate(
        prompts,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def test_a_lone_response_takes_the_other_routine_after_its_prompt(model, steps):
    generate(model, PROMPT)
    assert [on for *_, on in steps] == [True, False, False, False]
    assert torch.backends.mkldnn.enabled


def test_responses_of_a_batch_do_not(model, steps):
    generate(model, PROMPT.repeat(2, 1))
    assert [on for *_, on in steps] == [True] * 4


def test_the_logits_are_the_same_within_bfloat16(model, steps):
    with_hooks = generate(model, PROMPT).logits
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    for ours, plain in zip(with_hooks, generate(model, PROMPT).logits, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)


def test_the_switch_is_on_again_after_an_error(model, steps):
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("broken")

    head = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, PROMPT)
    head.remove()
    assert steps[-1][-1] is False and torch.backends.mkldnn.enabled


def test_a_user_who_switched_it_off_finds_it_off(model, steps):
    torch.backends.mkldnn.enabled = False
    try:
        generate(model, PROMPT)
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True


def test_only_bfloat16_on_a_cpu_is_worth_it():
    assert not is_worthwhile(torch.device("cpu"), torch.float32)
    assert not is_worthwhile(torch.device("cuda"), torch.bfloat16)
