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
from collections.abc import Callable, Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from helpers.load_state_dict.checkpoint import Checkpoint, CheckpointError
from helpers.load_state_dict.rounding import CHUNK
from helpers.models.architecture import head_is_separate
from helpers.models.checkpoint_files import MERGE
from helpers.models.dtypes import dtype_name
from helpers.models.error_text import some


@dataclass
class Weight:
    """One tensor of a state dict.

    Attributes:
        names: its names in the state dict: more than one where the model shares it.
        spec: a tensor on the meta device with its shape, and its dtype in the checkpoint.
        load: reads it from the checkpoint.
        is_buffer: whether the model computes with it without its having been trained.
    """

    names: list[str]
    spec: torch.Tensor
    load: Callable[[], torch.Tensor]
    is_buffer: bool = False


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
    refuse_leftovers(checkpoint, unused)
    weights, missing, apart = [], [], _separate_head(checkpoint, model)
    for group in _tied_groups(model, expected):
        weights += _share(group, sources, apart, missing)
    may_be_missing = model._keys_to_ignore_on_load_missing or []
    for name in [name for name in missing if _matches(name, may_be_missing)]:
        if (tensor := computed_tensor(model, name)) is not None:
            missing.remove(name)
            weights.append(Weight([name], tensor.to("meta"), partial(_itself, tensor)))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} tensors of "
            f"{type(model).__name__}: {some(missing, 5)}. It is incomplete, or not of the architecture that "
            "its config.json names: download it again"
        )
    buffers = {name for name, _ in model.named_buffers()}
    for weight in weights:
        own = expected[weight.names[0]]
        weight.is_buffer = not buffers.isdisjoint(weight.names)
        if own.is_floating_point() and not weight.spec.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.folder}: {weight.names[0]} holds {dtype_name(weight.spec.dtype)}. {QUANTIZED}"
            )
        if weight.spec.shape != own.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {weight.names[0]} has shape {tuple(weight.spec.shape)}, but "
                f"config.json says {tuple(own.shape)}: they are from different models; download both again"
            )
    position = {name: source.position for name, source in sources.items()}
    weights.sort(key=lambda weight: min(position.get(name, 0) for name in weight.names))
    return StateDictPlan(list(expected), weights, unused)


QUANTIZED = (
    "The weights are quantized, whatever config.json says: give the model that they were quantized from, in "
    "float32, bfloat16 or float16"
)

# The names of what stands beside quantized weights, by the libraries that write them: float8 (DeepSeek,
# compressed-tensors, fbgemm), GPTQ and AWQ, bitsandbytes, AQLM, MXFP4, torchao.
_QUANTIZATION = re.compile(
    r"(weight_scale\w*|_scale_inv|_scale_ub|(^|\.)(input_scale\w*|output_scale|[kv]_scale|zero_points?|scales"
    r"|qweight|qzeros|g_idx|SCB|weight_format|codebooks|codes|weight_packed|weight_shape)|weight_zero_point"
    r"|absmax|quant_map|quant_state\.\w+|_blocks|_scales|:qdata|:scale|:zero_point)$"
)
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_l|oft_r|boft_\w+|hada_\w+)(\.|$)")


def refuse_leftovers(checkpoint: Checkpoint, unused: Sequence[str]) -> None:
    """Refuses tensors that the model has no place for, if its weights mean nothing without them.

    Raises:
        CheckpointError: they are of an adapter, or of a quantized model.
    """
    if adapters := [name for name in unused if _ADAPTER.search(name)]:
        raise CheckpointError(
            f"{checkpoint.folder} holds the tensors of an adapter that is not merged into its model, such as "
            f"{adapters[0]}: {MERGE}"
        )
    if scales := [name for name in unused if _QUANTIZATION.search(name)]:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(scales)} tensors beside its weights, such as {scales[0]}. "
            f"{QUANTIZED}"
        )


def computed_tensor(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """A tensor that checkpoints may lack because the model computes it, as sinusoidal positions or zeros.

    It is what the model's own initialization makes; None where that is random, or leaves it as it was.

    Args:
        model: on the meta device.
        name: of the tensor.
    """
    path, _, own = name.rpartition(".")
    made = []
    for seed in (0, 1):
        shell = copy(model.get_submodule(path))
        # Without its children, whose memory is not needed.
        shell._modules = {}
        for kind in ("_parameters", "_buffers"):
            tensors = {
                key: None if value is None else torch.full(value.shape, torch.nan, dtype=value.dtype)
                for key, value in getattr(shell, kind).items()
                if value is None or value.is_floating_point()
            }
            if kind == "_parameters":
                tensors = {
                    key: None if value is None else torch.nn.Parameter(value, requires_grad=False)
                    for key, value in tensors.items()
                }
            setattr(shell, kind, tensors)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            try:
                model._init_weights(shell)
            except (AttributeError, TypeError):  # it reaches for a child
                return None
        made.append(getattr(shell, own, None))
    first, second = made
    is_computed = first is not None and not first.isnan().any() and torch.equal(first, second)
    return first.detach() if is_computed else None


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class _Source:
    """A tensor that the checkpoint has; `position` is where, so that a file is read from start to end."""

    spec: torch.Tensor
    load: Callable[[], torch.Tensor]
    position: int


def _sources(
    checkpoint: Checkpoint, model: PreTrainedModel, expected: dict[str, torch.Tensor]
) -> tuple[dict[str, _Source], list[str]]:
    """How to fill each name of the model that the checkpoint can fill; and the checkpoint's unused names."""
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    sources, unused, pieces = {}, [], {}
    place = {name: number for number, name in enumerate(checkpoint)}
    # In the order in which transformers takes them, which decides on the order of a layer's experts. The
    # order of a file is another: in it, the eleventh expert comes after the second.
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            unused.append(name)
        elif pattern is None:
            load = partial(checkpoint.__getitem__, name)
            sources[target] = _Source(checkpoint.spec(name), load, place[name])
        else:
            pieces.setdefault(target, []).append((name, pattern))
    for target, parts in pieces.items():
        first = min(place[name] for name, _ in parts)
        for made, (spec, load) in _converted(checkpoint, model, rule_of[parts[0][1]], target, parts).items():
            sources[made] = _Source(spec, load, first)
    # Buffers that models used to save, and that transformers leaves out in silence too.
    ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"}
    return sources, [name for name in unused if not _matches(name, ignored)]


def _converted(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    rule: WeightConverter,
    target: str,
    parts: list[tuple[str, str]],
) -> dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]]:
    """The tensors that `rule` makes from several of the checkpoint's, such as a layer's experts in one."""

    def convert(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        own = deepcopy(rule)
        for name, pattern in parts:
            own.add_tensor(target, name, pattern, partial(read, name))
        made = own.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return {
        name: (spec, lambda name=name: convert(checkpoint.__getitem__)[name])
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


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
