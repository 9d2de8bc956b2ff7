"""The command line: which machine a model needs, to convert it and to serve it.

python -m helpers.sizing google/flan-t5-xl google/flan-ul2
python -m helpers.sizing google/flan-t5-xl --method sample --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from helpers.models import ModelError
from helpers.models.dtypes import DTYPES
from helpers.sizing import MachineTypeError, SizingError, machine_types, size_model
from helpers.sizing.report import table
from helpers.sizing.sizes import (
    BATCH_SIZE,
    COMPUTE_BYTES,
    ENGINES,
    METHODS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
)


def _parse_prices(prices: Sequence[str] | None) -> float | dict[str, float] | None:
    """Prices per hour, each `PRICE` or `TYPE=PRICE`: one number, or a number for each machine type.

    Raises:
        MachineTypeError: no such machine type.
        SizingError: not a price.
    """
    if not prices:
        return None
    by_type = {}
    for text in prices:
        name, _, number = text.rpartition("=")
        try:
            by_type[machine_types.get(name).name if name else ""] = machine_types.cost(float(number))
        except MachineTypeError:
            raise
        except ValueError:
            raise SizingError(
                f"--price-per-hour {text}: give a number of at least 0, such as 0.1 or TYPE=0.1."
            ) from None
    if "" in by_type and len(prices) > 1:
        raise SizingError("--price-per-hour: give one price, or TYPE=PRICE for each machine type.")
    return by_type.get("", by_type)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a table or JSON on stdout.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood.
    """
    # What is not given is left to the defaults of size_model.
    parser = argparse.ArgumentParser(
        prog="python -m helpers.sizing",
        description="Which machine a model needs, to convert it and to serve it.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a hub name or a folder")
    parser.add_argument("--method", choices=METHODS, help="default: project")
    parser.add_argument("--dtype", choices=DTYPES, help="of the state dict; default: float16")
    parser.add_argument(
        "--engine", choices=ENGINES, help="what serves; default: torch, and ctranslate2 for int8"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=COMPUTE_BYTES,
        help="what it computes in; default: what the machines are fast in, and float32 with ctranslate2",
    )
    counts = (
        ("batch-size", f"prompts generated together; default: {BATCH_SIZE}"),
        ("prompt-tokens", f"tokens of the longest prompt; default: {PROMPT_TOKENS}"),
        ("response-tokens", f"tokens generated at most; default: {RESPONSE_TOKENS}"),
        ("processes", "worker processes on the machine; default: 1"),
    )
    for name, text in counts:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--family", help="machine family to serve on: n2, n4, c3, ... or a GPU family: g2, a2, a3"
    )
    parser.add_argument("--convert-family", help="of the machine to convert on; default: e2")
    parser.add_argument(
        "--headroom", type=float, metavar="SHARE", help="the share of a machine's memory to leave free"
    )
    parser.add_argument(
        "--price-per-hour",
        action="append",
        default=[],
        metavar="[TYPE=]PRICE",
        help="price of the serving machine, in your currency; repeat it if the models need several types",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON rather than a table")
    options = vars(parser.parse_args(arguments))
    models, as_json, prices = options.pop("models"), options.pop("json"), options.pop("price_per_hour")
    try:
        price = _parse_prices(prices)
        sizings = [size_model(model, price_per_hour=price, **options) for model in models]
        machines = {sizing.serve.machine.name for sizing in sizings}
        if isinstance(price, float) and len(machines) > 1:
            raise SizingError(
                f"One price was given, but these models need {', '.join(sorted(machines))}: "
                "give --price-per-hour TYPE=PRICE for each."
            )
    except (MachineTypeError, ModelError, SizingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps([sizing.to_json() for sizing in sizings], indent=2, ensure_ascii=False))
    else:
        print(table(sizings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
