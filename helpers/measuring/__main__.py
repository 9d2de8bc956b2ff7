"""The command line: predicted against measured memory, of converting and of serving; and answers against
expected ones.

python -m helpers.measuring google/flan-t5-small google/flan-t5-base
python -m helpers.measuring --overhead
python -m helpers.measuring evaluate --state-dict-path NEW.pt --cases cases.jsonl --against OLD.pt
python -m helpers.measuring load --project P --rate 5 --seconds 60 "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from helpers.measuring.memory import ENGINE_METHODS, METHODS, measure_models, measure_overhead
from helpers.measuring.process_memory import MeasureError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a line for each measurement, and all of them as JSON in the last line.

    Exit codes: 0; 1 for what went wrong, with a line on stderr, or for too few right answers; 2 for a command
    line that is not understood.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["evaluate"]:
        return _evaluate(arguments[1:])
    if arguments[:1] == ["load"]:
        return _load(arguments[1:])
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


def _evaluate(arguments: list[str]) -> int:
    from helpers.load_state_dict.engine_file import EngineError
    from helpers.measuring.evaluation import evaluate
    from helpers.model_handler.options import NAMES, add_arguments
    from helpers.models import ModelError

    parser = argparse.ArgumentParser(
        prog="python -m helpers.measuring evaluate",
        description="Judges a state dict's answers to prompts, before it takes another's place.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--state-dict-path", required=True, help=".../NAME.pt, local or gs://")
    parser.add_argument(
        "--cases",
        required=True,
        help='a file with a case on each line, as JSON: {"prompt": ..., "contains": ...}, or exact, pattern, '
        "field in the place of contains",
    )
    parser.add_argument("--against", default=None, help="the state dict that serves now")
    parser.add_argument(
        "--at-least", type=_share, default=0.0, metavar="SHARE", help="the least share right, 0 to 1"
    )
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    add_arguments(parser.add_argument_group("answering"))
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in NAMES if hasattr(given, name)}
    try:
        found = evaluate(given.state_dict_path, given.cases, against=given.against, **options)
    except (EngineError, ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    right = sum(not one.wrong for one in found.outcomes)
    if given.json:
        lists = {
            name: [asdict(one) for one in getattr(found, name)] for name in ("changed", "lost", "gained")
        }
        print(json.dumps(asdict(found) | {"right": found.right} | lists, ensure_ascii=False))
    else:
        for one in found.outcomes:
            mark = "right" if not one.wrong else "WRONG"
            print(f"{mark}  {one.prompt!r:.60}  {one.answer!r:.80}  {one.wrong:.80}".rstrip())
        counts = f", {len(found.changed)} changed, {len(found.lost)} lost, {len(found.gained)} gained"
        print(f"{right} of {len(found.outcomes)} right{counts if given.against else ''}")
    if found.right < given.at_least:
        wanted = math.ceil(round(given.at_least * len(found.outcomes), 9))
        print(f"error: {right} of {len(found.outcomes)} right, and {wanted} are wanted", file=sys.stderr)
        return 1
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give a number from 0 to 1")
    return value


def _load(arguments: list[str]) -> int:
    import uuid

    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError

    from helpers import pubsub
    from helpers.measuring.streaming import Phase, SendingError, poisson_arrivals, send_load

    parser = argparse.ArgumentParser(
        prog="python -m helpers.measuring load",
        description="Publishes prompts to a running job at a mean rate, whatever the job does, and says how "
        "late the responses are. The last line is JSON.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="taken in turn")
    parser.add_argument("--project", required=True)
    parser.add_argument("--rate", type=float, required=True, help="messages a second")
    parser.add_argument("--seconds", type=float, required=True, help="how long to send")
    parser.add_argument("--wait-seconds", type=float, default=120, help="for responses; default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same times")
    for name in ("messages", "responses", "dead-letters"):
        parser.add_argument(f"--{name}", default=name, metavar="NAME", help=f"the topic; default: {name}")
    given = parser.parse_args(arguments)
    topic = f"projects/{given.project}/topics"
    made: list[str] = []
    try:
        times = poisson_arrivals([Phase(given.rate, given.seconds)], given.seed)
        # Of its own, so that whatever else reads the responses keeps reading them.
        for name in (given.responses, given.dead_letters):
            made.append(pubsub.create_subscription(f"{topic}/{name}", f"load-{uuid.uuid4().hex[:12]}"))
        found = send_load(
            f"{topic}/{given.messages}",
            times,
            given.prompts,
            responses=made[0],
            dead_letters=made[1],
            wait_seconds=given.wait_seconds,
        )
    except (GoogleAPICallError, GoogleAuthError, SendingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if made:
            pubsub.delete(*made)
    summary = {
        "published": len(found.messages),
        "answered": len(found.answered),
        "dead_letters": found.dead,
        "waiting": found.waiting,
        "repeated": found.repeated,
        "answers_per_second": found.rate,
    }
    if found.answered:
        late = {f"p{share * 100:g}_seconds": found.latency(share) for share in (0.5, 0.95, 0.99)}
        # None for later than was waited for; JSON has no infinity.
        summary |= {name: value if math.isfinite(value) else None for name, value in late.items()}
    if found.messages:
        summary["p99_seconds_sent_late"] = found.lateness(0.99)
    print(json.dumps(summary))
    if found.waiting:
        print(f"error: {found.waiting} messages have no answer. Is a job running?", file=sys.stderr)
    return 1 if found.waiting else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch files are removed
    sys.exit(main())
