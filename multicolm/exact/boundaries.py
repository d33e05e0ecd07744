"""Which tokens of a byte-pair encoding cannot be adjacent, read off the merges.

Two neighbours ``a b`` are the encoding of their joint string if no merge would have crossed the
seam between them. While ``a`` and ``b`` are put together, the symbols that touch the seam are the
right spine of ``a`` (a, its right part, the right part of that, ...) and the left spine of ``b``;
each touches it from the merge that makes it until the merge that absorbs it. A merge of two such
symbols happens if its turn comes while both are there. A sequence is an encoding if all its
neighbours are such pairs.

Source: Berglund and van der Merwe 2023, "Formalizing BPE tokenization".
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool

__all__ = ["BoundaryIndex"]

_NEVER = 1 << 40  # later than any merge


class BoundaryIndex:
    """The pairs of neighbours that a byte-pair encoding allows.

    Attributes:
        is_made: per token, whether the encoding of its own string is the token alone.

    Args:
        n_tokens: number of ids.
        symbols: the ids with which every string begins (bytes or characters).
        merges: (left, right, whole) ids, in the order of their ranks.
        lengths: per id, the length of its piece; a whole is longer than its parts.
    """

    def __init__(
        self,
        n_tokens: int,
        symbols: Iterable[int],
        merges: Sequence[tuple[int, int, int]],
        lengths: Sequence[int],
    ) -> None:
        self._merges = {(a, b): (rank, c) for rank, (a, b, c) in enumerate(merges)}
        self._parts: list[tuple[int, int] | None] = [None] * n_tokens
        # The highest rank in a token's making: the turn at which it is there. Ranks need not grow
        # towards the whole; a merge of low rank that had to wait for its parts comes at once.
        self._turn = np.full(n_tokens, _NEVER, dtype=np.int64)
        self.is_made: Bool[np.ndarray, "ids"] = np.zeros(n_tokens, dtype=bool)
        for symbol in symbols:
            self.is_made[symbol], self._turn[symbol] = True, -1
        self._make(merges, lengths)
        self._index(merges)
        self._rows: dict[int, np.ndarray] = {}

    def _make(self, merges: Sequence[tuple[int, int, int]], lengths: Sequence[int]) -> None:
        for rank in sorted(range(len(merges)), key=lambda rank: lengths[merges[rank][2]]):
            a, b, whole = merges[rank]
            if self.is_made[whole] or not (self.is_made[a] and self.is_made[b]):
                continue
            if self._merges[a, b] == (rank, whole) and self._meets(a, b, whole):
                self.is_made[whole], self._parts[whole] = True, (a, b)
                self._turn[whole] = max(rank, self._turn[a], self._turn[b])

    def _index(self, merges: Sequence[tuple[int, int, int]]) -> None:
        """Merges by their left part, and left spines by the symbols in them."""
        by_left: dict[int, list[tuple[int, int]]] = {}
        for (a, b), (rank, _) in self._merges.items():
            by_left.setdefault(a, []).append((b, rank))
        self._by_left = {a: np.array(sorted(pairs)) for a, pairs in by_left.items()}
        inner, outer, absorbed = [], [], []
        for token in np.flatnonzero(self.is_made).tolist():
            turn = _NEVER
            for symbol, turn in self._spine(token, side=0):
                inner.append(symbol)
                outer.append(token)
                absorbed.append(turn)
        order = np.argsort(np.array(inner, dtype=np.int64), kind="stable")
        self._spine_tokens = np.array(outer, dtype=np.int64)[order]
        self._spine_turns = np.array(absorbed, dtype=np.int64)[order]
        ids = np.arange(len(self.is_made) + 1)
        self._spine_starts = np.searchsorted(np.array(inner, dtype=np.int64)[order], ids)

    def _spine(self, token: int, side: int) -> list[tuple[int, int]]:
        """Symbols at one side of a token, from the whole inwards, and when each is absorbed."""
        found = [(token, _NEVER)]
        parts = self._parts[token]
        while parts is not None:
            found.append((parts[side], int(self._turn[token])))
            token = parts[side]
            parts = self._parts[token]
        return found

    def spell(self, token: int) -> list[int]:
        """The symbols of a token that the encoding makes."""
        parts = self._parts[token]
        return [token] if parts is None else [*self.spell(parts[0]), *self.spell(parts[1])]

    def _meets(self, a: int, b: int, whole: int | None) -> bool:
        """Whether ``a`` and ``b`` come to be adjacent (and then become ``whole``)."""
        for left, left_turn in self._spine(a, side=1):
            for right, right_turn in self._spine(b, side=0):
                known = self._merges.get((left, right))
                if known is None or (whole is not None and (left, right) == (a, b)):
                    continue
                turn = max(known[0], self._turn[left], self._turn[right])
                absorbed = min(left_turn, right_turn)
                if turn < absorbed:
                    return False
                if turn == absorbed:  # who comes first within one turn, only a run can tell
                    made = self.encode([*self.spell(a), *self.spell(b)])
                    return made == ([a, b] if whole is None else [whole])
        return True

    def allows(self, a: int, b: int) -> bool:
        """Whether ``b`` may follow ``a`` within one piece of text."""
        if a in self._rows:
            return bool(np.unpackbits(self._rows[a][b >> 3])[b & 7])
        return bool(self.is_made[a] and self.is_made[b]) and self._meets(a, b, None)

    def row(self, a: int) -> Bool[np.ndarray, "ids"]:
        """Which tokens may follow ``a`` within one piece; worked out once per token."""
        if a not in self._rows:
            self._rows[a] = np.packbits(self._work_out(a))
        return np.unpackbits(self._rows[a], count=len(self.is_made)).view(bool)

    def _work_out(self, a: int) -> Bool[np.ndarray, "ids"]:
        if not self.is_made[a]:
            return np.zeros_like(self.is_made)
        allowed = self.is_made.copy()
        unclear: set[int] = set()
        for left, left_turn in self._spine(a, side=1):
            if left not in self._by_left:
                continue
            rights, ranks = self._by_left[left].T
            starts = self._spine_starts[rights]
            counts = self._spine_starts[rights + 1] - starts
            places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(
                counts.sum()
            )
            turns = np.maximum(np.maximum(ranks, self._turn[rights]), self._turn[left])
            turn = np.repeat(turns, counts)
            absorbed = np.minimum(self._spine_turns[places], left_turn)
            tokens = self._spine_tokens[places]
            allowed[tokens[turn < absorbed]] = False
            unclear.update(tokens[turn == absorbed].tolist())
        for b in unclear:
            if allowed[b]:
                allowed[b] = self._meets(a, b, None)
        return allowed

    def encode(self, symbols: Sequence[int]) -> list[int]:
        """Run the merges: always the lowest rank, and of equal ones the leftmost."""
        ids = list(symbols)
        following = [*range(1, len(ids)), -1]
        before = list(range(-1, len(ids) - 1))
        queue: list[tuple[int, int, int]] = []

        def propose(place: int) -> None:
            if place >= 0 and following[place] >= 0:
                known = self._merges.get((ids[place], ids[following[place]]))
                if known is not None:
                    heapq.heappush(queue, (known[0], place, known[1]))

        for place in range(len(ids)):
            propose(place)
        while queue:
            rank, place, whole = heapq.heappop(queue)
            other = following[place]
            if (
                ids[place] < 0
                or other < 0
                or self._merges.get((ids[place], ids[other]))
                != (
                    rank,
                    whole,
                )
            ):
                continue  # one of the two has been merged in the meantime
            ids[place], ids[other] = whole, -1
            following[place] = following[other]
            if following[place] >= 0:
                before[following[place]] = place
            propose(before[place])
            propose(place)
        return [token for token in ids if token >= 0]
