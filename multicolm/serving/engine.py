"""One thread that owns the models, and writes the texts of all who ask, batched with each other.

Whoever asks gets a ticket per text and hears about it by calls from that thread. Everything that
belongs to a text is let go when it is finished, has failed, or is cancelled.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal, TypeAlias

from multicolm.config import GenerationConfig
from multicolm.decoding.row import Row
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
from multicolm.live import Live
from multicolm.numbers import check_whole
from multicolm.serving.menu import Choice
from multicolm.serving.passes import SharedSlots
from multicolm.types import MIXTURE, Answer, Piece, Prompt, TracedToken, Usage

__all__ = [
    "Begun",
    "Closing",
    "Ended",
    "Engine",
    "Event",
    "Failed",
    "Grown",
    "Order",
    "Stats",
    "Ticket",
]

_LOG = logging.getLogger("multicolm.serving")
_KEPT = 4  # policies that have caches, in use or not; each other threshold is another policy
_PAST = 32  # texts whose durations tell how long the next will take

Outcome: TypeAlias = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Order:
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
class Ticket:
    """A text on its way; hand it back to :meth:`Engine.cancel`. The rest is the engine's own."""

    order: Order
    deliver: Callable[[Event], None]
    number: int
    since: float
    row: Row | None = None
    n_told: int = 0


