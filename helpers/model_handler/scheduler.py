"""Batches of prompts from all threads that ask.

A runner hands prompts over in bundles, often of one, from many threads at once. Whatever waits is answered
together, whoever asked: each batch is formed when the one before it is done. A lone prompt does not wait for
company.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from helpers.model_handler import engine_thread
from helpers.model_handler.answers import Batch, Failure, Response, batches_by_length
from helpers.model_handler.engines.neighbours import Company, Mixing
from helpers.model_handler.options import AnsweringOptions

log = logging.getLogger(__name__)

Answer = Response | Failure

# After a batch, those whose prompts it answered come with their next ones: so long the next batch waits for
# as many, at most this share of the time that the last one took.
COMING_BACK_SECONDS = 0.01
COMING_BACK_SHARE = 0.02


@dataclass(eq=False)
class _Request:
    """An encoded prompt whose answer somebody waits for.

    Attributes:
        ids: the prompt's tokens.
        options: how to answer.
        answer: the answer, in time.
        batch: the figures of the batch that it was answered in; of each batch, one request has them.
        is_wanted: whether somebody still waits.
    """

    ids: list[int]
    options: AnsweringOptions
    answer: Future[Answer] = field(default_factory=Future)
    batch: Batch | None = None
    is_wanted: bool = True


class Scheduler:
    """Answers encoded prompts in batches, in the engine thread.

    What waits is bounded by the callers: each waits for its own prompts.

    Args:
        generate: answers encoded prompts, all in one batch; asks between steps whether it may stop, because
            nobody waits any more.
        company: which prompts may share a batch.
        mixing: the lengths at which prompts of different length may.
    """

    def __init__(
        self,
        generate: Callable[[Sequence[list[int]], AnsweringOptions, Callable[[], bool]], Sequence[Answer]],
        company: Callable[[], Company],
        mixing: Callable[[], Mixing],
    ) -> None:
        self._generate, self._company, self._mixing = generate, company, mixing
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()
        self._is_working = False

    def answer(
        self, prompts: Sequence[list[int]], options: AnsweringOptions, on_batch: Callable[[Batch], object]
    ) -> list[Answer]:
        """Waits for the answers to encoded prompts.

        Args:
            prompts: token ids.
            options: how to answer.
            on_batch: called, in this thread, with batches that were answered: each is told to one caller.

        Raises:
            Exception: the device is broken, and with it all that would follow.
        """
        requests = [_Request(ids, options) for ids in prompts]
        try:
            with self._changed:
                self._waiting += requests
                self._changed.notify()
                if self._waiting and not self._is_working:
                    engine_thread.submit(self._work)
                    self._is_working = True
            answers = [request.answer.result() for request in requests]
        except BaseException:  # an interrupt, for instance: nobody waits for the others any more
            for request in requests:
                request.is_wanted = False
                request.answer.cancel()
            raise
        for request in requests:
            if request.batch is not None:
                on_batch(request.batch)
        return answers

    def _work(self) -> None:
        """Answers one batch, and comes again if more waits: other models have their turn between."""
        batch: list[list[_Request]] = []
        started = time.monotonic()
        try:
            batch = self._take()
            for equals, answer in self._isolate(batch):
                for request in equals:
                    request.answer.set_result(answer)
        except BaseException as error:
            for request in itertools.chain(*batch):
                if not request.answer.done():
                    request.answer.set_exception(error)
        seconds = min(COMING_BACK_SECONDS, COMING_BACK_SHARE * (time.monotonic() - started))
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) >= sum(map(len, batch)), seconds)
            self._is_working = bool(self._waiting)
            if self._is_working:
                engine_thread.submit(self._work)

    def _take(self) -> list[list[_Request]]:
        """The next batch: the prompt that waits longest, and those of like length that wait with it.

        Equal prompts, which are answered once, are together in a list.
        """
        with self._changed:
            waiting = self._waiting = [one for one in self._waiting if not one.answer.cancelled()]
        if not waiting:
            return []
        options = waiting[0].options
        is_repeatable = not (options.recompute or options.is_sampled)
        equals: dict[object, list[_Request]] = {}
        for request in waiting:
            if request.options == options:
                key = tuple(request.ids) if is_repeatable else id(request)
                equals.setdefault(key, []).append(request)
        different = list(equals.values())
        lengths = {index: len(same[0].ids) for index, same in enumerate(different)}
        chosen = next(batch for batch in self._batches(lengths, options) if 0 in batch)
        taken = [different[index] for index in chosen]
        gone = set(itertools.chain(*taken))
        with self._changed:
            self._waiting = [request for request in self._waiting if request not in gone]
        still = [[one for one in same if one.answer.set_running_or_notify_cancel()] for same in taken]
        return [same for same in still if same]

    def _batches(self, lengths: dict[int, int], options: AnsweringOptions) -> Iterator[list[int]]:
        company = Company.ANY
        if len(lengths) > 1 and options.max_batch_size > 1:
            company = self._company()
        mixing = self._mixing()
        return batches_by_length(
            lengths,
            1 if company is Company.NONE else options.max_batch_size,
            options.max_batch_tokens,
            options.max_response_tokens,
            mixes=lambda length: (
                company is Company.ANY and mixing.allows(length, options.max_response_tokens)
            ),
        )

    def _isolate(self, batch: list[list[_Request]]) -> Iterator[tuple[list[_Request], Answer]]:
        """Answers a batch. One that fails, for lack of memory for instance, is halved until the prompts that
        fail stand alone."""
        if not batch:
            return
        prompts = [equals[0].ids for equals in batch]
        started = time.monotonic()
        try:
            answers = self._generate(
                prompts,
                batch[0][0].options,
                lambda: not any(request.is_wanted for request in itertools.chain(*batch)),
            )
        except Exception as error:  # whatever it is, it must not cost the other prompts their answers
            if _is_broken_device(error):
                raise  # every prompt of this process would fail: the runner tries again elsewhere
            reason = describe(error)
        else:
            batch[0][0].batch = Batch.of(prompts, answers, time.monotonic() - started)
            yield from zip(batch, answers, strict=True)
            return
        if len(batch) == 1:
            log.warning("A prompt failed: %s", reason)
            yield batch[0], Failure(reason)
            return
        log.warning("A batch of %d prompts failed and is halved: %s", len(batch), reason)
        middle = len(batch) // 2
        yield from self._isolate(batch[:middle])
        yield from self._isolate(batch[middle:])


def _is_broken_device(error: Exception) -> bool:
    """Whether the accelerator itself failed, rather than the prompt, and not merely for lack of memory."""
    if "out of memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
        return False
    # CTranslate2 raises a RuntimeError with CUDA's own text.
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA failed with" in str(error)


def describe(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
