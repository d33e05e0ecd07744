"""Which models a policy sees at which position, where that is not the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multicolm.decoding.draft import Draft
from multicolm.decoding.settle import PolicyDesk

__all__ = ["Choosing", "grouped"]


class Choosing:
    """Finds out which models are to be run at which positions of a draft, and notes it there.

    Args:
        desk: asks the policy.

    Attributes:
        by_place: whether the policy may see other models at one position than at another.
    """

    def __init__(self, desk: PolicyDesk) -> None:
        self._desk = desk
        self._names = desk.policy.names_models
        self.by_place = self._names or desk.policy.narrows

    def always(self, draft: Draft, which: Sequence[int]) -> dict[int, list[int]]:
        """Per model that is looked at always, at which of the positions its text may use it."""
        rows, always = draft.positions.rows, sorted(self._desk.needs.always)
        for i in which:
            draft.seen[i] = tuple(k for k in always if k in rows[i].models)
        wanted = {k: [i for i in which if k in draft.seen[i]] for k in always}
        return {k: numbers for k, numbers in wanted.items() if numbers}

    def named(self, draft: Draft, which: Sequence[int]) -> dict[int, list[int]]:
        """Per other model, at which of the positions the policy wants to see it.

        Asked after those of :meth:`always` were looked at.

        Raises:
            PolicyError: if the policy does not answer with one flag per position and model.
        """
        desk, rows = self._desk, draft.positions.rows
        wanted: dict[int, list[int]] = {k: [] for k in sorted(desk.needs.deferred)}
        for group in self.split(draft, which):
            flags = [[True] * len(desk.models)] * len(group)
            if self._names:
                views = desk.seen(draft, group)
                answer = desk.policy.models_at(views)
                desk.check(answer, views, "models_at", {torch.bool}, width=len(desk.models))
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
