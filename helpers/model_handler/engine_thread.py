"""The one thread of a process that computes.

torch is fastest in one thread. OpenMP gives every thread that computes a team of its own, and a process with
more of these threads than cores no longer lets them wait actively, so that each operation starts late:
measured on two cores of an Intel Xeon, a third of the speed is lost in a second thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

INTERRUPT_SECONDS = 10  # how long an interrupted thread may take to clean up


def _start() -> None:
    global _executor, _ids
    _ids = set()
    _executor = ThreadPoolExecutor(
        1, thread_name_prefix="engine", initializer=lambda: _ids.add(threading.get_ident())
    )


_start()
os.register_at_fork(after_in_child=_start)  # a fork has no threads but the one that forked


def submit(function: Callable[[], Result]) -> Future[Result]:
    """Has the engine thread call a function when it comes to it."""
    return _executor.submit(function)


def run(function: Callable[[], Result]) -> Result:
    """Calls a function in the engine thread, and waits for its result."""
    return function() if threading.get_ident() in _ids else submit(function).result()


def run_apart(function: Callable[[], Result]) -> Result:
    """Calls a function in a thread that ends with it, and waits for its result. For what computes while the
    engine thread answers: a team of OpenMP's goes with its thread. An interrupt here reaches it there."""
    done: Future[Result] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=call, name="loading", daemon=True)
    thread.start()
    try:
        return done.result()
    except KeyboardInterrupt:
        identity = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(KeyboardInterrupt))
        thread.join(INTERRUPT_SECONDS)
        raise
