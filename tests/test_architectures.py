"""Every text architecture of transformers is served as plain transformers serves it, or refused by all
steps."""

import logging

import architectures
import pytest
import torch
import transformers
from architectures import TABLE, attempt, model_types, table

_outcomes = {}


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


@pytest.mark.parametrize("model_type", model_types())
def test_it_is_served_rightly_or_refused_by_all_steps(model_type, tmp_path):
    outcome = _outcomes[model_type] = attempt(model_type, tmp_path / "checkpoint")
    assert outcome.wrong == ""


def test_the_table_says_what_is_so():
    if _outcomes.keys() != set(model_types()):
        pytest.skip("only some were tried in this run")
    if f"transformers {transformers.__version__} registers" not in TABLE.read_text():
        pytest.skip("the table is of another version of transformers")
    print(table(_outcomes))
    assert table(_outcomes) == TABLE.read_text(), "run python tests/architectures.py"
    served = [one for one in _outcomes.values() if one.result == "served"]
    assert len(served) > 160
