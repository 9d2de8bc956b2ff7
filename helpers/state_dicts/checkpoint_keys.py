"""Which tensors of a checkpoint make up a model's state dict.

The names in a checkpoint are not always the model's: a base model's checkpoint lacks the head's prefix, old
ones use old names, and some architectures are stored in pieces that the model holds fused. transformers knows
these rules, and they are taken from it (`transformers.conversion_mapping`).

Shared tensors need care. transformers 5 wants T5's head tied to its embedding whatever the config says, yet
flan-t5's checkpoints hold two different tensors. Here the checkpoint decides: names whose tensors are equal
share one, names whose tensors differ keep their own, and a name that is absent shares its partner's.
"""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from helpers.state_dicts.checkpoint import Checkpoint, CheckpointError
from helpers.state_dicts.rounding import CHUNK


@dataclass
class Weight:
    """One tensor of a state dict.

    Attributes:
        names: the names it has there: more than one where the model shares it.
        spec: a tensor on the meta device with its shape, and its dtype in the checkpoint.
        load: reads it from the checkpoint.
    """

    names: list[str]
    spec: torch.Tensor
    load: Callable[[], torch.Tensor]


@dataclass
class StateDictPlan:
    """How a checkpoint becomes a state dict.

    Attributes:
        names: every name of the model's `state_dict()`, in its order.
        weights: its tensors, in the order in which they are best read.
        unused: names of tensors in the checkpoint that the model has no place for.
    """

    names: list[str]
    weights: list[Weight]
    unused: list[str] = field(default_factory=list)


def empty_model(folder: str | Path) -> PreTrainedModel:
    """The model of a checkpoint folder on the meta device: its structure without memory for its weights.

    Raises:
        CheckpointError: its config is of no text-to-text or text-generating model, or is quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None):
            raise CheckpointError(
                f"{folder} holds quantized weights: give the checkpoint that they were quantized from"
            )
        model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            return model_class.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder}/config.json is not the config of a model that turns text into text "
            f"({str(error).splitlines()[0][:200]}): use an encoder-decoder or causal language model"
        ) from error


def plan_state_dict(checkpoint: Checkpoint, model: PreTrainedModel) -> StateDictPlan:
    """Finds the tensor for every name in the model's state dict.

    Args:
        checkpoint: to read from.
        model: of `empty_model`.

    Raises:
        CheckpointError: tensors are missing, or have another shape than the model's.
    """
    expected = model.state_dict(keep_vars=True)
    sources, unused = _sources(checkpoint, model, expected)
    weights, missing, apart = [], [], _separate_head(checkpoint, model)
    for group in _tied_groups(model, expected):
        weights += _share(group, sources, apart, missing)
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} tensors of "
            f"{type(model).__name__}: {_some(missing)}. It is incomplete, or of another architecture than "
            "its config.json says: download it again"
        )
    for weight in weights:
        shape = expected[weight.names[0]].shape
        if weight.spec.shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {weight.names[0]} has shape {tuple(weight.spec.shape)}, but by "
                f"config.json {tuple(shape)}: they are of different models; download both again"
            )
    order = {name: position for position, name in enumerate(sources)}
    weights.sort(key=lambda weight: min(order.get(name, 0) for name in weight.names))
    return StateDictPlan(list(expected), weights, unused)


@dataclass
class _Source:
    spec: torch.Tensor
    load: Callable[[], torch.Tensor]


def _sources(
    checkpoint: Checkpoint, model: PreTrainedModel, expected: dict[str, torch.Tensor]
) -> tuple[dict[str, _Source], list[str]]:
    """For each name of the model that the checkpoint can fill: how. And the checkpoint's names left over."""
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    sources, unused, pieces = {}, [], {}
    for name in checkpoint:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            unused.append(name)
        elif pattern is None:
            sources[target] = _Source(checkpoint.spec(name), partial(checkpoint.__getitem__, name))
        else:
            pieces.setdefault(target, []).append((name, pattern))
    for target, parts in pieces.items():
        rule = next(rule for rule in converters if parts[0][1] in rule.source_patterns)
        sources |= _converted(checkpoint, model, rule, target, parts)
    ignored = model._keys_to_ignore_on_load_unexpected or []
    return sources, [name for name in unused if not _matches(name, ignored)]


def _converted(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    rule: WeightConverter,
    target: str,
    parts: list[tuple[str, str]],
) -> dict[str, _Source]:
    """The tensors that `rule` makes of several of the checkpoint's, such as a layer's experts in one."""

    def convert(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        own = deepcopy(rule)
        for name, pattern in parts:
            own.add_tensor(target, name, pattern, partial(read, name))
        made = own.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return {
        name: _Source(spec, lambda name=name: convert(checkpoint.__getitem__)[name])
        for name, spec in convert(checkpoint.spec).items()
    }


def _tied_groups(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> list[list[str]]:
    """The model's names, those that it may share together, the one that the others are tied to first."""
    tied_to = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups: dict[str, list[str]] = {}
    first_name_of: dict[int, str] = {}
    for name, tensor in expected.items():
        first = first_name_of.setdefault(id(tensor), name)
        groups.setdefault(tied_to.get(name, tied_to.get(first, first)), []).append(name)
    return [sorted(names, key=lambda name: name != head) for head, names in groups.items()]


def _share(
    group: list[str], sources: dict[str, _Source], apart: set[str], missing: list[str]
) -> list[Weight]:
    """The tensors of one group of names: one, or more where the checkpoint holds different ones."""
    weights: list[Weight] = []
    for name in group:
        if name not in sources:
            continue
        source = sources[name]
        for weight in weights:
            if _equal(weight, source):
                weight.names.append(name)
                break
        else:
            weights.append(Weight([name], source.spec, source.load))
    for name in group:
        if name in sources:
            continue
        if weights and name not in apart:
            weights[0].names.append(name)
        else:
            missing.append(name)
    return weights


def _equal(weight: Weight, source: _Source) -> bool:
    if weight.spec.shape != source.spec.shape or weight.spec.dtype != source.spec.dtype:
        return False
    one, other = weight.load(), source.load()
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    # In chunks: comparing two mapped tensors at once would make a third of their size.
    chunks = zip(one.reshape(-1).split(CHUNK), other.reshape(-1).split(CHUNK), strict=True)
    return same or all(torch.equal(a, b) for a, b in chunks)


def _separate_head(checkpoint: Checkpoint, model: PreTrainedModel) -> set[str]:
    """The name of the output head where the checkpoint's own config says that it is not tied.

    transformers 5 ties it all the same for T5. With a head missing from the file, the model would then answer
    with its embedding for a head: quietly, and wrongly.
    """
    config = json.loads((checkpoint.folder / "config.json").read_text())
    head = model.get_output_embeddings()
    if config.get("tie_word_embeddings", True) or head is None:
        return set()
    return {name for name, module in model.named_modules() if module is head for name in [f"{name}.weight"]}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
