"""Batches across threads: who asks does not matter, only what waits."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.model_handler import engine_thread
from helpers.model_handler.answers import Failure, Response
from helpers.model_handler.engines.neighbours import Company, Mixing
from helpers.model_handler.options import AnsweringOptions
from helpers.model_handler.scheduler import Scheduler

OPTIONS = AnsweringOptions(max_response_tokens=4)
SECONDS = 60


class Engine:
    """Answers with the prompt's own tokens; the first batch waits until it is let go."""

    def __init__(self, fails=lambda batch: None):
        self.batches, self.threads, self.abandoned = [], set(), []
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.fails = fails
        self.scheduler = Scheduler(self.generate, lambda: Company.ANY, Mixing)

    def generate(self, prompts, options, is_abandoned):
        self.batches.append(list(prompts))
        self.threads.add(threading.current_thread().name)
        self.has_begun.set()
        assert self.may_end.wait(SECONDS)
        self.abandoned.append(is_abandoned())
        if error := self.fails(prompts):
            raise error
        return [Response(str(prompt), len(prompt), 1) for prompt in prompts]

    def ask(self, *prompts, options=OPTIONS, on_batch=lambda batch: None):
        return self.scheduler.answer(list(prompts), options, on_batch)

    def waits_for(self, count):
        end = time.monotonic() + SECONDS
        while len(self.scheduler._waiting) < count:
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def callers():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def ask_behind_a_first(engine, callers, asked):
    """Has prompts wait while a first one is answered; returns the answers to all but that one."""
    first = callers.submit(engine.ask, [0])
    assert engine.has_begun.wait(SECONDS)
    futures = []
    for arguments, options in asked:
        futures.append(callers.submit(lambda a=arguments, o=options: engine.ask(*a, **o)))
        engine.waits_for(sum(len(a) for a, _ in asked[: len(futures)]))
    engine.may_end.set()
    first.result(SECONDS)
    return futures


def test_what_waits_is_one_batch_whoever_asked(callers):
    engine = Engine()
    asked = [([[1, 2, n]], {}) for n in range(20)]
    futures = ask_behind_a_first(engine, callers, asked)
    assert [future.result(SECONDS)[0].text for future in futures] == [f"[1, 2, {n}]" for n in range(20)]
    assert [len(batch) for batch in engine.batches] == [1, 20]
    assert len(engine.threads) == 1 and next(iter(engine.threads)).startswith("engine")


def test_each_batch_is_told_to_one_of_those_who_asked(callers):
    engine, told = Engine(), []
    futures = ask_behind_a_first(engine, callers, [([[n]], {"on_batch": told.append}) for n in range(5)])
    [future.result(SECONDS) for future in futures]
    assert [(batch.size, batch.prompt_tokens) for batch in told] == [(5, 5)]


def test_the_oldest_is_answered_first_with_what_has_its_options(callers):
    engine, other = Engine(), AnsweringOptions(max_response_tokens=5)
    asked = [([[1]], {}), ([[2]], {"options": other}), ([[3]], {}), ([[4]], {"options": other})]
    [future.result(SECONDS) for future in ask_behind_a_first(engine, callers, asked)]
    assert engine.batches == [[[0]], [[1], [3]], [[2], [4]]]


def test_the_largest_batch_and_its_tokens_bound_what_is_answered_together(callers):
    engine, small = Engine(), AnsweringOptions(max_response_tokens=4, max_batch_size=4, max_batch_tokens=40)
    asked = [([[n] * (30 if n == 3 else 2)], {"options": small}) for n in range(10)]
    [future.result(SECONDS) for future in ask_behind_a_first(engine, callers, asked)]
    assert sorted(map(len, engine.batches[1:])) == [1, 1, 4, 4]
    assert [[3] * 30] in engine.batches


