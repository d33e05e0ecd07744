"""Models that write piece by piece: each proposes one, all rate all, and the best is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multicolm.backend.passes import Passes, together
from multicolm.decoding.draft import Positions
from multicolm.decoding.memory import Memory
from multicolm.decoding.plan import Plan
from multicolm.decoding.readers import Readers
from multicolm.decoding.row import Row, Written
from multicolm.decoding.sampling import Likeliest, Noise, likeliest
from multicolm.errors import PolicyError
from multicolm.policy.base import SegmentPolicy, Segments
from multicolm.views import implied

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

    def written(self, score: float | None) -> list[Written]:
        """The tokens as they are written, if this is the best proposal."""
        each = zip(self.tokens, self.logprobs, self.alternatives, strict=True)
        return [
            Written(token, self.writer, logprob, score, others) for token, logprob, others in each
        ]


class SegmentWriter:
    """Finds the next segment of some rows.

    A segment ends where a word does and a token of every model; at an end of text; and where the
    row or a context is full. It has :attr:`SegmentPolicy.shortest` tokens at least; after
    :attr:`SegmentPolicy.longest` it need not be a word.

    Args:
        plan: the policy, which rates segments, and its models.
        readers: the models.
        memory: what the policy remembers of the texts.
        noise: what tokens are drawn with.
    """

    def __init__(self, plan: Plan, readers: Readers, memory: Memory, noise: Noise) -> None:
        assert isinstance(plan.policy, SegmentPolicy)
        self._policy = plan.policy
        self._models = plan.used
        # Those that can rate what others propose.
        self._judges = {k for k in plan.used if "token_logprobs" in implied(plan.models[k].shows)}
        self._vocabulary = plan.vocabulary
        self._starts_word = plan.vocabulary.starts_word.tolist()
        self._ends = plan.end_ids
        self._readers = readers
        self._memory = memory
        self._noise = noise

    def next(self, rows: Sequence[Row]) -> Passes[list[tuple[Row, list[Written]]]]:
        """The next segment of every row.

        Raises:
            PolicyError: if the policy's ratings are not one number for each proposal.
        """
        proposals = []
        for k in self._models:
            proposals.append((yield from self._propose(k, rows)))
        of = {row: [each[i] for each in proposals] for i, row in enumerate(rows)}
        # Where all would write the same there is nothing to choose, and nobody has to rate.
        open_rows = [row for row in rows if not self._agree(of[row])]
        best: dict[Row, tuple[int, float]] = {}
        if open_rows:
            best = yield from self._rate(open_rows, of)
        found = []
        for row in rows:
            number, score = best.get(row, (0, None))
            found.append((row, of[row][number].written(score)))
        return found

    def _agree(self, proposals: Sequence[_Proposal]) -> bool:
        return len({self._content(proposal) for proposal in proposals}) == 1

    def _content(self, proposal: _Proposal) -> tuple[bytes, bool]:
        """The text of a proposal, and whether it ends with it."""
        text = b"".join(self._vocabulary.token_bytes(token) for token in proposal.tokens)
        return text, self._is_end(proposal)

    def _is_end(self, proposal: _Proposal) -> bool:
        return proposal.tokens[-1] in self._ends[proposal.writer]

    def _propose(self, k: int, rows: Sequence[Row]) -> Passes[list[_Proposal]]:
        """What model ``k`` would write next in every row."""
        proposals = [_Proposal(k) for _ in rows]
        going = list(range(len(rows)))
        for row in rows:
            row.drafter = k
        while going:
            now = [rows[i] for i in going]
            positions = Positions(now, [len(row.ids) for row in now], self._noise)
            output = yield from self._readers[k].forward(
                now, [[place] for place in positions.places]
            )
            tokens = positions.draw(output.logits)
            every = output.logprobs
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
                self._readers[k].rollback(row, len(row.written))

    def _ends_before(self, row: Row, k: int, token: int) -> bool:
        """Whether a segment of model ``k`` is whole if it continued with ``token``."""
        policy = self._policy
        if row.n_drafted < min(max(1, policy.shortest), policy.longest):
            return False
        if not self._starts_word[token] and row.n_drafted < policy.longest:
            return False
        groups, place = self._vocabulary.groups, len(row.ids)
        others = [j for j in self._models if groups[j] != groups[k]]
        return all(self._readers[j].can_start_at(row, [place], token, k)[place] for j in others)

    def _ends_with(self, row: Row, k: int, token: int) -> bool:
        """Whether nothing of model ``k`` can follow ``token``."""
        full = row.n_tokens + row.n_drafted + 1 >= row.max_new_tokens
        return token in self._ends[k] or full or not self._readers.fits(row, token)

    def _rate(
        self, rows: Sequence[Row], of: dict[Row, list[_Proposal]]
    ) -> Passes[dict[Row, tuple[int, float]]]:
        """Per row the number of the best proposal, and its rating."""
        # Of equal proposals the first is rated, and stands for the others.
        first = [self._first_of_equal(of[row]) for row in rows]
        nats, n_tokens = yield from self._judge(rows, of, first)
        segments = Segments(nats, n_tokens, self._memory.state(rows))
        ratings = self._policy.rate(segments)
        shape = nats.shape[:2]
        if ratings.shape != shape or bool(ratings.isnan().any()):
            raise PolicyError(
                f"policy '{self._policy.name}': rate() must return {shape[0]} rows of {shape[1]} "
                f"numbers, one per proposal, and returned {list(ratings.shape)} with "
                f"{int(ratings.isnan().sum())} that are no number."
            )
        best = [first[i][a] for i, a in enumerate(ratings.argmax(-1).tolist())]
        places = Positions(rows, [len(row.written) for row in rows], self._noise)
        self._memory.feedback(places, segments, torch.tensor(best))
        return {row: (best[i], float(ratings[i, best[i]])) for i, row in enumerate(rows)}

    def _judge(
        self, rows: Sequence[Row], of: dict[Row, list[_Proposal]], first: Sequence[Sequence[int]]
    ) -> Passes[tuple[Tensor, Tensor]]:
        """What every judge thinks of every proposal; see :class:`Segments`."""
        shape = (len(rows), len(self._models), len(self._models))
        nats, n_tokens = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.long)
        for a, writer in enumerate(self._models):
            fresh = [i for i in range(len(rows)) if first[i][a] == a]
            for i in fresh:
                row, proposal = rows[i], of[rows[i]][a]
                if writer in self._judges:
                    nats[i, a, a] = -sum(proposal.logprobs)
                    n_tokens[i, a, a] = len(proposal.tokens)
                row.ids += proposal.tokens
                row.drafter = writer
            others = [
                (b, judge)
                for b, judge in enumerate(self._models)
                if judge != writer and judge in self._judges and fresh
            ]
            asked = [
                self._readers[judge].draft_nll([rows[i] for i in fresh]) for _, judge in others
            ]
            for (b, _), costs in zip(others, (yield from together(asked)), strict=True):
                for i, (cost, n) in zip(fresh, costs, strict=True):
                    nats[i, a, b], n_tokens[i, a, b] = cost, n
            self._forget([rows[i] for i in fresh])
            for i in set(range(len(rows))) - set(fresh):
                nats[i, a], n_tokens[i, a] = nats[i, first[i][a]], n_tokens[i, first[i][a]]
        return nats, n_tokens

    def _first_of_equal(self, proposals: Sequence[_Proposal]) -> list[int]:
        """Per proposal, the number of the first one with the same text."""
        seen: dict[tuple[bytes, bool], int] = {}
        return [seen.setdefault(self._content(each), a) for a, each in enumerate(proposals)]
