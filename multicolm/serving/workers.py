"""The policies at work in an engine, and the texts of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
from multicolm.decoding.runner import Runner
from multicolm.ensemble import Ensemble
from multicolm.serving.catalog import Choice
from multicolm.serving.events import Event, GenerationRequest, Grown
from multicolm.types import Piece, Usage

__all__ = ["PROMPT_TOKENS", "Backlog", "Handle", "PolicyWorker", "PolicyWorkers"]

_LOG = logging.getLogger("multicolm.serving")
_KEPT = 4  # policies that have caches, in use or not; each other threshold is another policy
PROMPT_TOKENS = 256
"""Of new prompts, about so many tokens are read between two rounds of the texts under way."""
_MOST_UNREAD = 256  # tokens of a request; one with 20 alternatives has some 5 kB


@dataclass(eq=False, slots=True)
class Backlog:
    """What was written for one request, and its client has not read yet.

    The engine's thread counts what it delivers, the client's what it reads; no one else writes
    either number, so that no lock is needed.

    Attributes:
        n_delivered: tokens, or pieces of a text where these are more.
        n_read: of these.
    """

    n_delivered: int = 0
    n_read: int = 0

    @property
    def is_full(self) -> bool:
        """Whether the texts of the request have to wait until more is read."""
        return self.n_delivered - self.n_read >= _MOST_UNREAD


@dataclass(eq=False, slots=True)
class Handle:
    """A text on its way; hand it back to the engine's methods. The rest is the engine's own."""

    request: GenerationRequest
    listener: Callable[[Event], None]
    number: int
    since: float
    backlog: Backlog
    row: Row | None = None
    n_delivered: int = 0

    def deliver(self, event: Event) -> None:
        """Hand an event to whoever asked.

        A listener is anybody's code: whatever it raises must not cost the others their texts.
        """
        try:
            self.listener(event)
        except Exception:
            _LOG.exception("an event could not be delivered")

    def deliver_growth(self, live: Live, pieces: Sequence[Piece]) -> None:
        """Deliver what was written since the last time."""
        assert self.row is not None
        if not pieces and len(self.row.written) == self.n_delivered:
            return
        tokens = live.tokens(self.row, self.n_delivered)
        self.n_delivered += len(tokens)
        if pieces or tokens:
            event = Grown(tuple(pieces), tuple(tokens))
            self.backlog.n_delivered += event.size
            self.deliver(event)


@dataclass(eq=False)
class PolicyWorker:
    """One policy at work, and who waits for what from it."""

    choice: Choice
    live: Live
    waiting: dict[int, Handle] = field(default_factory=dict)
    active: dict[int, Handle] = field(default_factory=dict)

    @property
    def handles(self) -> list[Handle]:
        """Its texts."""
        return [*self.active.values(), *self.waiting.values()]

    @property
    def is_idle(self) -> bool:
        """Whether it has no texts."""
        return not self.waiting and not self.active

    @property
    def can_write(self) -> bool:
        """Whether the client of one of its texts reads what is written."""
        return not all(handle.backlog.is_full for handle in self.active.values())

    @property
    def has_caches(self) -> bool:
        """Whether it has caches of its own; most policies share those of all."""
        loop = self.live.loop
        return loop.has_own_sessions and bool(self.active or loop.readers.opened)

    def pause_unread(self) -> None:
        """Have those texts wait in their places whose clients do not read."""
        for handle in self.active.values():
            assert handle.row is not None
            handle.row.is_paused = handle.backlog.is_full


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
        self._queue: dict[int, Handle] = {}
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

    @property
    def n_active(self) -> int:
        """How many texts have a slot."""
        return sum(len(worker.active) for worker in self.values())

    @property
    def is_idle(self) -> bool:
        """Whether there are no texts at all."""
        return all(worker.is_idle for worker in self.values())

    @property
    def can_work(self) -> bool:
        """Whether a text can be written further, or begun."""
        return self._next() is not None or any(worker.can_write for worker in self.values())

    def enqueue(self, worker: PolicyWorker, handle: Handle) -> None:
        """Let a text wait for a slot."""
        worker.waiting[handle.number] = self._queue[handle.number] = handle

    def dequeue(self, worker: PolicyWorker, handle: Handle) -> None:
        """Let a text wait no longer."""
        del worker.waiting[handle.number], self._queue[handle.number]

    def admit(self) -> None:
        """Give slots to those who wait, first come, first served, and to few in one round."""
        n_tokens = 0
        while n_tokens < PROMPT_TOKENS and (found := self._next()) is not None:
            worker, handle = found
            assert handle.row is not None
            n_tokens += max(map(len, handle.row.prompt_ids))
            self.dequeue(worker, handle)
            worker.active[handle.number] = handle
            worker.live.add(handle.row)

    def _next(self) -> tuple[PolicyWorker, Handle] | None:
        """Who gets the next slot, if there is one."""
        if not self._queue or self.n_active == self._runner.slots.n:
            return None
        handle = next(iter(self._queue.values()))
        worker = self._by_key[handle.request.choice.key]  # who waits keeps it from being closed
        # Nobody overtakes who waits for room, or those who work would never be done.
        has_room = worker.active or not self.n_active or self.has_room(worker)
        return (worker, handle) if has_room else None

    def usage(self) -> dict[str, Usage]:
        """What each model did for policies that work, and for those that did before."""
        with self._lock:
            models = dict(self._retired)
            for worker in self.values():
                models = {name: models[name] + used for name, used in worker.live.usage.items()}
        return models

    def _live(self, choice: Choice) -> Live:
        return self._ensemble.live(choice.policy, runner=self._runner)
