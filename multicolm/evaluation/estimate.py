"""What answering will take at most, from a short measurement."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multicolm.evaluation.answering import Answering, Plan

__all__ = ["Estimate", "OnEstimate", "announce", "estimated"]

_N_QUESTIONS = 2
"""Of which a text is measured: a batch would take as long as a good part of the comparison. A text
takes less time among more, so the time is an upper bound."""

_N_TOKENS = 8
"""New tokens of a text that is measured; more of them say little more."""


@dataclass(frozen=True)
class Estimate:
    """What is ahead, if every answer has as many tokens as it may have.

    Attributes:
        rows: of the table.
        answers: to be written.
        tokens: new ones, at most.
        passes: forward passes, each counted once for every text in it.
        cost: of these, in the ensemble's unit.
        seconds: on this machine, at most.
        memory_bytes: the most that this process took while it was measured, the models included.
    """

    rows: int = 0
    answers: int = 0
    tokens: int = 0
    passes: float = 0.0
    cost: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.rows + other.rows,
            self.answers + other.answers,
            self.tokens + other.tokens,
            self.passes + other.passes,
            self.cost + other.cost,
            self.seconds + other.seconds,
            max(self.memory_bytes, other.memory_bytes),
        )

    def __str__(self) -> str:
        cost = "" if self.cost == self.passes else f" of cost {self.cost:,.0f}"
        rows = f"{self.rows:,} row{'s' * (self.rows != 1)}"
        return (
            f"{rows}, {self.answers:,} answers: at most {self.tokens:,} new tokens, "
            f"{self.passes:,.0f} forward passes{cost}, {_time(self.seconds)} and, as measured, "
            f"{self.memory_bytes / 2**30:.1f} GiB of memory."
        )


OnEstimate = Callable[[Estimate], None]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def announce(
    on_estimate: OnEstimate | None, run: Answering, plans: Iterable[tuple[Plan, int]]
) -> None:
    """Tell what answers take at most, before any is written or kept; for nobody no time is spent.

    Args:
        on_estimate: is told.
        run: whose questions are answered.
        plans: see :func:`estimated`; oracles and reports are not part of it.
    """
    if on_estimate is not None:
        run.say("measuring how long it will take")
        on_estimate(estimated(run, plans))


def estimated(run: Answering, plans: Iterable[tuple[Plan, int]]) -> Estimate:
    """Write a few tokens with every policy, and reckon what all answers take at most.

    Args:
        run: whose questions are answered.
        plans: rows, each with how many rows there will be that take about the same.
    """
    known: dict[str, _Pace] = {}
    total = Estimate()
    for plan, n_rows in plans:
        name = plan.of or plan.name
        if plan.policy is None or not n_rows:
            continue
        if name not in known:
            known[name] = _measured(run, plan)
        total += known[name].of(n_rows, len(run.questions), run.settings.max_new_tokens)
    return replace(total, memory_bytes=_peak_memory())


def _peak_memory() -> int:
    """Bytes that this process has taken at most, on accelerators too; 0 where nobody counts."""
    import torch

    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak + sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


@dataclass(frozen=True)
class _Pace:
    """What a text takes: to read its prompt and write one token, and for each further token."""

    first: Mapping[str, float]
    further: Mapping[str, float] = field(default_factory=dict)

    def of(self, n_rows: int, n_questions: int, n_tokens: int) -> Estimate:
        """What some rows take, whose answers have so many tokens."""
        n = n_rows * n_questions
        parts = {
            name: n * (value + (n_tokens - 1) * self.further.get(name, 0.0))
            for name, value in self.first.items()
        }
        return Estimate(n_rows, n, n * n_tokens, parts["passes"], parts["cost"], parts["seconds"])


def _measured(run: Answering, plan: Plan) -> _Pace:
    """Both parts, from the first questions."""
    first, n_first = _written(run, plan, 1)
    longer, n_longer = _written(run, plan, min(_N_TOKENS, run.settings.max_new_tokens))
    n_further = n_longer - n_first
    if n_further <= 0:
        return _Pace(first)
    n_texts = min(_N_QUESTIONS, len(run.questions))
    further = {
        name: max(0.0, longer[name] - value) * n_texts / n_further for name, value in first.items()
    }
    return _Pace(first, further)


def _written(run: Answering, plan: Plan, n_tokens: int) -> tuple[dict[str, float], int]:
    """What texts of so many tokens took, for one text, and how many tokens all of them have."""
    start = time.perf_counter()
    answers = run.sample(plan, _N_QUESTIONS, n_tokens)
    seconds = time.perf_counter() - start
    costs = dict(zip(run.ensemble.models, run.ensemble.costs, strict=True))
    passes = {
        name: sum(answer.usage[name].forwards for answer in answers) for name in run.ensemble.models
    }
    parts = {
        "seconds": seconds,
        "passes": float(sum(passes.values())),
        "cost": sum(n * costs[name] for name, n in passes.items()),
    }
    n_written = sum(len(answer.trace) for answer in answers)
    return {name: value / len(answers) for name, value in parts.items()}, n_written
