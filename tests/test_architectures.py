"""Every text architecture of transformers is served as plain transformers serves it, or refused by all
steps."""

import logging

import architectures
import pytest
import torch
import transformers
from architectures import TABLE, attempt, model_types, table

_outcomes = {}

# Each is of a kind of its own: how it is attended, positioned, tied, mixed, batched or named. The others are
# tried by `make test-all`, and here as well once the table is of another version of transformers.
NAMES = """
bart bert-generation blenderbot bloom codegen cohere deepseek_v3 encoder-decoder falcon gemma
gemma2 gemma3_text git gpt2 gpt_neox gptj granite jamba llama longt5 m2m_100 mamba marian mbart
mistral mixtral mpt mt5 olmo2 opt pegasus phi phi3 prophetnet qwen2 qwen3 recurrent_gemma rwkv
smollm3 stablelm t5 t5gemma trocr umt5 xlnet
"""
KINDS = frozenset(NAMES.split())
IS_CURRENT = f"transformers {transformers.__version__} registers" in TABLE.read_text()


@pytest.fixture(autouse=True, scope="module")
def one_quiet_thread():
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    architectures.quiet()
    logging.disable(logging.WARNING)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in KINDS or not IS_CURRENT else pytest.param(name, marks=pytest.mark.slow)
        for name in model_types()
    ],
)
def test_it_is_served_rightly_or_refused_by_all_steps(model_type, tmp_path):
    outcome = _outcomes[model_type] = attempt(model_type, tmp_path / "checkpoint")
    assert outcome.wrong == ""


def test_the_table_says_what_is_so():
    if _outcomes.keys() != set(model_types()):
        pytest.skip("only some were tried in this run")
    if not IS_CURRENT:
        pytest.skip("the table is of another version of transformers")
    print(table(_outcomes))
    assert table(_outcomes) == TABLE.read_text(), "run python tests/architectures.py"
    served = [one for one in _outcomes.values() if one.result == "served"]
    assert len(served) > 160
