"""The command line: predicted against measured memory, of converting and of serving.

python -m helpers.measuring google/flan-t5-small google/flan-t5-base
python -m helpers.measuring --overhead
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from helpers.measuring.memory import ENGINE_METHODS, METHODS, measure_models, measure_overhead
from helpers.measuring.process_memory import MeasureError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a line for each measurement, and all of them as JSON in the last line.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.measuring", description="Compares predicted with measured memory."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a hub name or a folder")
    parser.add_argument(
        "--method",
        action="append",
        choices=(*METHODS, *ENGINE_METHODS),
        help=f"default: {' and '.join(METHODS)}",
    )
    parser.add_argument("--overhead", action="store_true", help="measure the constants of helpers.sizing")
    options = parser.parse_args(arguments)
    if options.overhead == bool(options.models):
        parser.error("give models, or --overhead")
    try:
        if options.overhead:
            print(json.dumps(measure_overhead()))
            return 0
        rows = measure_models(options.models, methods=options.method or METHODS)
    except (MeasureError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(
            f"{row.model_name:22} {row.method:8} {row.phase:8} predicted {row.predicted / 1e6:8,.0f} MB  "
            f"measured {row.measured / 1e6:8,.0f} MB  {row.error:+6.1%}  {row.seconds:6.1f} s"
        )
    print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
