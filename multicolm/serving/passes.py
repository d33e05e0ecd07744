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

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.decoding.slots import Slots

__all__ = ["SharedSlots"]


class SharedSlots(Slots):
    """Places that several policies share, and with them a session of each model.

    Of a model in a server each policy has a session of its own: servers put requests together
    themselves. A model that fails is opened anew, for all: what its session holds nobody knows.
    Texts of those who did not want it run then are read anew.

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
        self.session(k)
        return _Lane(self, k)

    def session(self, k: int) -> Session:
        """The session of model ``k`` that all share."""
        if k not in self._sessions:
            self._sessions[k] = super().open(k)
        return self._sessions[k]

    def run(self, rounds: Sequence[Callable[[], object]]) -> None:
        """Run some rounds to their ends, and their forward passes together.

        A model that fails raises its error in every round that wanted it run.

        Args:
            rounds: each of another policy, over other places.
        """
        self._is_shared = len(rounds) > 1
        try:
            for each in rounds:
                greenlet(each).switch()
            while self._wanted:
                first = min(wanted.k for wanted in self._wanted)
                now = [wanted for wanted in self._wanted if wanted.k == first]
                self._wanted = [wanted for wanted in self._wanted if wanted.k != first]
                self._pass(first, now)
                for wanted in now:
                    assert wanted.waiting is not None
                    wanted.waiting.switch()
        finally:
            self._is_shared = False
            self._wanted.clear()

    def feed(self, wanted: _Wanted) -> ModelOutput:
        """Run a model for a round, together with the other rounds that want it run."""
        if self._is_shared:
            wanted.waiting = getcurrent()
            self._wanted.append(wanted)
            assert wanted.waiting.parent is not None, "a round runs in a greenlet"
            wanted.waiting.parent.switch()
        else:
            self._pass(wanted.k, [wanted])
        if wanted.error is not None:
            # An error holds this frame: no circle, or caches would wait for the garbage collector.
            error, wanted.error = wanted.error, None
            try:
                raise error
            finally:
                del error
        assert wanted.output is not None
        return wanted.output

    def _pass(self, k: int, wanted: Sequence[_Wanted]) -> None:
        """Run a model once for all who want it."""
        lines = sorted(
            (row, number, i)
            for number, each in enumerate(wanted)
            for i, row in enumerate(each.rows)
        )
        start = self._clock()
        try:
            output = self.session(k).feed(
                [row for row, _, _ in lines],
                [wanted[number].tokens[i] for _, number, i in lines],
                [wanted[number].n_last[i] for _, number, i in lines],
                hidden=any(each.hidden for each in wanted),
            )
            self._models[k].synchronize()
        except Exception as error:
            self._sessions.pop(k, None)
            for each in wanted:
                each.error = error
            return
        seconds = self._clock() - start
        n_read = sum(each.n_read for each in wanted)
        for number, index in enumerate(_lines_of(wanted, lines)):
            each = wanted[number]
            logits, hidden = output.logits, output.hidden if each.hidden else None
            if len(wanted) > 1:
                chosen = torch.tensor(index, device=logits.device)
                logits = logits[chosen]
                hidden = None if hidden is None else hidden[chosen]
            n_passes = 0 if number else output.n_passes  # each pass counts once
            each.output = ModelOutput(
                logits, hidden, n_passes, seconds=seconds * each.n_read / n_read
            )


@dataclass(eq=False, slots=True)
class _Wanted:
    """What a round wants to be fed, and what comes of it."""

    k: int
    rows: Sequence[int]
    tokens: Sequence[Sequence[int]]
    n_last: Sequence[int]
    hidden: bool
    waiting: greenlet | None = None
    output: ModelOutput | None = None
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

    def __init__(self, slots: SharedSlots, k: int) -> None:
        self._slots = slots
        self._k = k

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # those of the session
        """Per row, how many tokens it holds."""
        return self._slots.session(self._k).lengths

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        return self._slots.feed(_Wanted(self._k, rows, tokens, n_last, hidden))

    def logprobs_of(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        ids: Sequence[int],
        after: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.logprobs_of`."""
        return self._slots.session(self._k).logprobs_of(rows, lengths, ids, after)

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        self._slots.session(self._k).truncate(row, length)
