"""The base model writing ahead, in every row at that row's own pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from multicolm.backend.base import ModelOutput
from multicolm.backend.passes import Passes
from multicolm.decoding.decider import Decider
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.readers import Readers
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise

__all__ = ["Drafter"]


@dataclass
class _Step:
    """One token of the base model in some rows; lines leave it as their rows are decided."""

    draft: Draft
    open_lines: dict[Row, int] = field(default_factory=dict)


class Drafter:
    """The base model writing ahead.

    A row's draft ends where the policy is (nearly) sure to want another writer, at an end of text,
    at the row's draft length, and where the row or a context is full. Rows whose drafts have ended
    wait to be decided while others draft on.

    Args:
        decider: asks the policy.
        readers: the models; the first one drafts.
        noise: what tokens are drawn with.
        beside: other models that are run with the base model always, for drafts of one token.
    """

    def __init__(
        self, decider: Decider, readers: Readers, noise: Noise, beside: Sequence[int] = ()
    ) -> None:
        self._decider = decider
        self._readers = readers
        self._noise = noise
        self._beside = frozenset(beside)
        self._end_ids = decider.plan.end_ids[0]
        self._steps: list[_Step] = []

    def advance(self, rows: Sequence[Row]) -> Passes[list[Row]]:
        """Draft one more token in every row; returns the rows whose drafts end with it."""
        step = yield from self._draft_one(rows)
        self._steps.append(_Step(step, {row: i for i, row in enumerate(rows)}))
        ended = []
        for row, token, deferring in zip(rows, step.tokens, step.deferring, strict=True):
            if self._ends(row, token, deferring):
                ended.append(row)
            else:
                row.ids.append(token)
        return ended

    def _ends(self, row: Row, token: int, deferring: bool) -> bool:
        policy = self._decider.policy
        if deferring and policy.can_defer and (policy.certain or row.deferral_ends_drafts):
            return True
        n_next = row.n_drafted + 1
        n_wanted = min(row.draft_length, row.max_new_tokens - len(row.written))
        return token in self._end_ids or n_next >= n_wanted or not self._readers.fits(row, token)

    def _draft_one(self, rows: Sequence[Row]) -> Passes[Draft]:
        """One token of the base model in every row, and whether the policy defers there."""
        positions = Positions(rows, [len(row.ids) for row in rows], self._noise)
        every = range(len(rows))
        step = Draft(positions)
        wanted: dict[int, list[int]] = {0: list(every)}
        for i, row in enumerate(rows):
            for k in sorted(self._beside | row.beside):
                wanted.setdefault(k, []).append(i)
        yield from self._readers.show(wanted, step)
        step.tokens = positions.draw(step.shown[0].output.logits).tolist()
        step.deferring = [True] * len(rows)
        step.scores = [None] * len(rows)
        if self._decider.policy.can_defer:
            views = self._decider.views(positions, every, step.shown, models={0})
            step.deferring = self._decider.defers(views)
            if self._decider.policy.assistants == "deferred":
                step.scores = self._decider.scores(views)
        return step

    def take(self, rows: Sequence[Row]) -> Draft:
        """What was drafted in these rows, which are to be decided now."""
        wanted = set(rows)
        parts: list[tuple[Draft, list[int]]] = []
        for step in self._steps:
            lines = [step.open_lines.pop(row) for row in list(step.open_lines) if row in wanted]
            if lines:
                parts.append((step.draft, lines))
        self._steps = [step for step in self._steps if step.open_lines]
        if len(parts) == 1 and len(parts[0][1]) == len(parts[0][0].positions):
            return parts[0][0]
        return _joined(parts)

    def drop(self, row: Row) -> None:
        """Forget what was drafted in a row."""
        for step in self._steps:
            step.open_lines.pop(row, None)
        self._steps = [step for step in self._steps if step.open_lines]


def _joined(parts: Sequence[tuple[Draft, list[int]]]) -> Draft:
    """Some lines of some steps as one draft, by ascending place within each row."""
    outputs: list[ModelOutput] = []
    rows: list[Row] = []
    joined = Draft(parts[0][0].positions, {})
    places: list[int] = []
    for draft, lines in parts:
        outputs.append(draft.shown[0].output.at(lines))
        rows += [draft.positions.rows[i] for i in lines]
        places += [draft.positions.places[i] for i in lines]
        joined.tokens += [draft.tokens[i] for i in lines]
        joined.deferring += [draft.deferring[i] for i in lines]
        joined.scores += [draft.scores[i] for i in lines]
    first = parts[0][0].positions
    joined.positions = Positions(rows, places, first.noise)
    joined.shown[0] = Shown.of(ModelOutput.joined(outputs), range(len(rows)))
    return joined
