"""Checks what a job is to put around prompts, before there is a job: with the state dict's tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path

from helpers.load_state_dict import read_manifest
from helpers.model_handler.encoding import Encoder
from helpers.model_handler.local_state_dict import fetch_companions
from helpers.model_handler.options import AnsweringOptions
from helpers.model_handler.prompts import CONVERSATION
from helpers.models.architecture import architecture_of, read_config, read_tokenizer


def check_around_prompts(state_dict_path: str, options: AnsweringOptions) -> bool:
    """Checks that the model can be asked as the options say; reads the state dict's companions if need be.

    Returns:
        Whether there was anything to check.

    Raises:
        PromptError: the system prompt and the template leave no room, or the model takes no conversations.
        FileNotFoundError, PermissionError, StorageError: the companions cannot be read.
        CompanionError, ModelError: they are damaged, or of no use.
    """
    if not (options.system_prompt or options.template or options.prompt_format == CONVERSATION):
        return False
    with tempfile.TemporaryDirectory() as folder:
        companions = Path(folder, "companions")
        fetch_companions(state_dict_path, read_manifest(state_dict_path), companions)
        config = architecture_of(read_config(companions)).config
        Encoder(read_tokenizer(companions), config, bool(config.is_encoder_decoder)).check(options)
    return True
