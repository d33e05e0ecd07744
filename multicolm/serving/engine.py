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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, TypeAlias

from multicolm.backend.passes import Passes
from multicolm.config import GenerationConfig
from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
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
from multicolm.serving.catalog import Choice
from multicolm.types import MIXTURE, Answer, Piece, Prompt, TracedToken, Usage

__all__ = [
    "Begun",
    "Closing",
    "Ended",
    "Engine",
    "Event",
    "Failed",
    "GenerationRequest",
    "Grown",
    "Handle",
    "Stats",
]

_LOG = logging.getLogger("multicolm.serving")
_KEPT = 4  # policies that have caches, in use or not; each other threshold is another policy
_PAST = 32  # texts whose durations tell how long the next will take

Outcome: TypeAlias = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A text that somebody wants.

    Attributes:
        prompt: text, a chat, or token ids of the shared vocabulary.
        choice: who decides who writes.
        settings: how it is written.
        seed: of everything random.
        number: which prompt of its request it is, from 0, for messages.
    """

    prompt: Prompt
    choice: Choice
    settings: GenerationConfig
    seed: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt has been read by the tokenizers and will be answered.

    Attributes:
        n_prompt_tokens: of the base model, or of the first model in use.
    """

    n_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Grown:
    """More of the text is certain.

    Attributes:
        pieces: what is new of the text, with its writers.
        tokens: what is new of the trace; it may be ahead of the text, or behind it.
    """

    pieces: tuple[Piece, ...]
    tokens: tuple[TracedToken, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The text is finished; all of it has been told by then."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Failed:
    """The text will not be finished."""

    error: Exception


Event: TypeAlias = Begun | Grown | Ended | Failed


@dataclass(eq=False, slots=True)
class Handle:
    """A text on its way; hand it back to :meth:`Engine.cancel`. The rest is the engine's own."""

    request: GenerationRequest
    deliver: Callable[[Event], None]
    number: int
    since: float
    row: Row | None = None
    n_told: int = 0

    def tell(self, event: Event) -> None:
        """Deliver an event; whoever asked may be gone, which must not cost the others anything."""
        try:
            self.deliver(event)
        except Exception:
            _LOG.exception("an event could not be delivered")

    def tell_growth(self, live: Live, pieces: Sequence[Piece]) -> None:
        """Deliver what was written since the last time."""
        assert self.row is not None
        if not pieces and len(self.row.written) == self.n_told:
            return
        tokens = live.tokens(self.row, self.n_told)
        self.n_told += len(tokens)
        if pieces or tokens:
            self.tell(Grown(tuple(pieces), tuple(tokens)))


@dataclass(eq=False)
class PolicyWorker:
    """One policy at work, and who waits for what from it."""

    choice: Choice
    live: Live
    waiting: dict[int, Handle] = field(default_factory=dict)
    active: dict[int, Handle] = field(default_factory=dict)

    @property
    def handles(self) -> list[Handle]:
        return [*self.active.values(), *self.waiting.values()]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.active

    @property
    def has_caches(self) -> bool:
        """Whether it has caches of its own; most policies share those of all."""
        loop = self.live.loop
        return loop.has_own_sessions and bool(self.active or loop.readers.opened)


class PolicyWorkers:
    """The policies at work, the one that was used last at the end.

    Only the engine's thread calls the methods that change something.

    Args:
        ensemble: whose models write.
        runner: of all passes.
        lock: taken where other threads might read at the same time.
    """

    def __init__(self, ensemble: Ensemble, runner: Runner, lock: threading.Condition) -> None:
        self._ensemble = ensemble
        self._runner = runner
        self._lock = lock
        self._by_key: dict[str, PolicyWorker] = {}
        self._retired = dict.fromkeys(ensemble.models, Usage())

    def __len__(self) -> int:
        return len(self._by_key)

    def values(self) -> Collection[PolicyWorker]:
        """All of them."""
        return self._by_key.values()

    def get(self, key: str) -> PolicyWorker | None:
        """Where the policy of a choice works, if it does."""
        return self._by_key.get(key)

    def open(self, choice: Choice) -> PolicyWorker:
        """Where a policy works; those that nobody has used for longest are closed."""
        worker = self._by_key.get(choice.key)
        if worker is None:
            worker = PolicyWorker(choice, self._live(choice))
        idle = [w for w in self.values() if w.is_idle and w is not worker]
        with self._lock:
            self._by_key.pop(choice.key, None)
            self._by_key[choice.key] = worker
            self.retire(idle[: max(0, len(self) - _KEPT)])
        return worker

    def reopen(self, worker: PolicyWorker) -> None:
        """Let a policy work again after it was retired."""
        worker.live = self._live(worker.choice)
        with self._lock:
            self._by_key[worker.choice.key] = worker

    def retire(self, workers: Sequence[PolicyWorker]) -> None:
        """Let go of policies and their caches, but not of what was counted."""
        with self._lock:
            for worker in workers:
                for name, used in worker.live.usage.items():
                    self._retired[name] += used
                del self._by_key[worker.choice.key]

    def has_room(self, worker: PolicyWorker) -> bool:
        """Whether a policy can begin to work; those that have caches and no texts give them up."""
        if not worker.live.loop.has_own_sessions:
            return True
        others = [w for w in self.values() if w is not worker and w.has_caches]
        idle = [w for w in others if w.is_idle][: max(0, len(others) + 1 - _KEPT)]
        self.retire(idle)
        return len(others) - len(idle) < _KEPT

    def usage(self) -> dict[str, Usage]:
        """What each model did for policies that work, and for those that did before."""
        with self._lock:
            models = dict(self._retired)
            for worker in self.values():
                models = {name: models[name] + used for name, used in worker.live.usage.items()}
        return models

    def _live(self, choice: Choice) -> Live:
        return self._ensemble.live(choice.policy, runner=self._runner)


@dataclass(frozen=True, slots=True)
class Stats:
    """How an engine stands.

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
    that write in bytes, or go on within tokens, have caches of their own for that many texts: a few
    of these work at a time, and who wants another one waits until one of them is done.

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
        self._runner = Runner(ensemble.backends, max_concurrent, clock)
        self._workers = PolicyWorkers(ensemble, self._runner, self._news)
        self._queue: dict[int, Handle] = {}
        self._n_active = 0
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
                there may be none.

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
            handles = [
                Handle(request, told, next(self._numbers), self._clock())
                for request, told in zip(requests, listeners, strict=True)
            ]
            self._coming.extend(handles)
            self._news.notify()
        return handles

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
        """How it stands now."""
        with self._news:
            active = self._n_active
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
                    self._admit()
                    at_work = [worker for worker in self._workers.values() if worker.active]
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
            while not (self._coming or self._leaving or self._queue or self._n_active):
                if self._deadline is not None:
                    return False
                self._news.wait()
            coming, leaving = list(self._coming), list(self._leaving)
            self._coming.clear()
            self._leaving.clear()
            late = self._deadline is not None and self._clock() >= self._deadline
        for handle in coming:
            self._accept(handle)
        for handle in leaving:
            self._let_go(handle)
        return not late

    def _accept(self, handle: Handle) -> None:
        """Read the prompt of a new text, and let it wait for a slot."""
        request = handle.request
        try:
            worker = self._workers.open(request.choice)
            row = worker.live.row(request.prompt, request.number, request.settings, request.seed)
        except Exception as error:
            self._fail(handle, error)
            return
        row.number = handle.number
        handle.row = row
        worker.waiting[handle.number] = handle
        self._queue[handle.number] = handle
        n_prompt = next(len(ids) for ids in row.prompt_ids if ids)
        handle.tell(Begun(n_prompt))

    def _admit(self) -> None:
        """Give slots to those who wait, first come, first served."""
        while self._queue and self._n_active < self.max_concurrent:
            number, handle = next(iter(self._queue.items()))
            worker = self._workers.get(handle.request.choice.key)
            assert worker is not None, "who waits keeps it from being closed"
            # Nobody overtakes who waits for room, or those who work would never be done.
            if not worker.active and not (self._workers.has_room(worker) or not self._n_active):
                return
            del self._queue[number]
            worker.active[number] = worker.waiting.pop(number)
            assert handle.row is not None
            worker.live.add(handle.row)
            self._n_active += 1

    def _round(self, worker: PolicyWorker) -> Passes[None]:
        """One round of a policy's loop, and the news of it."""
        try:
            pieces = yield from worker.live.loop.step()
            for row, error in worker.live.failed():  # and no other text
                self._fail(self._taken_out(worker, row.number), error)
            answers = {row.number: worker.live.answer(row) for row in worker.live.finished()}
            for number, handle in worker.active.items():
                new = [piece for piece in pieces if piece.row == number]
                handle.tell_growth(worker.live, new)
        except Exception as error:
            self._start_over(worker, error)
            return
        for number, answer in answers.items():
            handle = self._taken_out(worker, number)
            self._end(handle, "finished", answer.trace.tokens)
            handle.tell(Ended(answer))

    def _taken_out(self, worker: PolicyWorker, number: int) -> Handle:
        self._n_active -= 1
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
        self._n_active -= len(failed)
        self._workers.retire([worker])
        for handle in failed:
            self._fail(handle, error)
        if not worker.waiting:
            return
        try:
            self._workers.reopen(worker)
        except Exception as again:
            for number, handle in worker.waiting.items():
                del self._queue[number]
                self._fail(handle, again)

    def _let_go(self, handle: Handle) -> None:
        """Stop writing a text, if it is not finished."""
        worker = self._workers.get(handle.request.choice.key)
        if worker is None or handle.row is None:
            return
        if worker.active.pop(handle.number, None) is not None:
            self._n_active -= 1
            worker.live.cancel(handle.row)
        elif worker.waiting.pop(handle.number, None) is not None:
            del self._queue[handle.number]
        else:
            return
        self._end(handle, "cancelled", worker.live.tokens(handle.row))

    def _fail(self, handle: Handle, error: Exception) -> None:
        _log(error)
        self._end(handle, "failed", ())
        # Its frames, which have been logged, hold caches, and whoever asked may keep it.
        handle.tell(Failed(error.with_traceback(None)))

    def _end(self, handle: Handle, outcome: Outcome, tokens: Sequence[TracedToken]) -> None:
        """Free the place of a text."""
        with self._news:
            self._n_texts -= 1
            self._counts.end(outcome, tokens, self._clock() - handle.since)
        handle.row = None

    def _break_off(self) -> None:
        """Nothing is written any more: tell those who still wait for something."""
        with self._news:
            self._deadline = self._clock() if self._deadline is None else self._deadline
            left = [*self._coming]
            self._coming.clear()
            workers = list(self._workers.values())
            self._workers.retire(workers)
        left += [handle for worker in workers for handle in worker.handles]
        self._queue.clear()
        self._n_active = 0
        self._n_broken_off = len(left)
        for handle in left:
            self._fail(handle, ClosedError("the server has shut down before this was finished."))


def _log(error: Exception) -> None:
    """Of what came of a text: what is not the fault of whoever asked."""
    if not isinstance(error, MulticolmError):
        _LOG.error("a text could not be written", exc_info=error)
    elif not isinstance(error, InputError | ConfigError | CapabilityError | ClosedError):
        _LOG.error("a text could not be written: %s", error)
