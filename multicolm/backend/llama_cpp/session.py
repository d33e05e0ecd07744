"""Several texts that llama.cpp follows, each in its own sequence of a context.

LlamaCppSession    rows of one context
SplitSession       more rows than one context takes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multicolm.backend.base import ModelOutput, Session, TokenSession
from multicolm.backend.llama_cpp.context import Context, Entry

__all__ = ["FIRST", "LlamaCppSession", "SplitSession"]

FIRST = 256
"""Tokens that there is room for in the beginning."""


class LlamaCppSession(TokenSession):
    """Rows of one context, which moves to a larger one when texts outgrow it.

    So that memory goes with what is written and not with what a model could hold.

    Args:
        make: makes a context of so many rows and tokens, the latter of each row, or of all rows
            together.
        n_rows: number of rows.
        shared: whether rows share the room for their tokens.
    """

    def __init__(
        self, make: Callable[[int, int, bool], Context], n_rows: int, shared: bool
    ) -> None:
        super().__init__(n_rows)
        self._make = make
        self._shared = shared
        self._n_cached = [0] * n_rows
        self._context = make(n_rows, FIRST, shared)

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        entries: list[Entry] = []
        for row, new, count in zip(rows, tokens, n_last, strict=True):
            ids = self._ids[row]
            ids.extend(new)
            # Usually the new tokens; all of them where a cut row could not be kept in part.
            for place in range(self._n_cached[row], len(ids)):
                entries.append(Entry(ids[place], place, row, place >= len(ids) - count))
        self._reserve()
        logits, states, n_passes = self._context.read(entries, hidden=hidden)
        for row in rows:
            self._n_cached[row] = len(self._ids[row])
        return ModelOutput(logits, states, n_passes)

    def _reserve(self) -> None:
        """Make room for what the rows hold."""
        needed = sum(self.lengths) if self._shared else max(self.lengths)
        if needed <= self._context.n_places:
            return
        larger = self._make(len(self._ids), max(needed, 2 * self._context.n_places), self._shared)
        for row, n_cached in enumerate(self._n_cached):
            if n_cached:
                self._context.copy_to(larger, row)
        self._context = larger

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        super().truncate(row, length)
        if self._n_cached[row] > length:
            kept = self._context.cut(row, length)
            self._n_cached[row] = length if kept else 0


class SplitSession(Session):
    """Rows of several sessions, dealt out in order.

    Args:
        parts: sessions of ``size`` rows each, but for the last.
        size: how many.
    """

    def __init__(self, parts: Sequence[Session], size: int) -> None:
        self._parts = parts
        self._size = size

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # derived, so it cannot go stale
        """Per row, how many tokens it holds."""
        return [length for part in self._parts for length in part.lengths]

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        outputs: list[ModelOutput] = []
        for number, part in enumerate(self._parts):
            which = [i for i, row in enumerate(rows) if row // self._size == number]
            if which:
                own = [rows[i] % self._size for i in which]
                new, counts = [tokens[i] for i in which], [n_last[i] for i in which]
                outputs.append(part.feed(own, new, counts, hidden=hidden))
        return ModelOutput.joined(outputs)

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        self._parts[row // self._size].truncate(row % self._size, length)
