"""Compares a converted model's answers with its checkpoint's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.load_state_dict import read_manifest
from helpers.load_state_dict.mapped_model import load_model
from helpers.model_handler.local_state_dict import fetch
from helpers.models import architecture_of, resolve
from helpers.models.architecture import read_config, read_tokenizer
from helpers.sizing.this_machine import available_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES_PER_PARAMETER = 4
HEADROOM = 1.2
"""The memory of a model in float32, relative to its weights alone."""


@dataclass(frozen=True)
class Comparison:
    """One prompt's two answers.

    Attributes:
        prompt: the text.
        source: the checkpoint's response.
        converted: the state dict's response.
        tokens: the number of tokens in the longer response.
        equal_tokens: how many agree before the first difference; `tokens` if the responses are equal.
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

    Both answer greedily and compute in float32, so that any difference comes from the rounded weights
    alone. Only one model is in memory at a time.

    Args:
        model_name: the model that was converted.
        state_dict_path: a local path or `gs://BUCKET/NAME.pt`.
        prompts: one or more.
        max_new_tokens: the most tokens in each response.

    Raises:
        MemoryError: a model in float32 is too large for this machine.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    _check_memory(read_manifest(state_dict_path).parameters)
    folder = resolve(model_name)
    model_class = architecture_of(read_config(folder)).model_class
    source = _answers(
        model_class.from_pretrained(folder, dtype=torch.float32), folder, prompts, max_new_tokens
    )
    local = fetch(state_dict_path)
    model, _ = load_model(local.file, local.folder, dtype=torch.float32)
    converted = _answers(model, local.folder, prompts, max_new_tokens)
    del model
    tokenizer = read_tokenizer(folder)
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
    tokenizer = read_tokenizer(folder)
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
    needed, available = parameters * BYTES_PER_PARAMETER * HEADROOM, available_memory_bytes()
    if needed > available:
        raise MemoryError(
            f"comparing takes {needed / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are available: "
            "compare on a larger machine, or a smaller model of the same family"
        )
