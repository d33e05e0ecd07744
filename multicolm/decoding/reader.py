"""One model following the texts of all rows, through its own tokens and its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from multicolm.backend.base import Look, Model
from multicolm.decoding.row import Row
from multicolm.tokenizer.shared import SharedVocabulary
from multicolm.types import Usage

__all__ = ["Reader"]


class Reader:
    """One model following the texts of all rows.

    It reads lazily: a model that was not asked for a while catches up in one pass when it is.

    Args:
        model: the model.
        index: its index in the ensemble.
        vocabulary: the shared vocabulary.
        n_slots: how many rows there can be at a time.
        clock: current time in seconds.
    """

    def __init__(
        self,
        model: Model,
        index: int,
        vocabulary: SharedVocabulary,
        n_slots: int,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._index = index
        self._vocabulary = vocabulary
        self._clock = clock
        self._session = model.open(n_slots)
        self._straight = vocabulary.is_straight(index)
        # Per slot: the model's own tokens of the text so far, and where each shared token ends.
        self._own: list[list[int]] = [[] for _ in range(n_slots)]
        self._ends: list[list[int]] = [[0] for _ in range(n_slots)]
        self.usage = Usage()

    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""
        self._session.truncate(row.slot, 0)
        self._own[row.slot] = list(row.prompt_ids[self._index])
        self._ends[row.slot] = [len(self._own[row.slot])]

    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` tokens; what was read behind them is void."""
        ends = self._ends[row.slot]
        if len(ends) - 1 <= n_tokens:
            return
        del ends[n_tokens + 1 :]
        del self._own[row.slot][ends[-1] :]
        if self._session.lengths[row.slot] > ends[-1]:
            self._session.truncate(row.slot, ends[-1])

    def look(
        self,
        rows: Sequence[Row],
        firsts: Sequence[int],
        lasts: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Look:
        """What the model predicts at consecutive places of each row.

        Args:
            rows: distinct rows.
            firsts: per row, the first place: the prediction of token ``first`` of the text.
            lasts: per row, the last place, ``first`` or later; tokens before it are read.
            hidden: whether hidden states are wanted.

        Returns:
            Predictions over the shared vocabulary, row after row, by ascending place.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        slots, fed, n_last = [], [], []
        for i in order:
            slot = rows[i].slot
            self._follow(rows[i], lasts[i])
            begin = self._ends[slot][firsts[i]] - 1
            if self._session.lengths[slot] > begin:
                # The prediction at the end of a text that was cut has to be made once more.
                self._session.truncate(slot, begin)
            end = self._ends[slot][lasts[i]]
            slots.append(slot)
            fed.append(self._own[slot][self._session.lengths[slot] : end])
            n_last.append(end - begin)
        start = self._clock()
        look = self._session.feed(slots, fed, n_last, hidden=hidden)
        self._model.wait()
        self._account([rows[i] for i in order], fed, self._clock() - start, look.n_passes)
        shared = replace(look, logits=self._vocabulary.logits(self._index, look.logits))
        return self._arrange(shared, rows, order, firsts, lasts, n_last)

    def _follow(self, row: Row, last: int) -> None:
        """Translate the tokens of the text up to place ``last`` that were not yet."""
        own, ends = self._own[row.slot], self._ends[row.slot]
        n_known = len(ends) - 1
        if n_known >= last:
            return
        if self._straight:
            own.extend(row.ids[n_known:last])
            ends.extend(range(ends[-1] + 1, ends[-1] + 1 + last - n_known))
            return
        for token in row.ids[n_known:last]:
            own.extend(self._vocabulary.read(self._index, [token]))
            ends.append(len(own))

    def _arrange(
        self,
        look: Look,
        rows: Sequence[Row],
        order: Sequence[int],
        firsts: Sequence[int],
        lasts: Sequence[int],
        n_last: Sequence[int],
    ) -> Look:
        """From the session's order and own tokens to the caller's order and shared tokens."""
        in_order = list(order) == list(range(len(rows)))
        if in_order and self._straight:
            return look
        offset = dict(zip(order, _offsets(n_last), strict=True))
        index: list[int] = []
        for i, row in enumerate(rows):
            ends = self._ends[row.slot]
            start = ends[firsts[i]]
            index.extend(
                offset[i] + ends[place] - start for place in range(firsts[i], lasts[i] + 1)
            )
        chosen = torch.tensor(index, device=look.logits.device)
        hidden = None if look.hidden is None else look.hidden[chosen]
        return replace(look, logits=look.logits[chosen], hidden=hidden)

    def _account(
        self, rows: Sequence[Row], fed: Sequence[Sequence[int]], seconds: float, n_passes: int
    ) -> None:
        n_read = sum(map(len, fed))
        self.usage += Usage(n_passes, n_read, 0, seconds)
        for row, new in zip(rows, fed, strict=True):
            row.usage[self._index] += Usage(1, len(new), 0, seconds * len(new) / n_read)


def _offsets(counts: Sequence[int]) -> list[int]:
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += count
    return offsets
