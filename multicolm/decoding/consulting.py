"""From drafts to decisions: runs the models that the policy wants to see, and asks it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from multicolm.backend.passes import Passes, together
from multicolm.decoding.choosing import Choosing
from multicolm.decoding.decider import Decider
from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft, Positions
from multicolm.decoding.kinds import write
from multicolm.decoding.plan import Plan

__all__ = ["Consulting", "Showing"]


class Showing(Protocol):
    """What shows the models' predictions at the positions of a draft."""

    def show(self, wanted: Mapping[int, Sequence[int]], draft: Draft) -> Passes[None]:
        """Let models show the positions that are wanted of each."""

    def logprobs_of(
        self, k: int, positions: Positions, ids: Sequence[Tensor]
    ) -> Passes[list[Tensor]]:
        """Log-probabilities of given own tokens of model ``k`` at positions that it showed."""

    def find_boundaries(
        self, models: Sequence[int], draft: Draft, which: Sequence[int]
    ) -> list[int]:
        """Note where models cannot continue; returns the positions that can be decided now."""


class Consulting:
    """Asks a policy about drafts, and runs the models that it wants to see there.

    Args:
        plan: the policy and its models.
        decider: asks the policy.
        models: show their predictions.
    """

    def __init__(self, plan: Plan, decider: Decider, models: Showing) -> None:
        self._plan = plan
        self._decider = decider
        self._models = models
        self._choosing = Choosing(decider)
        drafter = {0} if plan.drafts else set()
        self._asked_at = sorted({*plan.needs.always, *plan.needs.deferred} - drafter)

    def decide(self, draft: Draft) -> Passes[Decision]:
        """Decide writers and tokens at the drafted positions, as far as they can matter."""
        decision = Decision.on(draft)
        asked = list(range(len(draft.positions)))
        if self._plan.policy.assistants == "deferred":
            kept = [i for i in asked if not draft.deferring[i]]
            asked = [i for i in asked if draft.deferring[i]]
            if kept:
                write(draft, 0, kept, decision)
        if not asked:
            return decision
        now = self._models.find_boundaries(self._asked_at, draft, asked)
        waiting: dict[int, int] = {}
        for which in (yield from self._show(draft, now)):
            yield from self._name_candidates(draft, which)
            waiting |= self._decider.decide(draft, which, decision)
        yield from self._run_chosen_writers(draft, waiting, decision)
        return decision

    def _show(self, draft: Draft, which: Sequence[int]) -> Passes[list[list[int]]]:
        """Run the models that the policy wants to see.

        Returns:
            The positions, by the models that it sees there.
        """
        if not self._choosing.by_place:
            yield from self._models.show(dict.fromkeys(self._asked_at, which), draft)
            if self._plan.same_weights:  # Some may have been run that are not asked for.
                draft.seen |= dict.fromkeys(which, (0, *self._asked_at))
            return [list(which)]
        yield from self._models.show(self._choosing.always(draft, which), draft)
        yield from self._models.show(self._choosing.named(draft, which), draft)
        return self._choosing.split(draft, which)

    def _name_candidates(self, draft: Draft, which: Sequence[int]) -> Passes[None]:
        """Ask servers about tokens that the policy names, where they do not show all."""
        draft.candidates = self._decider.candidates(draft, which)
        yield from together([self._ask_about(k, draft, which) for k in draft.candidates])

    def _ask_about(self, k: int, draft: Draft, which: Sequence[int]) -> Passes[None]:
        shown, named = draft.shown[k], draft.candidates[k]
        known = shown.output.logits.clone()
        own = self._plan.vocabulary.own_ids(k, named.flatten()).view_as(named)
        unknown: dict[int, Tensor] = {}  # per position number, tokens of the ensemble's
        for i, ids, own_ids in zip(which, named, own, strict=True):
            if i in shown.line_of:
                new = ids[(known[shown.line_of[i], ids] == -math.inf) & (own_ids >= 0)]
                unknown |= {i: new} if len(new) else {}
        if not unknown:
            return
        here = draft.positions.at(list(unknown))
        asked = [self._plan.vocabulary.own_ids(k, ids) for ids in unknown.values()]
        found = yield from self._models.logprobs_of(k, here, asked)
        for (i, ids), values in zip(unknown.items(), found, strict=True):
            known[shown.line_of[i], ids] = values.to(known)
        draft.shown[k] = replace(shown, output=replace(shown.output, logits=known))

    def _run_chosen_writers(
        self, draft: Draft, waiting: Mapping[int, int], decision: Decision
    ) -> Passes[None]:
        """Run writers that were chosen and have not been run yet.

        Only at the first such position of each text, unless that is known: after it the draft may
        not hold.
        """
        first = [
            next(i for i in numbers if i in waiting)
            for numbers in draft.by_row.values()
            if any(i in waiting for i in numbers)
        ]
        if draft.forced is not None:
            first = sorted(waiting)
        wanted = {
            k: self._models.find_boundaries([k], draft, [i for i in first if waiting[i] == k])
            for k in sorted({waiting[i] for i in first})
        }
        yield from self._models.show(wanted, draft)
        for k, theirs in wanted.items():
            for writer in sorted({draft.fallback_writer(k, i) for i in theirs}):
                able = [i for i in theirs if draft.fallback_writer(k, i) == writer]
                write(draft, writer, able, decision)
