"""What a comparison says of itself: the figures, and all that weakens them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_results import fake_comparison

from multicolm.evaluation.findings import findings, routing_verdict
from multicolm.evaluation.results import Comparison, ModelUse, RowResult
from multicolm.evaluation.wording import points


def row(name: str, kind: Any, quality: float, **more: Any) -> RowResult:
    n = more.pop("n_questions", 20)
    return RowResult(name, kind, None, n, quality, 0.0, 1.0, **more)


def policy(name: str, quality: float, p: float | None = None, **more: Any) -> RowResult:
    gain = {"gain": quality - 0.35, "gain_low": -0.42, "gain_high": 0.05, "p_value": p}
    return row(name, "policy", quality, **({} if p is None else gain), n_shared=9, **more)


ALONE = [row("smol alone", "model", 0.1), row("gemma alone", "model", 0.35)]


def said(*rows: RowResult, alone: Any = ALONE, **more: Any) -> tuple[str, ...]:
    comparison = replace(fake_comparison(), rows=(*alone, *rows), metric="exact-match", **more)
    return findings(comparison)


def test_the_headline_says_that_no_policy_beats_the_best_model_alone() -> None:
    found = said(policy("average", 0.1, 0.1), policy("ck/conf", 0.15, 0.25), policy("rule", 0.05))
    assert found[0] == (
        "No policy beats gemma alone (35 %). Best: ck/conf, 15 %, 20 points less. 20 questions."
    )


@pytest.mark.parametrize(
    ("quality", "n_questions", "headline"),
    [
        (0.15, 20, "ck does not beat gemma alone (35 %): 15 %, 20 points less. 20 questions."),
        (0.35, 1, "ck does not beat gemma alone (35 %): 35 %, the same. 1 question."),
        (0.375, 80, "ck: 37.5 %, 2.5 points more than gemma alone (35 %). 80 questions."),
    ],
)
def test_one_policy_is_not_called_the_best_of_several(quality, n_questions, headline) -> None:
    assert said(policy("ck", quality, n_questions=n_questions))[0] == headline


@pytest.mark.parametrize(
    ("p_value", "p_holm", "is_chance"), [(0.03, 0.06, True), (0.03, 0.03, False), (0.2, None, True)]
)
def test_a_gain_that_may_be_chance_is_not_told_without_saying_so(
    p_value, p_holm, is_chance
) -> None:
    top = policy("ck", 0.5, p_value, p_holm=p_holm)
    headline = said(top, policy("rule", 0.4, 0.5))[0]
    chance = ", which may be chance" * is_chance
    assert headline == (
        f"Best of 2 policies: ck, 50 %, 15 points more than gemma alone (35 %){chance}. "
        "20 questions."
    )


def test_beside_it_stand_metric_split_interval_both_p_values_and_that_it_was_picked() -> None:
    found = said(policy("ck", 0.15, 0.0213, p_holm=0.0426), policy("rule", 0.1, 0.5))
    assert found[1] == (
        "Metric: exact-match, test split; 95 % interval of the difference "
        f"{points(-0.42)} to +5.0 points, "
        "p = 0.021, p = 0.043 after Holm's correction for 2 policies. The interval is uncorrected: "
        "ck was picked as the highest of 2 on these questions, which flatters it."
    )
    alone = said(policy("ck", 0.15, 0.0213))[1]
    assert alone.endswith(" points, p = 0.021.")
    assert said(policy("ck", 0.15))[1] == "Metric: exact-match, test split."


@pytest.mark.parametrize(
    ("n_questions", "n_policies", "sentence"),
    [
        # Two heads in 2 ** 6 are rare enough, in 2 ** 5 they are not.
        (5, 1, "with 5 questions no difference would be significant; that takes 6"),
        (6, 1, "with 6 questions no difference under 100 points would be significant"),
        (20, 1, "with 20 questions no difference under 30 points would be"),
        (20, 4, "with 20 questions and 4 policies no difference under 40 points would be"),
        (60, 1, ""),
        (60, 4, "no difference under 13.3 points"),
        (600, 9, ""),
    ],
)
def test_too_few_questions_for_a_finding_are_said(n_questions, n_policies, sentence) -> None:
    policies = [policy(f"p{i}", 0.2, n_questions=n_questions) for i in range(n_policies)]
    text = " ".join(said(*policies))
    assert sentence in text
    assert ("would be significant" in text) == bool(sentence)


def test_of_a_metric_with_values_between_only_what_is_true_is_said() -> None:
    # Twenty small differences can be told from chance, and five of any size cannot.
    twenty, five = (policy("p", 0.2, n_questions=n) for n in (20, 5))
    assert "from chance" not in " ".join(said(twenty, binary=False))
    assert "no difference would" in " ".join(said(five, binary=False))


def test_no_smaller_difference_than_the_one_named_is_ever_significant() -> None:
    from multicolm.evaluation.statistics import paired_test

    n = 20
    p_values = {}
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            a = [1] * only_a + [0] * (n - only_a)
            b = [0] * only_a + [1] * only_b + [0] * (n - only_a - only_b)
            p_values.setdefault(only_a - only_b, []).append(paired_test(a, b, seed=0))
    for n_policies, least in ((1, 6), (4, 8)):
        smaller = [min(p_values[d]) for d in p_values if abs(d) < least]
        assert n_policies * min(smaller) > 0.05 >= n_policies * min(p_values[least])


def test_answers_that_were_cut_off_are_counted_beside_the_headline() -> None:
    alone = [replace(ALONE[1], n_cut_off=1)]
    found = said(policy("ck", 0.15, n_cut_off=3), policy("rule", 0.1, n_cut_off=9), alone=alone)
    assert "Cut off at max_new_tokens: 3 of 20 answers of ck, 1 of 20 answers of gemma alone." in (
        found
    )


def test_without_a_policy_or_a_model_alone_nothing_is_found() -> None:
    assert said() == said(policy("ck", 0.15), alone=[]) == ()


# --- does routing tokens help over routing questions? --------------------------------------------


def uses(*written: int) -> tuple[ModelUse, ...]:
    return tuple(ModelUse(f"m{i}", n, n / sum(written), n, n, 1.0) for i, n in enumerate(written))


BOUND = row("per-question oracle", "oracle", 0.4)
KNN = replace(policy("knn", 0.38), n_shared=0, uses=uses(10, 10))


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (
            [policy("ck", 0.5, p_question_oracle=0.02), BOUND],
            "Here routing tokens beats any routing of whole questions.",
        ),
        # Of two policies the better one was picked.
        ([policy("ck", 0.5, p_question_oracle=0.03), KNN, BOUND], "stays open: the difference may"),
        ([policy("ck", 0.5), BOUND], "stays open: the difference may"),
        ([policy("ck", 0.39), BOUND], "Whether routing tokens helps over routing questions stays"),
        ([policy("ck", 0.39), KNN, BOUND], "Here routing tokens is ahead, but a better router"),
        ([policy("ck", 0.37), KNN, BOUND], "Here routing tokens does no better than routing"),
        ([policy("ck", 0.5)], ""),
        ([KNN, BOUND], ""),
        # One that never hands over routes nothing.
        ([policy("ck", 0.39), replace(KNN, uses=uses(20, 0)), BOUND], "stays open"),
    ],
)
def test_tokens_and_questions_are_weighed_against_each_other(rows, verdict) -> None:
    comparison: Comparison = replace(fake_comparison(), rows=(*ALONE, *rows))
    assert verdict in routing_verdict(comparison)
    assert bool(routing_verdict(comparison)) == bool(verdict)


def test_the_verdict_has_its_figures_on_one_line() -> None:
    same = row("random as ck", "random", 0.12, of="ck")
    routed = row("random as knn", "random", 0.2, of="knn")
    found = said(
        policy("ck", 0.5, p_question_oracle=0.01),
        same,
        KNN,
        routed,
        BOUND,
        row("oracle", "oracle", 0.9),
    )
    assert found[-1] == (
        "One model per question: 38 % (knn), 20 % at random with its shares, at most 40 % "
        "(per-question oracle). One per token: "
        "50 % (ck), 12 % at random with its shares, at most 90 % (oracle). Here "
        "routing tokens beats any routing of whole questions."
    )
