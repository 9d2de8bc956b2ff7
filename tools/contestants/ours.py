"""This project: ours.py STATE_DICT ENGINE DTYPE CACHE [recompute]

Prompts go the way that they go in a stream (batches by length, failures isolated, tokens to text), except
that they come as token ids.
"""

import sys

import torch
from contestant import BATCH, DEVICE, THREADS, answer_requests

from helpers.model_handler import AnsweringOptions
from helpers.model_handler.language_model import LanguageModel
from helpers.model_handler.served_model import ModelSource


class Encoded(LanguageModel):
    """Is asked with the numbers of prompts that have been encoded already, and notes their tokens."""

    def encode(self, prompt, options=None):
        return self.prompts[int(prompt)] if prompt.isdigit() else super().encode(prompt, options)

    def generate(self, prompts, options=None, *more):
        responses = super().generate(prompts, options, *more)
        for prompt, ids in zip(prompts, self.engine.last, strict=True):
            self.tokens[tuple(prompt)] = ids
        return responses


def load():
    state_dict, engine, dtype, cache = sys.argv[1:5]
    torch.set_num_threads(THREADS)
    loaded, _ = ModelSource(state_dict, engine=engine, dtype=dtype, device=DEVICE, cache_dir=cache).load()
    model = Encoded(loaded.engine, loaded.tokenizer)
    computed = model.engine.generate

    def noted(*arguments):
        responses = computed(*arguments)
        model.engine.last = [response.tokens for response in responses]
        return responses

    model.engine.generate = noted

    def generate(prompts, new_tokens):
        model.prompts, model.tokens = prompts, {}
        options = AnsweringOptions(
            max_response_tokens=new_tokens,
            max_batch_size=BATCH,
            max_batch_tokens=1024 * BATCH,
            recompute=sys.argv[5:] == ["recompute"],
        )
        answers = model.ask([str(number) for number in range(len(prompts))], options)
        assert all(hasattr(answer, "text") for answer in answers), answers
        return [model.tokens[tuple(prompt)] for prompt in prompts]

    return generate, {"dtype": model.engine.dtype}


answer_requests(load)
