"""CTranslate2 alone, with its own batching: plain_ctranslate2.py ENGINE_FOLDER DTYPE END_TOKEN..."""

import json
import sys
from pathlib import Path

import ctranslate2
from contestant import BATCH, DEVICE, THREADS, answer_requests


def load():
    folder, dtype, ends = sys.argv[1], sys.argv[2], [int(end) for end in sys.argv[3:]]
    kind = "int8_float32" if dtype == "int8" else dtype
    is_encoder_decoder = "decoder_start_token" in json.loads(Path(folder, "config.json").read_text())
    engine = (ctranslate2.Translator if is_encoder_decoder else ctranslate2.Generator)(
        folder, device=DEVICE, compute_type=kind, intra_threads=THREADS
    )
    shared = {"beam_size": 1, "end_token": ends, "return_end_token": True, "max_batch_size": BATCH}

    def generate(prompts, new_tokens):
        texts = [[str(token) for token in prompt] for prompt in prompts]
        if is_encoder_decoder:
            results = engine.translate_batch(
                texts, max_decoding_length=new_tokens, max_input_length=0, min_decoding_length=0, **shared
            )
            return [[int(token) for token in result.hypotheses[0]] for result in results]
        results = engine.generate_batch(
            texts, max_length=new_tokens, include_prompt_in_result=False, **shared
        )
        return [result.sequences_ids[0] for result in results]

    return generate, {"dtype": dtype, "version": ctranslate2.__version__}


answer_requests(load)
