"""A model of tokens following the texts of all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from multicolm.backend.base import ModelOutput, PartialOutput
from multicolm.backend.passes import Passes
from multicolm.decoding.own_tokens import Last, OwnTokens
from multicolm.decoding.row import Row

__all__ = ["TokenReader"]


class TokenReader(OwnTokens):
    """A model of tokens.

    It reads lazily: a model that was not asked for a while catches up in one pass when it is.
    """

    def is_settled(self, row: Row) -> bool:
        """Whether the model can continue after what is written, whatever else might follow."""
        self._follow(row, len(row.written))
        return self._aligners[row.slot].is_settled

    def can_start_at(
        self, row: Row, places: Sequence[int], token: int, writer: int
    ) -> dict[int, bool | None]:
        """Where the model could continue, if the text continues as predicted.

        It can at a place where none of its own tokens would lie across it. Whether that is so
        depends on the token that follows the place if nobody else continues there.

        Args:
            row: the text, and after it what is predicted.
            places: ascending.
            token: predicted at the last place.
            writer: of that token.

        Returns:
            Per place whether it can; ``None`` where that cannot be known together with the places
            before, from there on.
        """
        aligner = self._aligners[row.slot]
        self._follow(row, places[0])
        flags: dict[int, bool | None] = {}
        for place in range(places[0], places[-1] + 1):
            known = place < len(row.ids)
            new = (row.ids[place], row.writer(place)) if known else (token, writer)
            if aligner.n_tokens == place:
                aligner.extend([new[0]], [new[1]])
            if place in places:
                flags[place] = aligner.reach(place) is not None
        # A place may be open as far as one token after it shows, and lie within an own token once
        # more is known: it is decided again when it is the first.
        for place in places:
            if flags[place] and aligner.reach(place) is None:
                if place == places[0]:
                    aligner.cut(place + 1)
                    later = places[1:]
                else:
                    later = [p for p in places if p >= place]
                return flags | dict.fromkeys(later, None)
        return flags

    def forward(
        self,
        rows: Sequence[Row],
        places: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Passes[ModelOutput]:
        """What the model predicts at some places of each row.

        Args:
            rows: distinct rows.
            places: per row, ascending places at which it can continue; place ``i`` is before token
                ``i`` of the text.
            hidden: whether hidden states are wanted.

        Returns:
            Predictions over the ensemble's vocabulary, row after row, by ascending place.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        slots, fed, reached, firsts, remembered = [], [], [], [], {}
        for i in order:
            slot = rows[i].slot
            self._follow(rows[i], places[i][-1])
            reach = [self._reach(slot, place) for place in places[i]]
            self._forget(slot)
            known = self._last.get(slot)
            if known is not None and reach == [known.n_own] and known.shows(hidden):
                remembered[i] = known
                continue
            first = reach[0]
            if self._scores:
                first = yield from self._first_to_score(rows[i], first)
            # The prediction at the end of a text that was cut has to be made once more.
            if self._session.lengths[slot] >= first:
                self._session.truncate(slot, first - 1)
            slots.append(slot)
            fed.append(self._aligners[slot].own[self._session.lengths[slot] : reach[-1]])
            reached.append(reach)
            firsts.append(first)
        asked = [i for i in order if i not in remembered]
        output = None
        if asked:
            some = [rows[i] for i in asked]
            output = yield from self._feed(some, slots, fed, reached, firsts, hidden)
        return _arrange(output, len(rows), asked, reached, remembered)

    def _feed(
        self,
        rows: Sequence[Row],
        slots: Sequence[int],
        fed: Sequence[Sequence[int]],
        reached: Sequence[Sequence[int]],
        firsts: Sequence[int],
        hidden: bool,
    ) -> Passes[ModelOutput]:
        """Run the model, and remember what it shows at the last place of each row."""
        n_last = [r[-1] - first + 1 for r, first in zip(reached, firsts, strict=True)]
        output = yield from self._run(rows, fed, n_last, hidden=hidden)
        if self._scores:
            end = 0
            for row, first, n in zip(rows, firsts, n_last, strict=True):
                end += n
                yield from self._tally(row, first, output.at(range(end - n, end)))
            n_early = [reach[0] - first for reach, first in zip(reached, firsts, strict=True)]
            output = _without_early(output, n_last, n_early)
            n_last = [n - early for n, early in zip(n_last, n_early, strict=True)]
        output = replace(output, logits=self._vocabulary.logits(self._index, output.logits))
        if not self._vocabulary.is_shared:
            line = -1
            for slot, reach, n in zip(slots, reached, n_last, strict=True):
                line += n
                self._last[slot] = Last(reach[-1], output.at([line]))
        else:
            for slot in slots:
                self._last.pop(slot, None)
        return output

    def text_nll(self, row: Row, place: int) -> float:
        """How unlikely the model finds the text before a place at which it was just run."""
        tally = self._tallies[row.slot]
        reach = self._aligners[row.slot].reach(place)
        return math.nan if reach is None else tally.nats[reach - tally.n_prompt]

    def _first_to_score(self, row: Row, reach: int) -> Passes[int]:
        """After how many own tokens the first prediction is needed, to score the text.

        A long text that it has not read yet is scored in parts whose logits fit into memory.
        """
        tally = self._tallies[row.slot]
        if tally.pending is not None and tally.pending[0] == tally.end < reach:
            yield from self._tally(row, tally.end, tally.pending[1])
        n_at_once = self._n_at_once
        own = self._aligners[row.slot].own
        while reach - tally.end > n_at_once:
            first, end = tally.end, tally.end + n_at_once
            self._session.truncate(row.slot, min(self._session.lengths[row.slot], first - 1))
            fed = own[self._session.lengths[row.slot] : end - 1]
            output = yield from self._run([row], [fed], [n_at_once])
            yield from self._tally(row, first, output)
        return min(reach, tally.end)

    def _tally(self, row: Row, first: int, output: ModelOutput) -> Passes[None]:
        """Score own tokens of a text with what is shown after ``first`` of them and on."""
        own, tally = self._aligners[row.slot].own, self._tallies[row.slot]
        tally.pending = (first + len(output) - 1, output.at([len(output) - 1]))
        gold = own[first : first + len(output)]
        if not gold:
            return
        # Columns of a padded head belong to no token.
        known = output.logits[: len(gold), : self._model.tokenizer.n_tokens]
        logprobs = replace(output, logits=known).logprobs
        chosen = logprobs.gather(-1, torch.tensor(gold, device=known.device)[:, None])[:, 0].cpu()
        for i, (token, value) in enumerate(zip(gold, chosen.tolist(), strict=True)):
            if isinstance(output, PartialOutput) and not math.isfinite(value):
                [found] = yield from self._query([row], [first + i], [[token]])
                value = float(found)
            tally.add(first + i, value)


def _without_early(
    output: ModelOutput, n_shown: Sequence[int], n_early: Sequence[int]
) -> ModelOutput:
    """Predictions without the first few lines of each row."""
    if not any(n_early):
        return output
    kept: list[int] = []
    line = 0
    for n, early in zip(n_shown, n_early, strict=True):
        kept += range(line + early, line + n)
        line += n
    return output.at(kept)


def _arrange(
    output: ModelOutput | None,
    n_rows: int,
    asked: Sequence[int],
    reached: Sequence[Sequence[int]],
    remembered: Mapping[int, Last],
) -> ModelOutput:
    """From the session's order, token by token, to the caller's order, place by place."""
    lines: dict[int, list[int]] = {}
    first = 0
    for i, reach in zip(asked, reached, strict=True):
        lines[i] = [first + own - reach[0] for own in reach]
        first += reach[-1] - reach[0] + 1
    for number, i in enumerate(remembered):
        lines[i] = [first + number]
    index = [line for i in range(n_rows) for line in lines[i]]
    if output is not None and index == list(range(first)):
        return output
    ran = [] if output is None else [output]
    parts = [*ran, *(replace(last.output, n_passes=0, n_calls=0) for last in remembered.values())]
    return ModelOutput.joined(parts).at(index)
