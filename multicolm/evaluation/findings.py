"""What a comparison found, in sentences, each with what weakens it.

The same sentences are on the terminal, above the table, on the page and in ``results.json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from multicolm.evaluation.results import (
    QUESTION_ORACLE,
    TOKEN_ORACLE,
    Comparison,
    RowResult,
)
from multicolm.evaluation.wording import p_value, points, short_percent

__all__ = ["alone_name", "best_alone", "findings", "routing_verdict"]

_LEVEL = 0.05
_FEW = 0.1  # A difference that no smaller one can be told from chance, above which that is said.


def best_alone(comparison: Comparison) -> RowResult | None:
    """The first of the best models alone: the row that gains are measured against."""
    models = [row for row in comparison.rows if row.kind == "model"]
    return max(models, key=lambda row: row.quality, default=None)


def alone_name(row: RowResult) -> str:
    """What a sentence calls a model alone.

    >>> alone_name(RowResult("gemma", "model", None, 1, 1.0, 0.0, 1.0))
    'gemma alone'
    """
    return row.name if row.name.endswith(" alone") else f"{row.name} alone"


def findings(comparison: Comparison) -> tuple[str, ...]:
    """The headline, then how sure it is, then whether it pays to route tokens.

    Empty if there is no policy or no model alone to compare.
    """
    policies = [row for row in comparison.rows if row.kind == "policy"]
    alone = best_alone(comparison)
    if not policies or alone is None:
        return ()
    top = max(policies, key=lambda row: row.quality)
    sentences = [
        _headline(top, alone, len(policies)),
        _certainty(comparison, top, len(policies)),
        _too_few(comparison, top.n_questions, len(policies)),
        _cut_off([top, alone]),
        _cost(top, alone),
        _routing(comparison),
    ]
    return tuple(sentence for sentence in sentences if sentence)


def _headline(top: RowResult, alone: RowResult, n_policies: int) -> str:
    reference = f"{alone_name(alone)} ({short_percent(alone.quality)} %)"
    difference = top.quality - alone.quality
    away = f"{short_percent(abs(difference))} points {'more' if difference > 0 else 'less'}"
    questions = f" {top.n_questions:,} question{'s' * (top.n_questions != 1)}."
    quality = f"{short_percent(top.quality)} %"
    if difference > 0:
        first = f"Best of {n_policies} policies: {top.name}" if n_policies > 1 else top.name
        chance = ", which may be chance" if _may_be_chance(top) else ""
        sep = ", " if n_policies > 1 else ": "
        return f"{first}{sep}{quality}, {away} than {reference}{chance}.{questions}"
    away = away if difference else "the same"
    if n_policies == 1:
        return f"{top.name} does not beat {reference}: {quality}, {away}.{questions}"
    return f"No policy beats {reference}. Best: {top.name}, {quality}, {away}.{questions}"


def _may_be_chance(row: RowResult) -> bool:
    p = row.p_value if row.p_holm is None else row.p_holm
    return p is not None and p > _LEVEL


def _certainty(comparison: Comparison, top: RowResult, n_policies: int) -> str:
    """Metric and split, the interval of the headline's difference, and its p-value."""
    measured = f"Metric: {comparison.metric}, {comparison.split} split"
    if top.gain_low is None or top.gain_high is None or top.p_value is None:
        return f"{measured}."
    text = (
        f"{measured}; 95 % interval of the difference "
        f"{points(top.gain_low)} to {points(top.gain_high)} points, {p_value(top.p_value)}"
    )
    if n_policies == 1:
        return text + "."
    picked = f"picked as the highest of {n_policies} on these questions, which flatters it"
    if top.p_holm is None:
        return f"{text}, both uncorrected: {top.name} was {picked}."
    corrected = f"{p_value(top.p_holm)} after Holm's correction for {n_policies} policies"
    return f"{text}, {corrected}. The interval is uncorrected: {top.name} was {picked}."


