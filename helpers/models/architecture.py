"""The architecture of a model: which class of transformers generates text for its config, and how it is
built.

One rule for all steps: sizing, converting and serving accept the same models, and refuse the others with the
same words.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.models.error_text import first_line
from helpers.models.model_error import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OTHER_HEADS = re.compile(r"Classif|Reward|Regression|ValueHead|QuestionAnswering|MultipleChoice|Embedding")
"""In the name of a class, what says that its output layer is no language model's."""

ADVICE = "use a causal (Llama, Qwen, ...) or an encoder-decoder (T5, BART, ...) language model"


@dataclass(frozen=True)
class Architecture:
    """How the model of a config is built.

    Attributes:
        model_class: the class of transformers that generates text.
        config: what the class is built from. For a text model inside a wrapper that also takes images or
            sound, that is the config of the text model.
        is_encoder_decoder: whether an encoder reads the prompt; otherwise the model is causal.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    is_encoder_decoder: bool

    def empty_model(self) -> PreTrainedModel:
        """The model on the meta device: its structure, without memory for its weights.

        Raises:
            ModelError: transformers cannot build the class from this config.
        """
        import torch

        try:
            with torch.device("meta"):
                return self.model_class(self.config)
        except Exception as error:  # configs with values that do not fit together raise every kind
            raise ModelError(
                f"transformers cannot build {self.model_class.__name__} from this config "
                f"({first_line(error)}): check config.json"
            ) from error


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder, or of a state dict's companion folder. No code of the model's is
    run.

    Raises:
        ModelError: there is no config.json, or it is not one that transformers knows.
    """
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    if uses_own_code(folder):
        raise ModelError(
            f"{folder} holds a model whose code comes with it (auto_map in config.json). Such code is never "
            f"run here: {ADVICE} that transformers itself knows"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder}/config.json is not the config of a model that transformers knows "
            f"({first_line(error)}): {ADVICE}"
        ) from error


def uses_own_code(folder: str | Path) -> bool:
    """Whether the model of a folder is of a kind that transformers knows only by code that came with it."""
    from transformers import CONFIG_MAPPING

    try:
        written = json.loads((Path(folder) / "config.json").read_text())
        return "auto_map" in written and written.get("model_type") not in CONFIG_MAPPING
    except (OSError, ValueError, TypeError):
        return False


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, or of a state dict's companion folder. No code of its own is
    run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The class that generates text for a config, and the config to build it from.

    Raises:
        ModelError: an encoder, a classifier or reward model, a vision or audio model, or otherwise not one
            that turns text into text; or the checkpoint is quantized.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    kind, name = type(config), config.model_type
    if getattr(config, "quantization_config", None) or getattr(
        _text_config(config), "quantization_config", None
    ):
        raise ModelError(
            f"This {name!r} checkpoint is quantized: give the model that it was quantized from, whose "
            "weights are in float32, bfloat16 or float16"
        )
    if others := [one for one in getattr(config, "architectures", None) or () if OTHER_HEADS.search(one)]:
        raise ModelError(
            f"This {name!r} checkpoint is of a {others[0]}, whose output layer scores texts and writes none: "
            f"{ADVICE}"
        )
    is_encoder_decoder = bool(config.is_encoder_decoder)
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in mapping:
        raise ModelError(f"{name!r} models do not generate text from text: {ADVICE}")
    # BERT and its like have a causal class too, for use as a decoder. Published ones are encoders.
    if (
        not is_encoder_decoder
        and kind in MODEL_FOR_MASKED_LM_MAPPING
        and not getattr(config, "is_decoder", False)
    ):
        raise ModelError(f"{name!r} models are encoders, which do not generate text: {ADVICE}")
    model_class = mapping[kind]
    # As transformers' own Auto classes do: the text model of a wrapper is built from the wrapper's text
    # config.
    if model_class.config_class is not kind and model_class.config_class is config.sub_configs.get(
        "text_config"
    ):
        config = _text_config(config)
    if model_class.main_input_name != "input_ids":
        raise ModelError(f"{name!r} models take {model_class.main_input_name}, not text: {ADVICE}")
    return Architecture(model_class, config, is_encoder_decoder)


def positions_of(config: PretrainedConfig) -> int | None:
    """How many positions the part of a model that reads the prompt has; None where it has no such limit.

    YaRN, dynamic and linear RoPE scaling multiply what the config names by a factor. LongRoPE's and Llama 3's
    configs name the number that they lead to, and so do those with settings for each kind of layer.
    """
    reader = config
    for name in ("encoder", "text_config"):
        nested = getattr(reader, name, None)
        reader = nested if hasattr(nested, "model_type") else reader
    positions = _positions(reader, "max_encoder_position_embeddings", "max_position_embeddings")
    rope = getattr(reader, "rope_parameters", None) or {}
    if positions and rope.get("rope_type") in ("yarn", "dynamic", "linear"):
        scaled = (rope.get("original_max_position_embeddings") or positions) * (rope.get("factor") or 1)
        return max(positions, int(scaled))
    return positions


def response_positions_of(config: PretrainedConfig) -> int | None:
    """How many positions a decoder has for its response alone; None where it has no such limit."""
    if not config.is_encoder_decoder:
        return None
    writer = getattr(config, "decoder", None)
    writer = writer if hasattr(writer, "model_type") else config
    return _positions(writer, "max_decoder_position_embeddings", "max_position_embeddings")


def _positions(config: PretrainedConfig, *names: str) -> int | None:
    for name in names:
        try:
            value = getattr(config, name, None)
        except NotImplementedError:  # a model without a limit may say so in this way
            value = None
        if isinstance(value, int) and value > 0:  # some say -1 for no limit
            return value
    return None


def head_is_separate(config: PretrainedConfig, as_written: dict[str, Any] | None = None) -> bool:
    """Whether a model's published output layer is a tensor of its own rather than the input embeddings.

    transformers 5 ties the head of every T5 to its embeddings, whatever the config file says, yet T5 1.1 and
    its descendants (flan-t5, flan-ul2, mT5) were published with a head of their own. For T5 the file's
    `tie_word_embeddings: false` lives on in the config object as `scale_decoder_outputs=False`. mT5 and umT5
    were published with a separate head only, and keep no trace of the flag. LongT5 was published with the
    same flag as T5 1.1, and with one tensor for both.

    Args:
        config: the model's.
        as_written: the values of its config.json, where they are at hand: they tell without a guess.
    """
    if config.model_type == "longt5":
        return False
    if as_written is not None:
        return as_written.get("tie_word_embeddings", True) is False
    if config.model_type == "t5":
        return not config.scale_decoder_outputs
    if config.model_type in ("mt5", "umt5"):
        return True
    return not getattr(config, "tie_word_embeddings", True)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config() if "text_config" in config.sub_configs else config
