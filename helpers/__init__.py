"""Streaming LLM inference with Apache Beam and Dataflow: from a model's name to a running job."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

# Read by OpenMP when torch is first imported. Its threads wait for one another some hundred times a token, by
# spinning 300,000 times before they sleep: where anything else computes, each wait takes milliseconds.
# Measured on 2 cores of an AMD EPYC with AVX2 only, in float32, for a lone prompt beside one busy loop: 6
# tokens a second, not 4, with torch, and 5, not 2.5 (with 30,000), with CTranslate2. On idle cores nothing is
# lost, as it is with 2,000: a fifth of the rate of 8 prompts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def public(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], object]]:
    """What a step's package shows to its users, imported when it is first asked for (PEP 562).

    A command line's `--help`, or the small process that guards a job, must not wait for torch and Beam.

    Args:
        package: its `__name__`.
        homes: by module of the package, the public names that it defines.

    Returns:
        The package's `__all__` and `__getattr__`.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return sorted(home_of), find
