"""What rounding a model's weights costs: how many of its answers change, on prompts of real kinds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.load_state_dict import LoadError
from helpers.load_state_dict.engine_file import EngineError
from helpers.model_handler import AnsweringOptions
from helpers.model_handler.answers import batches_by_length
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.served_model import ModelSource

PROMPTS: dict[str, list[str]] = json.loads(Path(__file__).with_name("prompts.json").read_text())
"""Prompts by kind: facts, arithmetic, rewriting, lists, languages."""


@dataclass(frozen=True)
class RoundingLoss:
    """How the greedy answers in a dtype differ from those in float32.

    Attributes:
        engine: what computed.
        dtype: in what.
        prompts: how many were asked.
        changed: how many answers differ.
        equal_tokens: the share of tokens before the first difference, 0 to 1.
        changes: each prompt whose answer differs, with the answer in float32 and the one in `dtype`.
    """

    engine: str
    dtype: str
    prompts: int
    changed: int
    equal_tokens: float
    changes: list[tuple[str, str, str]]


def rounding_loss(
    state_dict_path: str,
    dtypes: Sequence[str | None] = ("int8",),
    prompts: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 24,
    cache_dir: str | None = None,
) -> list[RoundingLoss]:
    """Asks a model the same in float32 and in other dtypes. One at a time is in memory.

    Args:
        state_dict_path: `.../NAME.pt`, local or `gs://`.
        dtypes: what to compare; None is what this machine computes in unless told otherwise. What cannot be
            used with this model, or here, is named and left out.
        prompts: by default 60 of five kinds, `PROMPTS`.
        max_new_tokens: the most in each answer.
        cache_dir: see `LanguageModelHandler`.

    Raises:
        LoadError: the state dict is damaged.
        FileNotFoundError, PermissionError, StorageError: the state dict cannot be read.
    """
    asked = [prompt for kind in PROMPTS.values() for prompt in kind] if prompts is None else list(prompts)
    options = AnsweringOptions(max_response_tokens=max_new_tokens)

    def answers(dtype: str | None) -> tuple[LanguageModel, list[list[int]]]:
        model, _ = ModelSource(state_dict_path, dtype=dtype, cache_dir=cache_dir).load()
        return model, _tokens(model, asked, options)

    model, exact = answers("float32")
    exact_texts = _texts(model, exact)
    del model
    losses = []
    for dtype in dtypes:
        try:
            model, rounded = answers(dtype)
        except (EngineError, LoadError) as error:
            print(f"Not compared: {error}")
            continue
        texts = _texts(model, rounded)
        pairs = list(zip(exact, rounded, strict=True))
        losses.append(
            RoundingLoss(
                engine=model.engine.name,
                dtype=model.engine.dtype,
                prompts=len(asked),
                changed=sum(one != other for one, other in pairs),
                equal_tokens=sum(_common(*pair) for pair in pairs)
                / max(1, sum(max(map(len, pair)) for pair in pairs)),
                changes=[
                    (prompt, exact_text, text)
                    for prompt, exact_text, text, (one, other) in zip(
                        asked, exact_texts, texts, pairs, strict=True
                    )
                    if one != other
                ],
            )
        )
        del model
    return losses


def _tokens(model: LanguageModel, prompts: Sequence[str], options: AnsweringOptions) -> list[list[int]]:
    encoded = [model.encode(prompt, options) for prompt in prompts]
    found: dict[int, list[int]] = {}
    lengths = {index: len(ids) for index, ids in enumerate(encoded)}
    for batch in batches_by_length(lengths, options.max_batch_size, options.max_batch_tokens):
        responses = model.engine.generate([encoded[index] for index in batch], options)
        found |= zip(batch, (response.tokens for response in responses), strict=True)
    return [found[index] for index in range(len(prompts))]


def _texts(model: LanguageModel, responses: list[list[int]]) -> list[str]:
    return [text.strip() for text in model.tokenizer.batch_decode(responses, skip_special_tokens=True)]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
