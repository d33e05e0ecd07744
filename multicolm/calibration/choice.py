"""Which of the params that were tried is chosen, and how good that choice is on other questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from multicolm.errors import InputError
from multicolm.evaluation.statistics import mean_interval

__all__ = ["Params", "Point", "Rule", "Unit", "cross_validated"]

Unit: TypeAlias = Literal["share", "cost"]
"""What a budget is counted in: the part of the tokens that assistants write, or the ensemble's
``cost`` per written token."""

Params: TypeAlias = Mapping[str, float]

_FOLDS = 10


@dataclass(frozen=True, slots=True)
class Point:
    """What some params came to.

    Attributes:
        params: that were tried.
        share: of the tokens that assistants wrote, over all tasks.
        cost: per written token, in the ensemble's unit.
        low: lower end of the quality's 95 % interval, by
            :func:`multicolm.evaluation.statistics.mean_interval`.
        high: its upper end.
        qualities: per task, of every answer, 0 to 1.
    """

    params: Params
    share: float
    cost: float
    low: float
    high: float
    qualities: Mapping[str, Sequence[float]]

    @property
    def by_task(self) -> dict[str, float]:
        """Mean quality per task."""
        return {task: sum(values) / len(values) for task, values in self.qualities.items()}

    @property
    def quality(self) -> float:
        """Mean over the tasks."""
        return sum(self.by_task.values()) / len(self.qualities)

    def spent(self, unit: Unit) -> float:
        """What counts against a budget."""
        return self.share if unit == "share" else self.cost

    def on(self, task: str) -> Point:
        """As one task sees it; share and cost stay those of all tasks."""
        return replace(self, qualities={task: self.qualities[task]})

    def as_json(self) -> dict[str, Any]:
        """A flat dictionary of plain values."""
        numbers = {
            "share": self.share,
            "cost": self.cost,
            "quality": self.quality,
            "low": self.low,
            "high": self.high,
        }
        several = len(self.qualities) > 1
        by_task = {f"on {t}": q for t, q in self.by_task.items()} if several else {}
        return {**self.params, **numbers, **by_task}


@dataclass(frozen=True, slots=True)
class Rule:
    """How one of several points is chosen.

    Attributes:
        budget: the most that may be spent; ``None`` for as much as one likes.
        unit: of the budget.
        spend: whether the point wins that spends most of the budget, as measured, of equal ones
            the best answers; otherwise the best answers win, the cheapest of equally good ones.
    """

    budget: float | None = None
    unit: Unit = "share"
    spend: bool = False

    def allows(self, point: Point) -> bool:
        """Whether a point keeps within the budget."""
        return self.budget is None or point.spent(self.unit) <= self.budget

    def choose(self, points: Sequence[Point]) -> Point:
        """The best of the points.

        Raises:
            InputError: if none keeps within the budget.
        """
        allowed = [point for point in points if self.allows(point)]
        if not allowed:
            least = min(points, key=lambda point: point.spent(self.unit))
            raise InputError(
                f"nothing keeps within a {self.unit} of {self.budget:g}: the least is "
                f"{least.spent(self.unit):.3g}, with "
                f"{', '.join(f'{k}={v:.4g}' for k, v in least.params.items())}."
            )
        if self.spend:
            return max(allowed, key=lambda p: (p.spent(self.unit), p.quality, -p.cost))
        return max(allowed, key=lambda point: (point.quality, -point.cost))


def cross_validated(points: Sequence[Point], rule: Rule, seed: int) -> dict[str, float] | None:
    """How good the answers are to questions that the choice has not seen; 10 folds.

    The quality of the chosen point is that of the best of many on the same questions, which is too
    high. Here, for each tenth of the questions, the choice is made on the others; no model is
    asked again.

    Args:
        points: what was tried, all on the same questions.
        rule: how one is chosen.
        seed: of the folds.

    Returns:
        ``quality``, and ``low`` and ``high`` of its 95 % interval; ``None`` if a task has a single
        question.

    Source:
        Stone 1974, cross-validatory choice; Varma and Simon 2006 on the bias without it.
    """
    sizes = {task: len(values) for task, values in points[0].qualities.items()}
    n_folds = min(_FOLDS, *sizes.values())
    if n_folds < 2:
        return None
    generator = np.random.default_rng(seed)
    fold_of = {task: generator.permutation(n) % n_folds for task, n in sizes.items()}
    tables = [
        {task: np.asarray(values, dtype=float) for task, values in point.qualities.items()}
        for point in points
    ]
    found: dict[str, list[float]] = {task: [] for task in sizes}
    for fold in range(n_folds):
        seen = [
            replace(p, qualities={t: values[fold_of[t] != fold] for t, values in table.items()})
            for p, table in zip(points, tables, strict=True)
        ]
        chosen = next(i for i, point in enumerate(seen) if point is rule.choose(seen))
        for task, values in tables[chosen].items():
            found[task] += values[fold_of[task] == fold].tolist()
    low, high = mean_interval(*found.values(), seed=seed)
    means = [sum(values) / len(values) for values in found.values()]
    return {"quality": sum(means) / len(means), "low": low, "high": high}
