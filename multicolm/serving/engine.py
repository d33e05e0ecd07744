"""One thread that owns the models, and writes the texts of all who ask, batched with each other.

Whoever asks gets a handle per text and hears about it by calls from that thread. Everything that
belongs to a text is let go when it is finished, has failed, or is cancelled.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias

from multicolm.backend.passes import Passes
from multicolm.decoding.runner import Runner
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.errors import (
    BusyError,
    CapabilityError,
    ClosedError,
    ConfigError,
    InputError,
    MulticolmError,
)
from multicolm.numbers import check_whole
from multicolm.serving.events import Begun, Ended, Event, Failed, GenerationRequest, Grown
from multicolm.serving.workers import PROMPT_TOKENS, Backlog, Handle, PolicyWorker, PolicyWorkers
from multicolm.types import MIXTURE, TracedToken, Usage

__all__ = ["Closing", "Engine", "Stats"]

_LOG = logging.getLogger("multicolm.serving")
_PAST = 32  # finished texts by whose durations the next one's is estimated

Outcome: TypeAlias = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of an engine.

    Attributes:
        active: texts that are being written.
        waiting: texts that wait for a slot.
        slots: how many can be written at a time.
        places: how many can wait.
        models: by name, what each model did since the start; tokens that several wrote together
            are those of ``mixture``.
        outcomes: how many texts ended how.
    """

    active: int
    waiting: int
    slots: int
    places: int
    models: dict[str, Usage]
    outcomes: dict[Outcome, int]


@dataclass(frozen=True, slots=True)
class Closing:
    """How an engine was closed.

    Attributes:
        finished: texts that were finished meanwhile.
        broken_off: texts that were not.
    """

    finished: int
    broken_off: int


