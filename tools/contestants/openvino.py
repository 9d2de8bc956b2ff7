"""OpenVINO GenAI: openvino.py MODEL.gguf f32|bf16, with its own continuous batching."""

import importlib
import sys

import numpy as np

sys.path.append(sys.path.pop(0))  # this file has the package's name
ov = importlib.import_module("openvino")
genai = importlib.import_module("openvino_genai")
from contestant import THREADS, answer_requests  # noqa: E402


def load():
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = 32
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = False  # else a prompt of an earlier round is not computed again
    settings = {
        "INFERENCE_PRECISION_HINT": sys.argv[2],
        "KV_CACHE_PRECISION": sys.argv[2],
        "INFERENCE_NUM_THREADS": THREADS,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", settings)
    end = pipeline.get_tokenizer().get_eos_token_id()

    def generate(prompts, new_tokens):
        config = genai.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, apply_chat_template=False)
        config.eos_token_id, config.stop_token_ids = end, {end}
        tensors = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(tensors))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate, {"dtype": {"f32": "float32", "bf16": "bfloat16"}[sys.argv[2]], "version": ov.__version__}


answer_requests(load)
