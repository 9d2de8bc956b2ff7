"""The command line: starts the pipeline, and waits for it unless it runs on Dataflow.

    python -m helpers.pipeline \\
        --messages-subscription projects/P/subscriptions/messages \\
        --responses-topic projects/P/topics/responses \\
        --dead-letter-topic projects/P/topics/dead-letters \\
        --state-dict-path gs://BUCKET/run-inference/MODEL.pt --model-name MODEL \\
        --runner DataflowRunner --project P --region R --temp_location gs://BUCKET/temp

On Dataflow these are enough: what else a job for a language model needs is chosen by `helpers.dataflow`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from apache_beam.transforms.ptransform import PTransform
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from helpers.pipeline import CommandLineError
from helpers.pipeline.command_line import parser, run


def main(argv: Sequence[str] | None = None, **steps: PTransform) -> None:
    """Starts the pipeline that a command line describes.

    Args:
        argv: by default this process's own.
        steps: `before` and `after` of `helpers.pipeline.build`, for programs with steps of their own; see
            docs/examples/custom_steps.py.

    Exit codes: 0; 1 for what went wrong, with a line on stderr; 2 for a command line that is not understood;
    130 when interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("helpers").setLevel(logging.INFO)  # Beam's INFO is the whole job, 1,300 lines
    # It warns of each wheel that is sent along, such as the helpers' own, which has no binary in it.
    logging.getLogger("apache_beam.runners.portability.stager").setLevel(logging.ERROR)
    try:
        result = run(argv, **steps)
        if not hasattr(result, "job_id"):  # for a runner other than Dataflow's
            result.wait_until_finish()
            return
    except KeyboardInterrupt:
        print("Interrupted: the subscription delivers unanswered messages again.", file=sys.stderr)
        sys.exit(130)
    except CommandLineError as error:
        parser().print_usage(sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # RuntimeError: JobError, StorageError, a name that has just been taken, a package that is not installed.
    except (OSError, RuntimeError, ValueError, GoogleAPICallError, GoogleAuthError) as error:
        sys.exit(f"error: {error}")
    if result.has_job:
        print(f"Submitted job {result.job_id()}")
    else:
        print("No job was submitted: the template has been written.")


if __name__ == "__main__":
    main()
