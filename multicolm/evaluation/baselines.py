"""What policies are held against: random choices of models, and the best choice for each question.

random as P            matched shares: of tokens, or of questions where P routes whole questions
per-question oracle    the best answer of any model alone to each question
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from multicolm.evaluation.answering import Measured, Plan
from multicolm.evaluation.results import QUESTION_ORACLE
from multicolm.policy.resolve import resolve_policy

__all__ = ["question_oracle", "random_by_question", "random_by_token"]

_QUESTION_ORACLE_NOTE = (
    "For each question the best answer of any model alone: no choice of one model per question "
    "does better."
)
_BY_QUESTION_NOTE = (
    "Each question goes to a model at random, with the policy's shares of questions: what is to be "
    "expected of that, by the answers of models alone."
)


def random_by_token(measured: Sequence[Measured], models: Sequence[str]) -> Iterator[Plan]:
    """For each policy that hands tokens to several models, random routing with matched shares.

    Args:
        measured: rows that have run.
        models: the ensemble's names.
    """
    for row in measured:
        written = {name: row.total("written", name) for name in models}
        shares = {name: n for name, n in written.items() if n}
        if row.plan.kind != "policy" or row.n_mixed or len(shares) < 2 or _is_random(row.plan):
            continue
        if _routes_questions(row, models) and _alone(measured, models):
            continue
        total = sum(shares.values())
        weights = {name: n / total for name, n in shares.items()}
        policy = resolve_policy({"kind": "random", "params": {"weights": weights}})
        yield Plan(f"random as {row.plan.name}", "random", policy, of=row.plan.name)


def random_by_question(measured: Sequence[Measured], models: Sequence[str]) -> Iterator[Measured]:
    """For each policy that routes whole questions, a random choice with its shares of them.

    Nothing is run: quality and work are weighted means of those of the models alone, question by
    question.

    Args:
        measured: rows that have run, every model alone among them; otherwise there is no row.
        models: the ensemble's names.
    """
    alone = _alone(measured, models)
    for row in measured:
        if row.plan.kind != "policy" or not alone or not _routes_questions(row, models):
            continue
        counts = [row.total("alone", name) for name in models]
        weights = [count / sum(counts) for count in counts]
        plan = Plan(
            f"random as {row.plan.name}", "random", None, of=row.plan.name, note=_BY_QUESTION_NOTE
        )
        yield Measured(plan, [_expected(alone, weights, models)])


def question_oracle(measured: Sequence[Measured], models: Sequence[str]) -> list[Measured]:
    """The row of the best model alone for each question; none where not all ran, or there is one.

    Args:
        measured: rows that have run.
        models: the ensemble's names.
    """
    alone = _alone(measured, models)
    if len(alone) < 2:
        return []
    plan = Plan(QUESTION_ORACLE, "oracle", None, note=_QUESTION_ORACLE_NOTE)
    best = [max(qualities) for qualities in zip(*(row.qualities for row in alone), strict=True)]
    return [Measured(plan, [{"qualities": best}])]


def _alone(measured: Sequence[Measured], models: Sequence[str]) -> list[Measured]:
    """Every model alone, in the ensemble's order; empty if one did not run."""
    rows = [row for row in measured if row.plan.kind == "model"]
    return rows if len(rows) == len(models) else []


def _is_random(plan: Plan) -> bool:
    return bool(plan.checked.as_config()["kind"] == "random")


def _routes_questions(row: Measured, models: Sequence[str]) -> bool:
    """Whether every answer is one model's, and not all are of the same."""
    if row.n_shared != 0:
        return False
    return sum(bool(row.total("alone", name)) for name in models) > 1


def _expected(
    alone: Sequence[Measured], weights: Sequence[float], models: Sequence[str]
) -> dict[str, object]:
    """A chunk as the ledger keeps them, of what every model did alone."""

    def mean(values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    work: dict[str, dict[str, float | None]] = {}
    for name in models:
        counts = ("written", "forwards", "passes", "read")
        work[name] = {what: round(mean([r.total(what, name) for r in alone])) for what in counts}
        calls = [row.calls(name) for row in alone]
        known = [n for n in calls if n is not None]
        work[name]["calls"] = round(mean(known)) if len(known) == len(calls) else None
        work[name]["seconds"] = mean([row.total("seconds", name) for row in alone])
    return {
        "qualities": [
            mean(qualities) for qualities in zip(*(row.qualities for row in alone), strict=True)
        ],
        "models": work,
        "mixed": 0,
        "shared": 0,
        "cut_off": round(mean([row.n_cut_off for row in alone])),
        "seconds": mean([row.seconds for row in alone]),
    }
