"""Forward passes that several policies share.

The round of each policy runs in a greenlet of its own up to where a model has to be run, and waits
there. When all of them wait, the first model of the ensemble that is wanted is run once for all who
want it. Policies look at models in ascending order, so that a model is run about once in a round
of all policies, however many they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet

from multicolm.backend.base import Look, Model, Session
from multicolm.decoding.slots import Slots

__all__ = ["SharedSlots"]


class SharedSlots(Slots):
    """Places that several policies share, and with them a session of each model.

    Of a model in a server each policy has a session of its own: servers put requests together
    themselves.

    Args:
        models: the ensemble's.
        n: how many places there are.
        clock: current time in seconds.
    """

    def __init__(
        self, models: Sequence[Model], n: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(models, n)
        self._clock = clock
        self._sessions: dict[int, Session] = {}
        self._wanted: list[_Wanted] = []
        self._is_shared = False  # whether several rounds are at work

    def open(self, k: int) -> Session:
        """The session of model ``k``."""
        if self._models[k].server:
            return super().open(k)
        if k not in self._sessions:
            self._sessions[k] = super().open(k)
        return _Lane(self, k, self._sessions[k])

    def run(self, rounds: Sequence[Callable[[], object]]) -> None:
        """Run some rounds to their ends, and their forward passes together.

        A model that fails raises its error in every round that wanted it run, and is opened anew
        for whoever opens it next.

        Args:
            rounds: each of another policy, over other places.
        """
        self._is_shared = len(rounds) > 1
        try:
            for each in rounds:
                greenlet(each).switch()
            while self._wanted:
                first = min(self._wanted, key=lambda wanted: wanted.k)
                now = [wanted for wanted in self._wanted if wanted.session is first.session]
                self._wanted = [wanted for wanted in self._wanted if wanted not in now]
                self._pass(first.k, first.session, now)
                for wanted in now:
                    wanted.waiting.switch()
        finally:
            self._is_shared = False
            self._wanted.clear()

    def feed(
        self,
        k: int,
        session: Session,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        hidden: bool,
    ) -> Look:
        """Feed a session of model ``k``, together with the other rounds that want to."""
        if not self._is_shared:
            return session.feed(rows, tokens, n_last, hidden=hidden)
        current = getcurrent()
        wanted = _Wanted(k, session, rows, tokens, n_last, hidden, current)
        self._wanted.append(wanted)
        assert current.parent is not None, "a round runs in a greenlet"
        current.parent.switch()
        if wanted.error is not None:
            raise wanted.error
        assert wanted.look is not None
        return wanted.look

    def _pass(self, k: int, session: Session, wanted: Sequence[_Wanted]) -> None:
        """Run a model once for all who want it."""
        lines = sorted(
            (row, number, i)
            for number, each in enumerate(wanted)
            for i, row in enumerate(each.rows)
        )
        start = self._clock()
        try:
            look = session.feed(
                [row for row, _, _ in lines],
                [wanted[number].tokens[i] for _, number, i in lines],
                [wanted[number].n_last[i] for _, number, i in lines],
                hidden=any(each.hidden for each in wanted),
            )
            self._models[k].wait()
        except Exception as error:
            # What it holds now nobody knows.
            if self._sessions.get(k) is session:
                del self._sessions[k]
            for each in wanted:
                each.error = error
            return
        seconds = self._clock() - start
        n_read = sum(each.n_read for each in wanted)
        for number, index in enumerate(_lines_of(wanted, lines)):
            each = wanted[number]
            logits, hidden = look.logits, look.hidden if each.hidden else None
            if len(wanted) > 1:
                chosen = torch.tensor(index, device=logits.device)
                logits = logits[chosen]
                hidden = None if hidden is None else hidden[chosen]
            n_passes = 0 if number else look.n_passes  # each pass counts once
            each.look = Look(logits, hidden, n_passes, seconds=seconds * each.n_read / n_read)


@dataclass(eq=False, slots=True)
class _Wanted:
    """What a round wants to be fed, and what comes of it."""

    k: int
    session: Session
    rows: Sequence[int]
    tokens: Sequence[Sequence[int]]
    n_last: Sequence[int]
    hidden: bool
    waiting: greenlet
    look: Look | None = None
    error: Exception | None = None

    @property
    def n_read(self) -> int:
        return sum(map(len, self.tokens))


def _lines_of(
    wanted: Sequence[_Wanted], lines: Sequence[tuple[int, int, int]]
) -> Iterator[list[int]]:
    """Per round, where its predictions stand among those of all."""
    places: dict[tuple[int, int], range] = {}
    first = 0
    for _, number, i in lines:
        n = wanted[number].n_last[i]
        places[number, i] = range(first, first + n)
        first += n
    for number, each in enumerate(wanted):
        yield [line for i in range(len(each.rows)) for line in places[number, i]]


class _Lane(Session):
    """The part of a shared session that one policy uses: the rows of its places."""

    def __init__(self, slots: SharedSlots, k: int, session: Session) -> None:
        self._slots = slots
        self._k = k
        self._session = session

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # those of the session
        """Per row, how many tokens it holds."""
        return self._session.lengths

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Look:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        return self._slots.feed(self._k, self._session, rows, tokens, n_last, hidden)

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        self._session.truncate(row, length)