class Counts:
    """What came of texts, under the engine's lock.

    Attributes:
        outcomes: how many texts ended in each way.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(("finished", "cancelled", "failed"), 0)
        self._written = dict.fromkeys([*models, MIXTURE], 0)
        self._durations: deque[float] = deque(maxlen=_PAST)

    def end(self, outcome: Outcome, tokens: Sequence[TracedToken], seconds: float) -> None:
        """Count a text that took so long, and the tokens that were written of it."""
        self.outcomes[outcome] += 1
        for token in tokens:
            self._written[token.model] += 1
        if outcome == "finished":
            self._durations.append(seconds)

    def with_written(self, usage: Mapping[str, Usage]) -> dict[str, Usage]:
        """What each model did, with the tokens of texts that ended."""
        every = {**usage, MIXTURE: Usage()}
        return {n: used + Usage(tokens_written=self._written[n]) for n, used in every.items()}

    @property
    def usual_seconds(self) -> float:
        """The median of the last texts that were finished; 0 before the first."""
        durations = sorted(self._durations)
        return durations[len(durations) // 2] if durations else 0.0


class Engine:
    """Writes texts for whoever asks, from any thread; use it as a context, or start and close it.

    All texts share forward passes and caches, whatever their settings and policies. Only policies
    that write in bytes, or continue within tokens, have caches of their own for that many texts: a
    few of these work at a time, and who wants another one waits until one of them is done.

    Args:
        ensemble: whose models write. Nobody else may use it meanwhile.
        max_concurrent: how many texts are written at a time.
        max_waiting: how many more may wait.
        clock: current time in seconds.

    Raises:
        InputError: if a number is out of range.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        max_concurrent: int = 16,
        max_waiting: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        max_concurrent = check_whole("max_concurrent", max_concurrent, least=1)
        max_waiting = check_whole("max_waiting", max_waiting, least=0)
        self.ensemble = ensemble
        self.max_concurrent = max_concurrent
        self.max_waiting = max_waiting
        self._clock = clock
        self._numbers = itertools.count()
        # What follows is shared with other threads, and touched under this lock alone.
        self._news = threading.Condition()
        self._coming: deque[Handle] = deque()
        self._leaving: deque[Handle] = deque()
        self._n_texts = 0
        self._deadline: float | None = None
        self._counts = Counts(ensemble.models)
        # What follows is the working thread's own.
        self._runner = Runner(ensemble.backends, max_concurrent, clock, PROMPT_TOKENS)
        self._workers = PolicyWorkers(ensemble, self._runner, self._news)
        self._n_broken_off = 0
        self._thread = threading.Thread(target=self._work, name="multicolm-engine", daemon=True)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it works, and takes requests."""
        return self._thread.is_alive() and self._deadline is None

    @property
    def capacity(self) -> int:
        """How many texts there can be at a time, written and waiting."""
        return self.max_concurrent + self.max_waiting

    def submit(
        self, requests: Sequence[GenerationRequest], listeners: Sequence[Callable[[Event], None]]
    ) -> list[Handle]:
        """Ask for some texts, for all of them or for none.

        Args:
            requests: what is wanted.
            listeners: per request, what is called about it from the engine's thread; it must not
                wait. The last call is with :class:`Ended` or :class:`Failed`; after a cancellation
                there may be none. Whoever reads what it gets says so by :meth:`read`: these texts
                pause while too much of all of them is unread.

        Raises:
            BusyError: if there are too many texts already.
            ClosedError: if the engine does not work, or no longer.
        """
        with self._news:
            if not self.is_open:
                raise ClosedError("the server is shutting down; ask again when it is back.")
            if self._n_texts + len(requests) > self.capacity:
                raise BusyError(
                    f"{self._n_texts} of {self.capacity} places are taken; ask again later.",
                    retry_after=self.time_to_wait(),
                )
            self._n_texts += len(requests)
            backlog = Backlog()
            handles = [
                Handle(request, listener, next(self._numbers), self._clock(), backlog)
                for request, listener in zip(requests, listeners, strict=True)
            ]
            self._coming.extend(handles)
            self._news.notify()
        return handles

    def read(self, handle: Handle, event: Grown) -> None:
        """Note that an event was read, so that a text which was paused can be written further."""
        with self._news:  # or the thread could begin to wait just now
            was_full = handle.backlog.is_full
            handle.backlog.n_read += event.size
            if was_full:
                self._news.notify()

    def cancel(self, handle: Handle) -> None:
        """Write no further in a text; its place is free before the next round of the loop."""
        with self._news:
            self._leaving.append(handle)
            self._news.notify()

    def close(self, grace: float = 0.0) -> Closing:
        """Take no more requests, finish what runs, and end.

        Args:
            grace: after so many seconds what is not finished is broken off, with
                :class:`~multicolm.errors.ClosedError`.
        """
        with self._news:
            finished = self._counts.outcomes["finished"]
            deadline = self._clock() + grace
            # Asked once more, it may only be in more of a hurry.
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join()
        return Closing(self._counts.outcomes["finished"] - finished, self._n_broken_off)

    def stats(self) -> Stats:
        """Its state now."""
        with self._news:
            active = self._workers.n_active
            return Stats(
                active,
                max(0, self._n_texts - active),
                self.max_concurrent,
                self.max_waiting,
                self._counts.with_written(self._workers.usage()),
                dict(self._counts.outcomes),
            )

    def time_to_wait(self) -> int:
        """In how many seconds, about, a place will be free."""
        with self._news:
            return min(60, max(1, math.ceil(self._counts.usual_seconds)))

    # From here on everything runs in the engine's own thread.

    def _work(self) -> None:
        ensemble = self.ensemble
        try:
            with torch_threads(ensemble.backends, ensemble.generation.threads):
                while self._listen():
                    self._workers.admit()
                    at_work = [worker for worker in self._workers.values() if worker.can_write]
                    for worker in at_work:
                        worker.pause_unread()
                    self._runner.run([self._round(worker) for worker in at_work])
        except BaseException:
            _LOG.exception("the engine has stopped")
            raise
        finally:
            self._break_off()

    def _listen(self) -> bool:
        """Hear of new texts and of cancellations, waiting for them if there is nothing to do.

        Returns:
            Whether there is anything left to do.
        """
        with self._news:
            while not (self._coming or self._leaving or self._workers.can_work):
                left = self._time_left()
                if left is not None and (left <= 0 or self._workers.is_idle):
                    return False
                self._news.wait(left)
            coming, leaving = list(self._coming), list(self._leaving)
            self._coming.clear()
            self._leaving.clear()
            left = self._time_left()
        for handle in coming:
            self._accept(handle)
        for handle in leaving:
            self._let_go(handle)
        return left is None or left > 0

    def _time_left(self) -> float | None:
        """Seconds until what runs is broken off; ``None`` while it is not shutting down."""
        return None if self._deadline is None else self._deadline - self._clock()

    def _accept(self, handle: Handle) -> None:
        """Read the prompt of a new text, and let it wait for a slot."""
        request = handle.request
        try:
            worker = self._workers.open(request.choice)
            row = worker.live.row(request.prompt, request.number, request.settings, request.seed)
        except Exception as error:  # of anybody's policy or tokenizer: it costs this text alone
            self._fail(handle, error)
            return
        row.number = handle.number
        handle.row = row
        self._workers.enqueue(worker, handle)
        n_prompt = next(len(ids) for ids in row.prompt_ids if ids)
        handle.deliver(Begun(n_prompt))

    def _round(self, worker: PolicyWorker) -> Passes[None]:
        """One round of a policy's loop, and the news of it."""
        try:
            pieces = yield from worker.live.loop.step()
            for row, error in worker.live.failed():  # and no other text
                self._fail(self._taken_out(worker, row.number), error)
            answers = {row.number: worker.live.answer(row) for row in worker.live.finished()}
            for number, handle in worker.active.items():
                new = [piece for piece in pieces if piece.row == number]
                handle.deliver_growth(worker.live, new)
        except Exception as error:  # of anybody's policy or model: it costs this policy's texts
            self._start_over(worker, error)
            return
        for number, answer in answers.items():
            handle = self._taken_out(worker, number)
            self._end(handle, "finished", answer.trace.tokens)
            handle.deliver(Ended(answer))

    def _taken_out(self, worker: PolicyWorker, number: int) -> Handle:
        return worker.active.pop(number)

    def _start_over(self, worker: PolicyWorker, error: Exception) -> None:
        """A round has failed: those who were in it fail, those who wait do not.

        Unless the policy cannot be opened once more: then they fail, too.
        """
        failed = list(worker.active.values())
        for handle in failed:
            assert handle.row is not None
            worker.live.cancel(handle.row)  # its slot is for others too
        worker.active.clear()
        self._workers.retire([worker])
        for handle in failed:
            self._fail(handle, error)
        if not worker.waiting:
            return
        try:
            self._workers.reopen(worker)
        except Exception as again:  # of anybody's policy
            for handle in list(worker.waiting.values()):
                self._workers.dequeue(worker, handle)
                self._fail(handle, again)

    def _let_go(self, handle: Handle) -> None:
        """Stop writing a text, if it is not finished."""
        worker = self._workers.get(handle.request.choice.key)
        if worker is None or handle.row is None:
            return
        if worker.active.pop(handle.number, None) is not None:
            worker.live.cancel(handle.row)
        elif handle.number in worker.waiting:
            self._workers.dequeue(worker, handle)
        else:
            return
        self._end(handle, "cancelled", worker.live.tokens(handle.row))

    def _fail(self, handle: Handle, error: Exception) -> None:
        _log(error)
        self._end(handle, "failed", ())
        # Its frames, which have been logged, hold caches, and whoever asked may keep it.
        handle.deliver(Failed(error.with_traceback(None)))

    def _end(self, handle: Handle, outcome: Outcome, tokens: Sequence[TracedToken]) -> None:
        """Free the place of a text."""
        with self._news:
            self._n_texts -= 1
            self._counts.end(outcome, tokens, self._clock() - handle.since)
        handle.row = None

    def _break_off(self) -> None:
        """End all texts that are left: nothing is written any more."""
        with self._news:
            self._deadline = self._clock() if self._deadline is None else self._deadline
            left = [*self._coming]
            self._coming.clear()
            workers = list(self._workers.values())
            self._workers.retire(workers)
        left += [handle for worker in workers for handle in worker.handles]
        self._n_broken_off = len(left)
        for handle in left:
            self._fail(handle, ClosedError("the server has shut down before this was finished."))


def _log(error: Exception) -> None:
    """Of what came of a text: what is not the fault of whoever asked."""
    if not isinstance(error, MulticolmError):
        _LOG.error("a text could not be written", exc_info=error)
    elif not isinstance(error, InputError | ConfigError | CapabilityError | ClosedError):
        _LOG.error("a text could not be written: %s", error)