@dataclass(eq=False)
class _Shop:
    """One policy at work, and who waits for what from it."""

    choice: Choice
    live: Live
    waiting: dict[int, Ticket] = field(default_factory=dict)
    active: dict[int, Ticket] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.active

    @property
    def has_caches(self) -> bool:
        """Whether it has caches of its own; most policies share those of all."""
        router = self.live.router
        return router.has_own_sessions and bool(self.active or router.readers)


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
        self._coming: deque[Ticket] = deque()
        self._leaving: deque[Ticket] = deque()
        self._n_texts = 0
        self._deadline: float | None = None
        self._shops: dict[str, _Shop] = {}
        self._retired = dict.fromkeys(ensemble.models, Usage())
        self._written = dict.fromkeys([*ensemble.models, MIXTURE], 0)
        self._outcomes: dict[Outcome, int] = dict.fromkeys(("finished", "cancelled", "failed"), 0)
        self._durations: deque[float] = deque(maxlen=_PAST)
        # What follows is the working thread's own.
        self._slots = SharedSlots(ensemble.backends, max_concurrent)
        self._queue: dict[int, Ticket] = {}
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
        """Whether it works, and takes orders."""
        return self._thread.is_alive() and self._deadline is None

    @property
    def capacity(self) -> int:
        """How many texts there can be at a time, written and waiting."""
        return self.max_concurrent + self.max_waiting

    def submit(
        self, orders: Sequence[Order], listeners: Sequence[Callable[[Event], None]]
    ) -> list[Ticket]:
        """Ask for some texts, for all of them or for none.

        Args:
            orders: what is wanted.
            listeners: per order, what is called about it from the engine's thread; it must not
                wait. The last call is with :class:`Ended` or :class:`Failed`; after a cancellation
                there may be none.

        Raises:
            BusyError: if there are too many texts already.
            ClosedError: if the engine does not work, or no longer.
        """
        with self._news:
            if not self.is_open:
                raise ClosedError("the server is shutting down; ask again when it is back.")
            if self._n_texts + len(orders) > self.capacity:
                raise BusyError(
                    f"{self._n_texts} of {self.capacity} places are taken; ask again later.",
                    retry_after=self._time_to_wait(),
                )
            self._n_texts += len(orders)
            tickets = [
                Ticket(order, told, next(self._numbers), self._clock())
                for order, told in zip(orders, listeners, strict=True)
            ]
            self._coming.extend(tickets)
            self._news.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Write no further in a text; its place is free before the next round of the loop."""
        with self._news:
            self._leaving.append(ticket)
            self._news.notify()

    def close(self, grace: float = 0.0) -> Closing:
        """Take no more orders, finish what runs, and end.

        Args:
            grace: after so many seconds what is not finished is broken off, with
                :class:`~multicolm.errors.ClosedError`.
        """
        with self._news:
            finished = self._outcomes["finished"]
            deadline = self._clock() + grace
            # Asked once more, it may only be in more of a hurry.
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join()
        return Closing(self._outcomes["finished"] - finished, self._n_broken_off)

    def stats(self) -> Stats:
        """How it stands now."""
        with self._news:
            models = dict(self._retired)
            for shop in self._shops.values():
                models = {name: models[name] + used for name, used in shop.live.usage.items()}
            models[MIXTURE] = Usage()
            models = {
                name: used + Usage(tokens_written=self._written[name])
                for name, used in models.items()
            }
            active = self._n_active
            return Stats(
                active,
                max(0, self._n_texts - active),
                self.max_concurrent,
                self.max_waiting,
                models,
                dict(self._outcomes),
            )

    def _time_to_wait(self) -> int:
        """In how many seconds, about, a place will be free."""
        if not self._durations:
            return 1
        typical = sorted(self._durations)[len(self._durations) // 2]
        return min(60, max(1, math.ceil(typical)))

    # From here on everything runs in the engine's own thread.

    def _work(self) -> None:
        ensemble = self.ensemble
        try:
            with torch_threads(ensemble.backends, ensemble.generation.threads):
                while self._listen():
                    self._admit()
                    at_work = [shop for shop in self._shops.values() if shop.active]
                    self._slots.run([partial(self._round, shop) for shop in at_work])
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
        for ticket in coming:
            self._accept(ticket)
        for ticket in leaving:
            self._let_go(ticket)
        return not late

    def _accept(self, ticket: Ticket) -> None:
        """Read the prompt of a new text, and let it wait for a slot."""
        order = ticket.order
        try:
            shop = self._shop(order.choice)
            row = shop.live.row(order.prompt, order.number, order.settings, order.seed)
        except Exception as error:
            self._fail(ticket, error)
            return
        row.number = ticket.number
        ticket.row = row
        shop.waiting[ticket.number] = ticket
        self._queue[ticket.number] = ticket
        n_prompt = next(len(ids) for ids in row.prompt_ids if ids)
        self._tell(ticket, Begun(n_prompt))

    def _shop(self, choice: Choice) -> _Shop:
        """Where a policy works; those that nobody has used for longest are closed."""
        shop = self._shops.get(choice.key)
        if shop is None:
            shop = _Shop(choice, self._open(choice))
        idle = [s for s in self._shops.values() if s.is_idle and s is not shop]
        with self._news:
            # The last one in a dict is the one that was used last.
            self._shops.pop(choice.key, None)
            self._shops[choice.key] = shop
            for old in idle[: max(0, len(self._shops) - _KEPT)]:
                self._retire(old)
        return shop

    def _open(self, choice: Choice) -> Live:
        return self.ensemble.live(choice.policy, slots=self._slots)

    def _retire(self, shop: _Shop) -> None:
        """Let go of a policy and its caches, but not of what was counted; under the lock."""
        for name, used in shop.live.usage.items():
            self._retired[name] += used
        del self._shops[shop.choice.key]

    def _admit(self) -> None:
        """Give slots to those who wait, first come, first served."""
        while self._queue and self._n_active < self.max_concurrent:
            number, ticket = next(iter(self._queue.items()))
            shop = self._shops[ticket.order.choice.key]
            # Nobody overtakes who waits for room, or those who work would never be done.
            if not shop.active and not self._has_room(shop):
                return
            del self._queue[number]
            shop.active[number] = shop.waiting.pop(number)
            assert ticket.row is not None
            shop.live.add(ticket.row)
            self._n_active += 1

    def _has_room(self, shop: _Shop) -> bool:
        """Whether a policy can begin to work; those that have caches and no texts give them up."""
        if not shop.live.router.has_own_sessions:
            return True
        others = [s for s in self._shops.values() if s is not shop and s.has_caches]
        idle = [s for s in others if s.is_idle][: max(0, len(others) + 1 - _KEPT)]
        with self._news:
            for old in idle:
                self._retire(old)
        return len(others) - len(idle) < _KEPT or not self._n_active

    def _round(self, shop: _Shop) -> None:
        """One round of a policy's loop, and the news of it."""
        try:
            pieces = shop.live.step()
            answers = {row.number: shop.live.answer(row) for row in shop.live.finished()}
            new: dict[int, list[Piece]] = {}
            for piece in pieces:
                new.setdefault(piece.row, []).append(piece)
            for number, ticket in shop.active.items():
                self._tell_growth(shop.live, ticket, new.get(number, ()))
        except Exception as error:
            self._start_over(shop, error)
            return
        for number, answer in answers.items():
            ticket = shop.active.pop(number)
            self._n_active -= 1
            self._end(ticket, "finished", answer.trace.tokens)
            self._tell(ticket, Ended(answer))

    def _tell_growth(self, live: Live, ticket: Ticket, pieces: Sequence[Piece]) -> None:
        row = ticket.row
        assert row is not None
        if not pieces and len(row.written) == ticket.n_told:
            return
        tokens = live.tokens(row, ticket.n_told)
        ticket.n_told += len(tokens)
        if pieces or tokens:
            self._tell(ticket, Grown(tuple(pieces), tuple(tokens)))

    def _start_over(self, shop: _Shop, error: Exception) -> None:
        """A round has failed: those who were in it fail, those who wait do not.

        Unless the policy cannot be opened once more: then they fail, too.
        """
        failed = list(shop.active.values())
        for ticket in failed:
            assert ticket.row is not None
            shop.live.cancel(ticket.row)  # its slot is for others too
        shop.active.clear()
        self._n_active -= len(failed)
        with self._news:
            self._retire(shop)
        for ticket in failed:
            self._fail(ticket, error)
        if not shop.waiting:
            return
        try:
            shop.live = self._open(shop.choice)
        except Exception as again:
            for number, ticket in shop.waiting.items():
                del self._queue[number]
                self._fail(ticket, again)
            return
        with self._news:
            self._shops[shop.choice.key] = shop

    def _let_go(self, ticket: Ticket) -> None:
        """Stop writing a text, if it is not finished."""
        shop = self._shops.get(ticket.order.choice.key)
        if shop is None or ticket.row is None:
            return
        if shop.active.pop(ticket.number, None) is not None:
            self._n_active -= 1
            shop.live.cancel(ticket.row)
        elif shop.waiting.pop(ticket.number, None) is not None:
            del self._queue[ticket.number]
        else:
            return
        self._end(ticket, "cancelled", shop.live.tokens(ticket.row))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, MulticolmError):
            _LOG.error("a text could not be written", exc_info=error)
        elif not isinstance(error, InputError | ConfigError | CapabilityError | ClosedError):
            _LOG.error("a text could not be written: %s", error)
        self._end(ticket, "failed", ())
        # Its frames, which have been logged, hold caches, and whoever asked may keep it.
        self._tell(ticket, Failed(error.with_traceback(None)))

    def _end(self, ticket: Ticket, outcome: Outcome, tokens: Sequence[TracedToken]) -> None:
        """Free the place of a text."""
        with self._news:
            self._n_texts -= 1
            self._outcomes[outcome] += 1
            for token in tokens:
                self._written[token.model] += 1
            if outcome == "finished":
                self._durations.append(self._clock() - ticket.since)
        ticket.row = None

    def _break_off(self) -> None:
        """Nothing is written any more: tell those who still wait for something."""
        with self._news:
            self._deadline = self._clock() if self._deadline is None else self._deadline
            left = [*self._coming]
            self._coming.clear()
            for shop in list(self._shops.values()):
                left += [*shop.active.values(), *shop.waiting.values()]
                self._retire(shop)
        self._queue.clear()
        self._n_active = 0
        self._n_broken_off = len(left)
        for ticket in left:
            self._fail(ticket, ClosedError("the server has shut down before this was finished."))

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.deliver(event)
        except Exception:
            # Whoever asked is gone; that must not cost the others anything.
            _LOG.exception("an event could not be delivered")
