"""Answers a lone prompt faster, in bfloat16 on a CPU.

Once the prompt has been read, each step of a lone response multiplies every weight matrix by a single row. In
bfloat16, torch hands that to oneDNN, which is made for many rows. Torch's own routine for one row reads the
weights far faster: measured on two cores of an AMD EPYC with AVX512-BF16, torch 2.13, 25 GB/s against 9, and
1.7 times as many tokens a second for a lone prompt, with SmolLM2-135M and with a model of flan-t5-large's
shape. From two rows on oneDNN is as fast or faster, and for a prompt's many rows much faster, so only the
steps of a lone response change.

It acts only on the kind of CPU it was measured on: AVX512-BF16 without AMX, such as AMD's EPYC since Zen 4.
The machine types that sizing proposes for bfloat16 have AMX; nothing was measured on those, so they are left
alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch's switch for oneDNN applies to the whole process. It stays off while any thread is in such a step:
# meanwhile another model's thread would be slower, but just as correct.
_lock = threading.Lock()
_steps_under_way = 0


def is_worthwhile(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine answers a lone prompt faster this way."""
    has = torch.cpu.get_capabilities()
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and bool(has.get("avx512_bf16"))
        and not has.get("amx_bf16")
        and torch.backends.mkldnn.is_available()
    )


def speed_up_single_rows(model: PreTrainedModel) -> None:
    """Makes the model use torch's own routine for the steps of a lone response; all others stay the same."""
    forward = model.forward

    # Not with hooks: torch skips the ones after the step when a Ctrl-C interrupts it.
    @functools.wraps(forward)
    def forward_by_rows(*args: Any, **kwargs: Any) -> Any:
        with _without_onednn() if _is_single_row(kwargs) else contextlib.nullcontext():
            return forward(*args, **kwargs)

    model.forward = forward_by_rows


def _is_single_row(inputs: dict[str, Any]) -> bool:
    """Whether this is a step after the first: the first also reads the prompt, or an encoder's output."""
    ids = inputs.get("decoder_input_ids")
    ids = inputs.get("input_ids") if ids is None else ids
    cache = inputs.get("past_key_values")
    return ids is not None and ids.shape == (1, 1) and cache is not None and cache.get_seq_length() > 0


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    global _steps_under_way
    with _lock:
        if not (_steps_under_way or torch.backends.mkldnn.enabled):
            is_ours = False  # the user has switched it off
        else:
            is_ours = True
            _steps_under_way += 1
            torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        if is_ours:
            with _lock:
                _steps_under_way -= 1
                if not _steps_under_way:
                    torch.backends.mkldnn.enabled = True
