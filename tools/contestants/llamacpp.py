"""llama.cpp: llamacpp.py MODEL.gguf. All prompts that are given at once are sequences of one batch."""

import ctypes
import sys

import llama_cpp as lc
import numpy as np
from contestant import THREADS, answer_requests

MOST = 32  # sequences at a time, as many as the others have in a batch
ROOM = 256  # a sequence's cache is a multiple of this many tokens


def load():
    quiet = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(quiet, None)
    parameters = lc.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = lc.llama_model_load_from_file(sys.argv[1].encode(), parameters)
    vocabulary = lc.llama_model_get_vocab(model)
    width = lc.llama_vocab_n_tokens(vocabulary)
    name = ctypes.create_string_buffer(256)
    lc.llama_model_desc(model, name, len(name))

    def decode(context, rows):
        """One step; rows are (token, position, sequence, whether its next token is wanted)."""
        batch = lc.llama_batch_init(len(rows), 0, 1)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.n_tokens = len(rows)
        if lc.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = {row[2]: lc.llama_get_logits_ith(context, place) for place, row in enumerate(rows) if row[3]}
        lc.llama_batch_free(batch)
        return {
            sequence: int(np.ctypeslib.as_array(row, (width,)).argmax()) for sequence, row in logits.items()
        }

    def together(prompts, new_tokens):
        settings = lc.llama_context_default_params()
        room = -(-(max(map(len, prompts)) + new_tokens) // ROOM) * ROOM
        settings.n_seq_max = len(prompts)
        settings.n_ctx = settings.n_batch = len(prompts) * room
        settings.n_threads = settings.n_threads_batch = THREADS
        context = lc.llama_init_from_model(model, settings)
        rows = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        tokens = [[] for _ in prompts]
        while rows:
            chosen = decode(context, rows)
            for sequence, token in chosen.items():
                tokens[sequence].append(token)
            rows = [
                (token, len(prompts[one]) + len(tokens[one]) - 1, one, True)
                for one, token in chosen.items()
                if len(tokens[one]) < new_tokens and not lc.llama_vocab_is_eog(vocabulary, token)
            ]
        lc.llama_free(context)
        return tokens

    def generate(prompts, new_tokens):
        ordered = sorted(range(len(prompts)), key=lambda one: len(prompts[one]))
        found = {}
        for first in range(0, len(ordered), MOST):
            part = ordered[first : first + MOST]
            found |= zip(part, together([prompts[one] for one in part], new_tokens), strict=True)
        return [found[one] for one in range(len(prompts))]

    generate.kept = quiet  # the library calls it for as long as there is a model
    return generate, {"dtype": name.value.decode().rpartition(" ")[2], "version": lc.__version__}


answer_requests(load)
