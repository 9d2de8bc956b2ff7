"""transformers as its documentation shows it: plain_transformers.py CHECKPOINT DTYPE

Prompts in padded batches, in the order that they come in.
"""

import sys

import torch
import transformers
from contestant import BATCH, DEVICE, THREADS, answer_requests


def load():
    checkpoint, dtype = sys.argv[1:3]
    torch.set_num_threads(THREADS)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    kind = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    model = kind.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval().to(DEVICE)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    pad = model.generation_config.pad_token_id or 0

    def batch(prompts, new_tokens):
        longest = max(map(len, prompts))
        right = config.is_encoder_decoder
        rows = [
            prompt + [pad] * (longest - len(prompt)) if right else [pad] * (longest - len(prompt)) + prompt
            for prompt in prompts
        ]
        masks = [
            [1] * len(prompt) + [0] * (longest - len(prompt))
            if right
            else [0] * (longest - len(prompt)) + [1] * len(prompt)
            for prompt in prompts
        ]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(rows, device=DEVICE),
                attention_mask=torch.tensor(masks, device=DEVICE),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        for row in output[:, 1 if right else longest :].tolist():
            end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
            yield row[:end]

    def generate(prompts, new_tokens):
        return [
            row
            for first in range(0, len(prompts), BATCH)
            for row in batch(prompts[first : first + BATCH], new_tokens)
        ]

    return generate, {"dtype": dtype, "version": transformers.__version__}


answer_requests(load)
