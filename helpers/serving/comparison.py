"""What a converted model answers, beside what its checkpoint answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.models import resolve
from helpers.serving.local_state_dict import fetch
from helpers.serving.model_loading import load_model
from helpers.state_dicts.manifest import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES_PER_PARAMETER = 4
HEADROOM = 1.2
"""Memory that a model takes in float32, against its weights alone."""


@dataclass(frozen=True)
class Comparison:
    """One prompt's two answers.

    Attributes:
        prompt: the text.
        source: the checkpoint's response.
        converted: the state dict's response.
        tokens: of the longer response.
        equal_tokens: how many are equal before the first difference; equal to `tokens` for equal responses.
    """

    prompt: str
    source: str
    converted: str
    tokens: int
    equal_tokens: int


def compare(
    model_name: str, state_dict_path: str, prompts: Sequence[str], max_new_tokens: int = 32
) -> list[Comparison]:
    """Asks a checkpoint and its state dict the same questions.

    Both answer greedily and compute in float32, so that what differs comes from the rounded weights alone.
    One model after the other is in memory.

    Args:
        model_name: what was converted.
        state_dict_path: a local path or `gs://BUCKET/NAME.pt`.
        prompts: one or more.
        max_new_tokens: of each response.

    Raises:
        MemoryError: a model in float32 is too large for this machine.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    from transformers import AutoTokenizer

    from helpers.state_dicts.checkpoint_keys import empty_model

    _check_memory(read_manifest(state_dict_path).parameters)
    folder = resolve(model_name)
    model_class = type(empty_model(folder))
    source = _answers(
        model_class.from_pretrained(folder, dtype=torch.float32), folder, prompts, max_new_tokens
    )
    local = fetch(state_dict_path)
    model, _ = load_model(local.file, local.folder, dtype=torch.float32)
    converted = _answers(model, local.folder, prompts, max_new_tokens)
    del model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        Comparison(
            prompt=prompt,
            source=tokenizer.decode(one, skip_special_tokens=True),
            converted=tokenizer.decode(other, skip_special_tokens=True),
            tokens=max(len(one), len(other)),
            equal_tokens=_common(one, other),
        )
        for prompt, one, other in zip(prompts, source, converted, strict=True)
    ]


def _answers(
    model: "PreTrainedModel", folder: str | Path, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.eval().generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
        start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        answers.append(output[0, start:].tolist())
    return answers


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _check_memory(parameters: int) -> None:
    needed = parameters * BYTES_PER_PARAMETER * HEADROOM
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: the system itself will tell
        return
    if needed > available:
        raise MemoryError(
            f"comparing takes {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available: "
            "compare on a larger machine, or a smaller model of the same family"
        )
