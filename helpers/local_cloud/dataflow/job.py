"""One Dataflow job: its state, its messages, and the worker process that runs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from google.cloud.dataflow_v1beta3.types import jobs, messages
from google.protobuf import json_format

from ..processes import sandbox
from ..processes.sandbox import Sandbox
from ..processes.scratch import Scratch
from .dataflow_worker.service import DRAIN, FINISHED, HAND_OVER, JOB_FAILED
from .metrics import UserMetrics

MAX_RESTARTS = 4  # of the worker, in a row without any progress
MAX_MESSAGES = 1000  # the newest are kept
LOG_END_CHARACTERS = 4000
YOUNG_SECONDS = 1.0  # after this a job can be drained; the service takes minutes
CANCEL_SECONDS = 5.0  # then the worker is killed

State = jobs.JobState
Importance = messages.JobMessageImportance
ENDED = {
    State.JOB_STATE_DONE,
    State.JOB_STATE_FAILED,
    State.JOB_STATE_CANCELLED,
    State.JOB_STATE_UPDATED,
    State.JOB_STATE_DRAINED,
}
_WORKER = Path(__file__).with_name("dataflow_worker")


class Job:
    """A job from its creation to its end.

    Args:
      message: the Job protobuf, complete but for its state.
      replaces: the job that this one replaces as soon as it is running.
      folder: holds the worker's log and, while the job runs, its files.
      environment: the worker process's environment variables.
    """

    def __init__(self, message: Any, folder: Path, environment: dict[str, str], replaces: Job | None = None):
        self._message = message
        self._folder = folder
        self._environment = environment
        self._lock = threading.RLock()
        self._messages: deque[Any] = deque(maxlen=MAX_MESSAGES)
        self._worker_counts: deque[Any] = deque(maxlen=MAX_MESSAGES)
        self._message_count = 0
        self._metrics = UserMetrics()
        self._replaces = replaces
        # Names the subscriptions of the topics that are read: a job that replaces another takes them over.
        self._name = replaces._name if replaces else f"dataflow-{message.id}"
        self._own_subscriptions: list[str] = []
        self.successor: Job | None = None
        self._running_since = math.inf
        self._worker: subprocess.Popen | None = None
        self._restarts = 0
        self._in_order = True  # whether the last worker ended as it should
        self._set_state(State.JOB_STATE_PENDING)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def state(self) -> State:
        return State(self._message.current_state)

    @property
    def pipeline_url(self) -> str:
        """Where the job's pipeline was staged."""
        options = self._message.environment.sdk_pipeline_options.fields["options"].struct_value
        return options.fields["pipelineUrl"].string_value

    def start(self) -> None:
        self._thread.start()

    def copy(self) -> Any:
        """The Job protobuf as it is now."""
        with self._lock:
            copy = type(self._message)()
            copy.CopyFrom(self._message)
            return copy

    def messages(self) -> list[Any]:
        with self._lock:
            return list(self._messages)

    def worker_counts(self) -> list[Any]:
        """An AutoscalingEvent for each time that the number of workers changed."""
        with self._lock:
            return list(self._worker_counts)

    def metrics(self) -> list[Any]:
        with self._lock:
            return self._metrics.updates()

    def merge(self, changes: Any, mask: Any) -> None:
        """Takes the fields that a mask names from another Job protobuf."""
        with self._lock:
            mask.MergeMessage(changes, self._message)

    def is_ready_to_drain(self) -> bool:
        """Whether the job has run for a moment: a younger one, and one that is replaced, cannot drain."""
        running = time.monotonic() - self._running_since
        return self.state == State.JOB_STATE_RUNNING and not self.successor and running >= YOUNG_SECONDS

    def drain(self) -> None:
        """Has the job stop taking input, and end when it has finished what it took in."""
        with self._lock:
            if self.state not in (*ENDED, State.JOB_STATE_DRAINING, State.JOB_STATE_CANCELLING):
                self._message.requested_state = State.JOB_STATE_DRAINED
                self._set_state(State.JOB_STATE_DRAINING)
                self._order(DRAIN)

    def hand_over(self, successor: Job) -> None:
        """Has the job end when it has finished what it took in: its successor carries on."""
        with self._lock:
            if self.state == State.JOB_STATE_RUNNING:
                self.successor = successor
                self._message.replaced_by_job_id = successor.copy().id
                self._say(Importance.JOB_MESSAGE_BASIC, f"Job {self._message.replaced_by_job_id} takes over.")
                self._order(HAND_OVER)

    def kill(self) -> None:
        """Ends the job without any clean-up, because the local cloud is stopping."""
        with self._lock:
            self._own_subscriptions = []
            if self.state not in ENDED:
                self._set_state(State.JOB_STATE_CANCELLING)
            if self._worker:
                _signal(self._worker, signal.SIGKILL)

    def cancel(self) -> None:
        """Has the job end at once."""
        with self._lock:
            if self.state in ENDED:
                return
            if self.state != State.JOB_STATE_CANCELLING:
                self._message.requested_state = State.JOB_STATE_CANCELLED
                self._set_state(State.JOB_STATE_CANCELLING)
            worker = self._worker
        if worker:
            threading.Thread(target=_end, args=(worker,), daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Waits for the job's end."""
        self._thread.join(seconds)

    # The rest runs in the job's own thread, except for what is called under the lock.

    def _run(self) -> None:
        state = State.JOB_STATE_FAILED
        try:
            with ExitStack() as cleanup:
                scratch = Scratch(self._folder / "run")
                cleanup.callback(scratch.remove)
                log_path = self._folder / f"dataflow-{self._message.id}.log"
                self._say(Importance.JOB_MESSAGE_BASIC, f"The worker's log is {log_path}")
                box = sandbox.create(scratch.path / "sandbox", packages=[_WORKER])
                self._write_settings(scratch.path)
                state = self._supervise(box, scratch.path, log_path)
                if state in (State.JOB_STATE_FAILED, State.JOB_STATE_CANCELLED):
                    self._delete_subscriptions(box)
        except Exception as error:  # such as a full disk: the job must end whatever happens
            self._say(Importance.JOB_MESSAGE_ERROR, f"The job could not be run: {error!r}")
        with self._lock:
            if self.state == State.JOB_STATE_CANCELLING:
                state = State.JOB_STATE_CANCELLED
            self._set_state(state)

    def _write_settings(self, folder: Path) -> None:
        options = json_format.MessageToDict(self._message.environment.sdk_pipeline_options)["options"]
        url = options.pop("pipelineUrl")
        for name in ("runner", "pipelineProtoHash", "dataflow_endpoint"):  # these are for the submitter
            options.pop(name, None)
        settings = {
            "pipeline_url": url,
            "options": {k: _whole(v) for k, v in options.items() if not isinstance(v, dict)},
            "name": self._name,
            "replaces": self._replaces.pipeline_url if self._replaces else "",
            "transform_name_mapping": dict(self._message.transform_name_mapping),
        }
        (folder / "settings.json").write_text(json.dumps(settings))

    def _supervise(self, box: Sandbox, folder: Path, log_path: Path) -> State:
        """Runs workers until the job has ended; returns the state it ends in."""
        while True:
            status = self._run_worker(box, folder, log_path)
            self._in_order = status == FINISHED
            with self._lock:
                self._worker = None
                state = self.state
            if state == State.JOB_STATE_CANCELLING:
                return State.JOB_STATE_CANCELLED
            if status == FINISHED:
                if self.successor:
                    return State.JOB_STATE_UPDATED
                draining = state == State.JOB_STATE_DRAINING
                return State.JOB_STATE_DRAINED if draining else State.JOB_STATE_DONE
            if status == JOB_FAILED:
                return State.JOB_STATE_FAILED
            how = f"on signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
            if self._restarts >= MAX_RESTARTS:
                text = log_path.read_text(errors="replace")[-LOG_END_CHARACTERS:]
                self._say(
                    Importance.JOB_MESSAGE_ERROR,
                    f"The worker ended {how}, as did {MAX_RESTARTS} before it, without any progress: the "
                    f"job fails. The end of its log:\n{text}",
                )
                return State.JOB_STATE_FAILED
            self._restarts += 1
            self._say(Importance.JOB_MESSAGE_WARNING, f"The worker ended {how}. Another one takes its place.")
            time.sleep(0.2 * self._restarts)

    def _run_worker(self, box: Sandbox, folder: Path, log_path: Path) -> int:
        """Runs one worker to its end and returns its exit status."""
        work = folder / "work"
        work.mkdir(exist_ok=True)
        reports, for_worker = os.pipe()
        with log_path.open("ab") as log:
            worker = subprocess.Popen(
                [box.python, "-P", "-m", _WORKER.name, folder, str(for_worker)],
                cwd=work,
                env=box.environment(self._environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[for_worker],
                start_new_session=True,
            )
        os.close(for_worker)
        with self._lock:
            self._worker = worker
            self._count_workers(1)
            state = self.state
        if state == State.JOB_STATE_CANCELLING:
            _signal(worker, signal.SIGKILL)
        if state == State.JOB_STATE_DRAINING:
            self._order(DRAIN)
        if self.successor:
            self._order(HAND_OVER)

        def wait() -> None:
            worker.wait()
            _signal(worker, signal.SIGKILL)  # a process it left behind would hold the reports open

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        with os.fdopen(reports) as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a worker that was killed
                    self._take(json.loads(line))
        waiter.join()
        self._count_workers(0)
        worker.stdin.close()
        return worker.returncode

    def _delete_subscriptions(self, box: Sandbox) -> None:
        """Deletes the subscriptions that a killed worker left; does nothing if it ended in order."""
        if self._own_subscriptions and not self._in_order:
            command = [box.python, "-P", "-m", f"{_WORKER.name}.clean_up", *self._own_subscriptions]
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(
                    command, env=box.environment(self._environment), timeout=30, capture_output=True
                )

    def _take(self, report: dict[str, Any]) -> None:
        with self._lock:
            match report["kind"]:
                case "running":
                    self._own_subscriptions = report["subscriptions"]
                    if self.state == State.JOB_STATE_PENDING:
                        self._running_since = time.monotonic()
                        self._set_state(State.JOB_STATE_RUNNING)
                        if self._replaces:
                            self._replaces.hand_over(self)
                case "progress":
                    self._restarts = 0
                case "message":
                    self._say(Importance[f"JOB_MESSAGE_{report['importance']}"], report["text"])
                case "metrics":
                    self._metrics.add(report["metrics"])

    def _order(self, order: str) -> None:
        if self._worker:
            with contextlib.suppress(OSError):  # the worker has just ended; the next one is told at its start
                self._worker.stdin.write(f"{order}\n".encode())
                self._worker.stdin.flush()

    def _set_state(self, state: State) -> None:
        self._message.current_state = state
        self._message.current_state_time.GetCurrentTime()
        self._say(Importance.JOB_MESSAGE_BASIC, f"The job is in state {state.name}.")

    def _count_workers(self, number: int) -> None:
        with self._lock:
            event = messages.AutoscalingEvent.pb()(current_num_workers=number, target_num_workers=number)
            event.event_type = messages.AutoscalingEvent.AutoscalingEventType.CURRENT_NUM_WORKERS_CHANGED
            event.time.GetCurrentTime()
            self._worker_counts.append(event)

    def _say(self, importance: Importance, text: str) -> None:
        with self._lock:
            self._message_count += 1
            message = messages.JobMessage.pb()(
                id=f"{self._message_count:08d}", message_importance=importance, message_text=text
            )
            message.time.GetCurrentTime()
            self._messages.append(message)


def _end(worker: subprocess.Popen) -> None:
    """Asks a worker to end, and kills it when it takes too long."""
    _signal(worker, signal.SIGTERM)
    try:
        worker.wait(CANCEL_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(worker, signal.SIGKILL)


def _signal(worker: subprocess.Popen, number: int) -> None:
    # macOS answers PermissionError for a group of processes that have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, number)


def _whole(value: Any) -> Any:
    """A Struct has only doubles: turns those that were integers back into integers."""
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
