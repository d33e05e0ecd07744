"""Which models a policy sees at which position, where that is not the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multicolm.decoding.decider import Decider
from multicolm.decoding.draft import Draft
from multicolm.decoding.kinds import check_answer

__all__ = ["Choosing", "grouped"]


class Choosing:
    """Finds out which models are to be run at which positions of a draft, and notes it there.

    Args:
        decider: asks the policy.

    Attributes:
        by_place: whether the policy may see other models at one position than at another.
    """

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self._plan = decider.plan
        self._names = decider.policy.names_models
        self.by_place = self._names or decider.policy.narrows

    def always(self, draft: Draft, which: Sequence[int]) -> dict[int, list[int]]:
        """Per model that is run always, at which of the positions its text may use it."""
        rows, always = draft.positions.rows, sorted(self._plan.needs.always)
        for i in which:
            draft.seen[i] = tuple(k for k in always if k in rows[i].models)
        wanted = {k: [i for i in which if k in draft.seen[i]] for k in always}
        return {k: numbers for k, numbers in wanted.items() if numbers}

    def named(self, draft: Draft, which: Sequence[int]) -> dict[int, list[int]]:
        """Per other model, at which of the positions the policy wants to see it.

        Asked after those of :meth:`always` were run.

        Raises:
            PolicyError: if the policy does not answer with one flag per position and model.
        """
        decider, rows, n_models = self._decider, draft.positions.rows, len(self._plan.models)
        wanted: dict[int, list[int]] = {k: [] for k in sorted(self._plan.needs.deferred)}
        for group in self.split(draft, which):
            flags = [[True] * n_models] * len(group)
            if self._names:
                views = decider.seen(draft, group)
                answer = decider.policy.models_at(views)
                check_answer(
                    decider.policy, answer, views, "models_at", {torch.bool}, width=n_models
                )
                flags = answer.tolist()
            for i, line in zip(group, flags, strict=True):
                new = [k for k in wanted if line[k] and k in rows[i].models]
                for k in new:
                    wanted[k].append(i)
                draft.seen[i] = tuple(sorted({*draft.seen[i], *new}))
        return {k: numbers for k, numbers in wanted.items() if numbers}

    def split(self, draft: Draft, which: Sequence[int]) -> list[list[int]]:
        """Position numbers by the models that the policy sees there."""
        return grouped(which, [draft.seen.get(i, ()) for i in which])


def grouped(which: Sequence[int], by: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Position numbers in groups with equal keys."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, key in zip(which, by, strict=True):
        groups.setdefault(key, []).append(i)
    return list(groups.values())
