"""The steps of a lone response use another routine than all others, with the same result."""

import pytest
import torch
from tiny_models import save_checkpoint

from helpers.model_handler.engines.single_row import is_worthwhile, speed_up_single_rows

PROMPT = torch.arange(3, 12).reshape(1, -1)


@pytest.fixture(params=("llama", "t5_distinct"), scope="module")
def model(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param)).to(torch.bfloat16)


@pytest.fixture
def steps(model):
    """For each pass through the model, once it is sped up: whether oneDNN was on."""
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    speed_up_single_rows(model)
    yield seen
    hook.remove()
    vars(model).pop("forward", None)


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
    assert steps == [True, False, False, False]
    assert torch.backends.mkldnn.enabled


def test_responses_of_a_batch_do_not(model, steps):
    generate(model, PROMPT.repeat(2, 1))
    assert steps == [True] * 4


def test_the_logits_are_the_same_within_bfloat16(model, steps):
    sped_up = generate(model, PROMPT).logits
    del model.forward
    # The prompt's, and the first that the other routine computes; after that, a tie may part the responses.
    for ours, plain in zip(sped_up[:2], generate(model, PROMPT).logits[:2], strict=True):
        assert (ours - plain).abs().mean() < 0.05 * plain.std()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_switch_is_on_again_after_an_error(error, model, steps):
    def fail(module, args):
        if len(steps) == 3:
            raise error("broken")

    head = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(error, match="broken"):
        generate(model, PROMPT)
    head.remove()
    assert steps == [True, False, False]
    assert torch.backends.mkldnn.enabled


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