def _too_few(comparison: Comparison, n_questions: int, n_policies: int) -> str:
    """That a difference, however real, could not show on so few questions.

    McNemar's p-value of ``k`` questions that one side alone has right is at least ``2 ** (1 - k)``,
    and so is that of sign flips of ``k`` differences; Holm asks ``n_policies`` times less of it.
    """
    least = 1 + math.ceil(math.log2(n_policies / _LEVEL))
    some = f"{n_questions} question{'s' * (n_questions != 1)}"
    several = f" and {n_policies} policies" if n_policies > 1 else ""
    if n_questions < least:
        return (
            f"These figures say next to nothing: with {some}{several} no difference would be "
            f"significant; that takes {least} questions or more."
        )
    if not comparison.binary or least <= _FEW * n_questions:
        return ""
    return (
        f"Few questions: with {some}{several} no difference under "
        f"{short_percent(least / n_questions)} points would be significant."
    )


def _cut_off(rows: Sequence[RowResult]) -> str:
    cut = [
        f"{row.n_cut_off} of {row.n_questions} answers of {row.name}"
        for row in rows
        if row.n_cut_off
    ]
    return f"Cut off at max_new_tokens: {', '.join(cut)}." if cut else ""


def _cost(top: RowResult, alone: RowResult) -> str:
    if not alone.cost or not top.cost:
        return ""
    return f"A token of {top.name} costs {top.cost / alone.cost:.2f} times one of {alone.name}."


def routing_verdict(comparison: Comparison) -> str:
    """Whether choosing a model for every token does more than choosing one for every question.

    Empty without a policy that lets several models write one answer, or without the per-question
    oracle.
    """
    bound, tokens, questions = _routes(comparison)
    if bound is None or tokens is None:
        return ""
    if tokens.quality > bound.quality:
        # The best of several policies, so its p-value is corrected for being picked.
        n_policies = sum(row.kind == "policy" for row in comparison.rows)
        p = tokens.p_question_oracle
        if p is not None and n_policies * p <= _LEVEL:
            return "Here routing tokens beats any routing of whole questions."
        return (
            "Whether routing tokens beats any routing of whole questions stays open: the "
            "difference may be chance."
        )
    if questions is None:
        return "Whether routing tokens helps over routing questions stays open."
    if tokens.quality > questions.quality:
        return "Here routing tokens is ahead, but a better router of questions could do as well."
    return "Here routing tokens does no better than routing questions."


def _routing(comparison: Comparison) -> str:
    """The verdict with its figures."""
    bound, tokens, questions = _routes(comparison)
    if bound is None or tokens is None:
        return ""
    rows = {row.name: row for row in comparison.rows}

    def figures(row: RowResult) -> list[str]:
        """Of a policy and of its random baseline."""
        same = [r for r in comparison.rows if r.kind == "random" and r.of == row.name]
        own = f"{short_percent(row.quality)} % ({row.name})"
        return [own, *(f"{short_percent(r.quality)} % at random with its shares" for r in same)]

    by_question = [] if questions is None else figures(questions)
    by_question.append(f"at most {short_percent(bound.quality)} % ({bound.name})")
    by_token = figures(tokens)
    if TOKEN_ORACLE in rows:
        by_token.append(f"at most {short_percent(rows[TOKEN_ORACLE].quality)} % ({TOKEN_ORACLE})")
    return (
        f"One model per question: {', '.join(by_question)}. One per token: {', '.join(by_token)}. "
        + routing_verdict(comparison)
    )


def _routes(
    comparison: Comparison,
) -> tuple[RowResult | None, RowResult | None, RowResult | None]:
    """The per-question oracle, and the best policies that route tokens and whole questions."""
    policies = [row for row in comparison.rows if row.kind == "policy"]
    whole = [row for row in policies if row.n_shared == 0 and _n_writers(row) > 1]
    by_token = [row for row in policies if row.n_shared is None or row.n_shared > 0]

    def best(rows: Sequence[RowResult]) -> RowResult | None:
        return max(rows, key=lambda row: row.quality, default=None)

    oracles = [row for row in comparison.rows if row.name == QUESTION_ORACLE]
    return best(oracles), best(by_token), best(whole)


def _n_writers(row: RowResult) -> int:
    return sum(use.tokens_written > 0 for use in row.uses)
