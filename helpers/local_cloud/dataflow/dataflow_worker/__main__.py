"""Runs one job: `python -m dataflow_worker FOLDER REPORTS`.

FOLDER holds settings.json with `pipeline_url`, `options` and `name`; REPORTS is the file descriptor that
reports are written to.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from .service import JOB_FAILED, Service


def main() -> int:
    """Runs the job and returns the exit status, which tells the service what to do next."""
    folder, service = Path(sys.argv[1]), Service(int(sys.argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        from .job import Job  # Beam takes seconds to import: listen to the service first

        job = Job(folder, service)
    except BaseException as error:
        service.error(error, "The worker could not be set up.")
        return JOB_FAILED
    return job.run()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the user's code must not keep the worker alive
