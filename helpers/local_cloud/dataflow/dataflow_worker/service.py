"""The worker's connection to the service: orders on standard input, reports as lines of JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any

CHECK_SECONDS = 1.0
DRAIN = "drain"
HAND_OVER = "hand-over"  # to the job that replaces this one

# Exit statuses. After any but the first two, or a signal, the service starts another worker.
FINISHED = 0
JOB_FAILED = 1
BROKEN = 3


class Service:
    """The service, as its worker sees it."""

    def __init__(self, reports: int):
        """Takes the file descriptor of the reports and begins to listen for orders."""
        self.draining = threading.Event()
        self.handing_over = False
        self._reports = os.fdopen(reports, "w", buffering=1)
        self._lock = threading.Lock()
        self._parent = os.getppid()
        self._before_exit: list[Callable[[], None]] = []
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._cancel).start())
        threading.Thread(target=self._listen, daemon=True).start()

    def before_exit(self, clean_up: Callable[[], None]) -> None:
        """Registers a function to call when the job is cancelled; the last registered is called first."""
        self._before_exit.insert(0, clean_up)

    def running(self, subscriptions: Iterable[str] = ()) -> None:
        """Reports that the worker is set up and takes its input.

        Args:
          subscriptions: those that were made for this job, to be deleted at its end.
        """
        self._report(kind="running", subscriptions=list(subscriptions))

    def progress(self) -> None:
        """Reports that input has been processed for good."""
        self._report(kind="progress")

    def message(self, importance: str, text: str) -> None:
        """Adds a job message; `importance` is the name of a JobMessageImportance without its prefix."""
        self._report(kind="message", importance=importance, text=text)

    def error(self, error: BaseException, introduction: str = "") -> None:
        """Adds an exception with its traceback to the job's messages, and to the log."""
        text = "".join(traceback.format_exception(error))
        print(introduction, text, sep="\n", file=sys.stderr, flush=True)
        self.message("ERROR", f"{introduction}\n{text}".strip())

    def metrics(self, metrics: Iterable[dict[str, Any]]) -> None:
        """Reports what is to be added to the job's user metrics."""
        self._report(kind="metrics", metrics=list(metrics))

    def _report(self, **report: Any) -> None:
        with self._lock:
            self._reports.write(json.dumps(report) + "\n")

    def _listen(self) -> None:
        while os.getppid() == self._parent:
            readable, _, _ = select.select([0], [], [], CHECK_SECONDS)
            if not readable:
                continue
            received = os.read(0, 1024)
            if not received:
                break
            orders = received.decode().split()
            self.handing_over = self.handing_over or HAND_OVER in orders
            if DRAIN in orders or HAND_OVER in orders:
                self.draining.set()
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the local cloud has ended

    def _cancel(self) -> None:
        for clean_up in self._before_exit:
            try:
                clean_up()
            except Exception:
                traceback.print_exc()
        os._exit(FINISHED)


def user_metrics(result: Any) -> list[dict[str, Any]]:
    """The counters and distributions in a pipeline's result, as reports hold them."""
    found = result.metrics().query()
    metrics = []
    for kind in ("counters", "distributions"):
        for metric in found[kind]:
            value = metric.committed if metric.committed is not None else metric.attempted
            if kind == "distributions":
                if not value.count:  # of a stage that counted in an earlier bundle
                    continue
                value = {"count": value.count, "sum": value.sum, "min": value.min, "max": value.max}
            key = {"namespace": metric.key.metric.namespace, "name": metric.key.metric.name}
            metrics.append({**key, "step": metric.key.step, "value": value})
    return metrics
