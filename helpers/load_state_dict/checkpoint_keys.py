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

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from helpers.load_state_dict.checkpoint import Checkpoint, CheckpointError
from helpers.load_state_dict.rounding import CHUNK
from helpers.models.architecture import head_is_separate


@dataclass
class Weight:
    """One tensor of a state dict.

    Attributes:
        names: its names in the state dict: more than one where the model shares it.
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


def plan_state_dict(checkpoint: Checkpoint, model: PreTrainedModel) -> StateDictPlan:
    """Finds the tensor for every name in the model's state dict.

    Args:
        checkpoint: to read from.
        model: on the meta device, as `Architecture.empty_model` builds it.

    Raises:
        CheckpointError: tensors are missing, or differ in shape from the model's.
    """
    expected = model.state_dict(keep_vars=True)
    sources, unused = _sources(checkpoint, model, expected)
    weights, missing, apart = [], [], _separate_head(checkpoint, model)
    for group in _tied_groups(model, expected):
        weights += _share(group, sources, apart, missing)
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} tensors of "
            f"{type(model).__name__}: {_some(missing)}. It is incomplete, or not of the architecture that "
            "its config.json names: download it again"
        )
    for weight in weights:
        shape = expected[weight.names[0]].shape
        if weight.spec.shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {weight.names[0]} has shape {tuple(weight.spec.shape)}, but "
                f"config.json says {tuple(shape)}: they are from different models; download both again"
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
    """How to fill each name of the model that the checkpoint can fill; and the checkpoint's unused names."""
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
    """The tensors that `rule` makes from several of the checkpoint's, such as a layer's experts in one."""

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
    """The model's names, grouped by what may share a tensor; the one the others are tied to comes first."""
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
    # In chunks: comparing two whole mapped tensors would make a third tensor of their size.
    chunks = zip(one.reshape(-1).split(CHUNK), other.reshape(-1).split(CHUNK), strict=True)
    return same or all(torch.equal(a, b) for a, b in chunks)


def _separate_head(checkpoint: Checkpoint, model: PreTrainedModel) -> set[str]:
    """The name of the output head where the checkpoint's own config says that it is not tied.

    transformers 5 ties it anyway for T5. If the file lacked the head, the model would then use its embedding
    as the head: silently, and wrongly.
    """
    as_written = json.loads((checkpoint.folder / "config.json").read_text())
    head = model.get_output_embeddings()
    if head is None or not head_is_separate(model.config, as_written):
        return set()
    return {name for name, module in model.named_modules() if module is head for name in [f"{name}.weight"]}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
