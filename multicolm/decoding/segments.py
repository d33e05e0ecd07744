"""Models that write piece by piece: each proposes one, all rate all, and the best is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from multicolm.decoding.draft import Positions
from multicolm.decoding.memory import Memory
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row, Written
from multicolm.decoding.sampling import Likeliest, likeliest
from multicolm.errors import PolicyError
from multicolm.policy.base import SegmentPolicy, Segments
from multicolm.tokenizer.vocabulary import Vocabulary

__all__ = ["SegmentWriter"]


@dataclass
class _Proposal:
    """What one model would write next.

    Attributes:
        writer: index of the model.
        tokens: in the ensemble's vocabulary; one at least, once the model has written.
        logprobs: of each, in nats.
        alternatives: to each.
    """

    writer: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Likeliest] = field(default_factory=list)


class SegmentWriter:
    """Finds the next segment of some rows.

    A segment ends where a word does and a token of every model; at an end of text; and where the
    row or a context is full. It has :attr:`SegmentPolicy.shortest` tokens at least; after
    :attr:`SegmentPolicy.longest` it need not be a word.

    Args:
        policy: rates segments.
        models: indices of the models in use, ascending.
        vocabulary: what is written in.
        reader: gives a model's reader.
        positions: makes positions of rows and places, which tokens are drawn at.
        fits: whether every model in use can read a row's draft and one token behind it.
        ends: per model, tokens with which it ends a text.
        memory: what the policy remembers of the texts.
        judges: models in use that can rate what others propose.
        partial: those that tell of some tokens only (:attr:`Model.max_top_logprobs`).
    """

    def __init__(
        self,
        policy: SegmentPolicy,
        models: Sequence[int],
        vocabulary: Vocabulary,
        reader: Callable[[int], Reader],
        positions: Callable[[Sequence[Row], Sequence[int]], Positions],
        fits: Callable[[Row, int], bool],
        ends: Sequence[frozenset[int]],
        memory: Memory,
        *,
        judges: Collection[int],
        partial: Collection[int],
    ) -> None:
        self._policy = policy
        self._models = list(models)
        self._judges = frozenset(judges)
        self._partial = frozenset(partial)
        self._vocabulary = vocabulary
        self._starts_word = vocabulary.starts_word.tolist()
        self._reader = reader
        self._positions = positions
        self._fits = fits
        self._ends = ends
        self._memory = memory

    def next(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Written]]]:
        """The next segment of every row.

        Raises:
            PolicyError: if the policy's ratings are not one number for each proposal.
        """
        proposals = [self._propose(k, rows) for k in self._models]
        of = {row: [each[i] for each in proposals] for i, row in enumerate(rows)}
        # Where all would write the same there is nothing to choose, and nobody has to rate.
        open_rows = [row for row in rows if not self._agree(of[row])]
        best = self._rate(open_rows, of) if open_rows else {}
        for row in rows:
            number, score = best.get(row, (0, None))
            chosen = of[row][number]
            yield (
                row,
                [
                    Written(token, chosen.writer, logprob, score, alternatives)
                    for token, logprob, alternatives in zip(
                        chosen.tokens, chosen.logprobs, chosen.alternatives, strict=True
                    )
                ],
            )

    def _agree(self, proposals: Sequence[_Proposal]) -> bool:
        return len({self._content(proposal) for proposal in proposals}) == 1

    def _content(self, proposal: _Proposal) -> tuple[bytes, bool]:
        """The text of a proposal, and whether it ends with it."""
        text = b"".join(self._vocabulary.token_bytes(token) for token in proposal.tokens)
        return text, self._is_end(proposal)

    def _is_end(self, proposal: _Proposal) -> bool:
        return proposal.tokens[-1] in self._ends[proposal.writer]

    def _propose(self, k: int, rows: Sequence[Row]) -> list[_Proposal]:
        """What model ``k`` would write next in every row."""
        proposals = [_Proposal(k) for _ in rows]
        going = list(range(len(rows)))
        for row in rows:
            row.drafter = k
        while going:
            now = [rows[i] for i in going]
            positions = self._positions(now, [len(row.ids) for row in now])
            output = self._reader(k).forward(now, [[place] for place in positions.places])
            tokens = positions.draw(output.logits)
            every = output.logits.float()
            every = every if k in self._partial else every.log_softmax(-1)
            logprobs = every.gather(-1, tokens[:, None])[:, 0]
            logprobs = logprobs.masked_fill(logprobs == math.inf, math.nan)
            drawn = zip(list(going), tokens.tolist(), logprobs.tolist(), every, strict=True)
            for i, token, logprob, known in drawn:
                if self._ends_before(rows[i], k, token):
                    going.remove(i)
                    continue
                proposals[i].tokens.append(token)
                proposals[i].logprobs.append(logprob)
                proposals[i].alternatives.append(likeliest(known, rows[i].n_alternatives))
                if self._ends_with(rows[i], k, token):
                    going.remove(i)
                else:
                    rows[i].ids.append(token)
        self._forget(rows)
        return proposals

    def _forget(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.drop_draft()
            row.drafter = 0
            for k in self._models:
                self._reader(k).rollback(row, len(row.written))

    def _ends_before(self, row: Row, k: int, token: int) -> bool:
        """Whether a segment of model ``k`` is whole if it would go on with ``token``."""
        policy = self._policy
        if row.n_drafted < min(max(1, policy.shortest), policy.longest):
            return False
        if not self._starts_word[token] and row.n_drafted < policy.longest:
            return False
        groups, place = self._vocabulary.groups, len(row.ids)
        others = [j for j in self._models if groups[j] != groups[k]]
        return all(self._reader(j).can_go_on(row, [place], token, k)[place] for j in others)

    def _ends_with(self, row: Row, k: int, token: int) -> bool:
        """Whether nothing of model ``k`` can follow ``token``."""
        full = row.n_tokens + row.n_drafted + 1 >= row.max_new_tokens
        return token in self._ends[k] or full or not self._fits(row, token)

    def _rate(
        self, rows: Sequence[Row], of: dict[Row, list[_Proposal]]
    ) -> dict[Row, tuple[int, float]]:
        """Per row the number of the best proposal, and its rating."""
        shape = (len(rows), len(self._models), len(self._models))
        nats, n_tokens = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.long)
        # Of equal proposals the first is rated, and stands for the others.
        first = [self._first_of_equal(of[row]) for row in rows]
        for a, writer in enumerate(self._models):
            fresh = [i for i in range(len(rows)) if first[i][a] == a]
            for i in fresh:
                row, proposal = rows[i], of[rows[i]][a]
                if writer in self._judges:
                    nats[i, a, a] = -sum(proposal.logprobs)
                    n_tokens[i, a, a] = len(proposal.tokens)
                row.ids += proposal.tokens
                row.drafter = writer
            for b, judge in enumerate(self._models):
                if judge == writer or judge not in self._judges or not fresh:
                    continue
                told = self._reader(judge).draft_nll([rows[i] for i in fresh])
                for i, (cost, n) in zip(fresh, told, strict=True):
                    nats[i, a, b], n_tokens[i, a, b] = cost, n
            self._forget([rows[i] for i in fresh])
            for i in set(range(len(rows))) - set(fresh):
                nats[i, a], n_tokens[i, a] = nats[i, first[i][a]], n_tokens[i, first[i][a]]
        segments = Segments(nats, n_tokens, self._memory.state(rows))
        ratings = self._policy.rate(segments)
        if ratings.shape != shape[:2] or bool(ratings.isnan().any()):
            raise PolicyError(
                f"policy '{self._policy.name}': rate() must return {shape[0]} rows of {shape[1]} "
                f"numbers, one per proposal, and returned {list(ratings.shape)} with "
                f"{int(ratings.isnan().sum())} that are no number."
            )
        best = [first[i][a] for i, a in enumerate(ratings.argmax(-1).tolist())]
        if rows:
            places = self._positions(rows, [len(row.written) for row in rows])
            self._memory.feedback(places, segments, torch.tensor(best))
        return {row: (best[i], float(ratings[i, best[i]])) for i, row in enumerate(rows)}

    def _first_of_equal(self, proposals: Sequence[_Proposal]) -> list[int]:
        """Per proposal, the number of the first one with the same text."""
        seen: dict[tuple[bytes, bool], int] = {}
        return [seen.setdefault(self._content(each), a) for a, each in enumerate(proposals)]