def test_equal_prompts_of_several_threads_are_computed_once_unless_sampled(callers):
    engine = Engine()
    futures = ask_behind_a_first(engine, callers, [([[7]], {}), ([[8]], {}), ([[7]], {})])
    assert [future.result(SECONDS)[0].text for future in futures] == ["[7]", "[8]", "[7]"]
    assert engine.batches[1:] == [[[7], [8]]]
    sampled = Engine()
    options = {"options": AnsweringOptions(max_response_tokens=4, temperature=1.0)}
    futures = ask_behind_a_first(sampled, callers, [([[7]], options), ([[7]], options)])
    [future.result(SECONDS) for future in futures]
    assert sampled.batches[1:] == [[[7], [7]]]


def test_a_prompt_that_fails_costs_no_other_thread_its_answer(callers):
    engine = Engine(lambda batch: RuntimeError("poison") if [13] in batch else None)
    futures = ask_behind_a_first(engine, callers, [([[n]], {}) for n in range(10, 20)])
    answers = [future.result(SECONDS)[0] for future in futures]
    assert [type(answer) for answer in answers] == [Failure if n == 13 else Response for n in range(10, 20)]


def test_a_broken_device_is_an_error_for_all_that_it_was_to_answer_and_not_for_ever(callers):
    broken = RuntimeError("CUDA failed with error: an illegal memory access")
    engine = Engine(lambda batch: broken if [5] in batch else None)
    futures = ask_behind_a_first(engine, callers, [([[5]], {}), ([[6]], {})])
    for future in futures:
        with pytest.raises(RuntimeError, match="illegal memory"):
            future.result(SECONDS)
    assert engine.ask([9])[0].text == "[9]"


def interrupt_main_thread():
    time.sleep(0.5)  # until it waits: Python misses a signal that comes just before a lock is waited for
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_what_nobody_waits_for_any_more_is_not_computed():
    engine = Engine()
    interrupt = threading.Thread(target=lambda: (engine.waits_for(1), interrupt_main_thread()))
    first = threading.Thread(target=engine.ask, args=([1],))
    first.start()
    assert engine.has_begun.wait(SECONDS)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        engine.ask([2])
    engine.may_end.set()
    first.join(SECONDS)
    assert engine.ask([4])[0].text == "[4]"
    assert engine.batches == [[[1]], [[4]]]


def test_a_batch_is_told_that_nobody_waits_for_it_any_more():
    engine = Engine()

    def interrupt():
        assert engine.has_begun.wait(SECONDS)
        interrupt_main_thread()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        engine.ask([1])
    engine.may_end.set()
    engine.ask([2])
    assert engine.abandoned == [True, False]


def test_thousands_of_prompts_from_many_threads_with_bad_ones_among_them_are_all_answered():
    engine = Engine(lambda batch: ValueError("bad") if any(prompt[0] % 20 == 0 for prompt in batch) else None)
    engine.may_end.set()
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda n: engine.ask([n])[0], range(3000)))
    kinds = Counter(type(answer).__name__ for answer in answers)
    assert kinds == {"Response": 2850, "Failure": 150}
    assert all(answer.text == f"[{n}]" for n, answer in enumerate(answers) if n % 20)
    assert not engine.scheduler._waiting


def test_a_fork_has_an_engine_thread_of_its_own():
    program = """
import os
from helpers.model_handler import engine_thread
assert engine_thread.run(lambda: 1) == 1
child = os.fork()
if not child:
    os._exit(engine_thread.run(lambda: 7))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS).returncode == 7


def test_what_is_run_apart_ends_its_thread_and_brings_its_error():
    names = [engine_thread.run_apart(lambda: threading.current_thread().name) for _ in range(2)]
    assert names == ["loading", "loading"]
    assert not [thread for thread in threading.enumerate() if thread.name == "loading"]
    with pytest.raises(ZeroDivisionError):
        engine_thread.run_apart(lambda: 1 / 0)


def test_an_interrupt_reaches_what_runs_apart():
    program = """
import os, signal, threading, time
from helpers.model_handler import engine_thread
cleaned = []
def load():
    try:
        for _ in range(600):
            time.sleep(0.1)
    finally:
        cleaned.append(1)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    engine_thread.run_apart(load)
except KeyboardInterrupt:
    raise SystemExit(5 if cleaned else 6)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS).returncode == 5
