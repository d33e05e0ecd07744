"""Several texts that llama.cpp follows, each in its own sequence of one context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multicolm.backend.base import Look, Session
from multicolm.backend.llama_cpp.context import Context, Entry

__all__ = ["LlamaCppSession"]

_FIRST = 256  # tokens per row that there is room for in the beginning


class LlamaCppSession(Session):
    """Rows of one context, which moves to a larger one when a text outgrows it.

    So that memory goes with what is written and not with what a model could hold.

    Args:
        make: makes a context of so many rows, of so many tokens each.
        n_rows: number of rows.
        context_length: the most tokens that a row will ever hold.
    """

    def __init__(
        self, make: Callable[[int, int], Context], n_rows: int, context_length: int
    ) -> None:
        self._make = make
        self._longest = context_length
        self._ids: list[list[int]] = [[] for _ in range(n_rows)]
        self._n_cached = [0] * n_rows
        self._context = make(n_rows, min(_FIRST, context_length))

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # derived, so it cannot go stale
        """Per row, how many tokens it holds."""
        return [len(ids) for ids in self._ids]

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Look:
        """See :meth:`multicolm.backend.base.Session.feed`."""
        entries: list[Entry] = []
        for row, new, count in zip(rows, tokens, n_last, strict=True):
            ids = self._ids[row]
            ids.extend(new)
            # Usually the new tokens; all of them where a cut row could not be kept in part.
            for place in range(self._n_cached[row], len(ids)):
                entries.append(Entry(ids[place], place, row, place >= len(ids) - count))
        self._reserve(max(len(self._ids[row]) for row in rows))
        logits, states, n_passes = self._context.read(entries, hidden=hidden)
        for row in rows:
            self._n_cached[row] = len(self._ids[row])
        return Look(logits, states, n_passes)

    def _reserve(self, length: int) -> None:
        """Make room for rows of so many tokens."""
        if length <= self._context.n_places:
            return
        doubled = min(2 * self._context.n_places, self._longest)
        larger = self._make(len(self._ids), max(length, doubled))
        for row, n_cached in enumerate(self._n_cached):
            if n_cached:
                self._context.copy_to(larger, row)
        self._context = larger

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        del self._ids[row][length:]
        if self._n_cached[row] > length:
            kept = self._context.cut(row, length)
            self._n_cached[row] = length if kept else 0
