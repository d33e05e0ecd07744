"""The losses against references in double precision, and what follows from them on paper."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multicolm.learning.classifier import threshold_for_recall
from multicolm.learning.losses import (
    class_weights,
    cross_entropy,
    marginal_loss,
    responsibilities,
    usable,
    weak_labels,
)
from multicolm.score_table import ScoreTable
from multicolm.views import ModelNames

INF = float("inf")


def case(n_models: int, seed: int, n: int = 20, holes: float = 0.3):
    """Random scores, log-probabilities and masks; at each position one model can write."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, n_models, generator=g) * 3
    logprobs = torch.randn(n, n_models, generator=g).abs().neg() * 4
    impossible = torch.rand(n, n_models, generator=g) < holes
    known = torch.rand(n, n_models, generator=g) >= holes
    sure = torch.randint(n_models, (n,), generator=g)
    impossible[range(n), sure], known[range(n), sure] = False, True
    return scores, logprobs.masked_fill(impossible, -INF), known


def by_hand(scores, logprobs, known) -> list[float]:
    losses = []
    for s, p, k in zip(scores.tolist(), logprobs.tolist(), known.tolist(), strict=True):
        here = [m for m in range(len(s)) if k[m]]
        total = math.fsum(math.exp(s[m]) for m in here)
        losses.append(-math.log(math.fsum(math.exp(s[m]) / total * math.exp(p[m]) for m in here)))
    return losses


@given(n_models=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_marginal_loss_equals_a_plain_reference(n_models, seed) -> None:
    scores, logprobs, known = case(n_models, seed)
    expected = torch.tensor(by_hand(scores, logprobs, known))
    torch.testing.assert_close(marginal_loss(scores, logprobs, known), expected)


@given(n_models=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_its_gradient_is_pi_minus_the_responsibilities(n_models, seed) -> None:
    scores, logprobs, known = case(n_models, seed)
    scores, logprobs = scores.double().requires_grad_(), logprobs.double()
    marginal_loss(scores, logprobs, known).sum().backward()
    pi = scores.detach().masked_fill(~known, -INF).softmax(-1)
    r = responsibilities(scores.detach(), logprobs, known)
    torch.testing.assert_close(scores.grad, pi - r)
    torch.testing.assert_close(r.sum(-1), torch.ones(len(r)).double())
    assert (r[~known] == 0).all() and (r[logprobs == -INF] == 0).all()
    step = 1e-6
    for m in range(n_models):
        ahead, behind = scores.detach().clone(), scores.detach().clone()
        ahead[:, m] += step
        behind[:, m] -= step
        slope = marginal_loss(ahead, logprobs, known) - marginal_loss(behind, logprobs, known)
        torch.testing.assert_close(slope / (2 * step), pi[:, m] - r[:, m], atol=1e-6, rtol=1e-4)


def test_one_assistant_is_the_published_sigmoid() -> None:
    g = torch.Generator().manual_seed(0)
    s = torch.randn(50, generator=g).double() * 4
    p = torch.rand(50, 2, generator=g).double()
    loss = marginal_loss(torch.stack([torch.zeros(50), s], -1), p.log(), torch.ones(50, 2).bool())
    published = -torch.log(torch.sigmoid(-s) * p[:, 0] + torch.sigmoid(s) * p[:, 1])
    torch.testing.assert_close(loss, published)


def test_equal_models_give_no_gradient() -> None:
    scores, logprobs, known = case(5, 1, holes=0.0)
    scores.requires_grad_()
    same = logprobs[:, :1].expand(-1, 5)
    loss = marginal_loss(scores, same, known)
    loss.sum().backward()
    torch.testing.assert_close(loss, -same[:, 0])
    assert scores.grad.abs().max() < 1e-6


@given(n_models=st.integers(2, 8), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_uniform_pi_is_never_worse_than_the_best_model_plus_log_of_their_number(
    n_models, seed
) -> None:
    _, logprobs, known = case(n_models, seed)
    loss = marginal_loss(torch.zeros_like(logprobs), logprobs, known)
    best = -logprobs.masked_fill(~known, -INF).max(-1).values
    assert (loss <= best + math.log(n_models) + 1e-5).all()
    assert (loss >= best - 1e-5).all(), "and no mixture is better than its best part"


def test_a_constant_on_all_scores_changes_nothing() -> None:
    scores, logprobs, known = case(4, 3)
    torch.testing.assert_close(
        marginal_loss(scores + 17, logprobs, known), marginal_loss(scores, logprobs, known)
    )


def test_what_an_unknown_model_is_said_to_give_does_not_matter() -> None:
    scores, logprobs, known = case(4, 3)
    for junk in (0.0, -INF, 5.0):
        torch.testing.assert_close(
            marginal_loss(scores, logprobs.masked_fill(~known, junk), known),
            marginal_loss(scores, logprobs, known),
        )


def test_extreme_scores_and_log_probabilities_stay_finite_with_their_gradient() -> None:
    scores = torch.tensor([[0.0, 500.0], [0.0, -500.0], [0.0, 3.0]], requires_grad=True)
    logprobs = torch.tensor([[-1.0, -90.0], [-1.0, -INF], [-200.0, -INF]])
    loss = marginal_loss(scores, logprobs, torch.ones(3, 2).bool())
    loss.sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all()
    torch.testing.assert_close(
        loss.detach(), torch.tensor([90.0, 1.0, 200 + math.log1p(math.e**3)])
    )


# --- weak labels ---------------------------------------------------------------------------------


def table_of(correct, logprobs=None, known=None, example=None) -> ScoreTable:
    """A score table of which only some columns matter."""
    right = torch.tensor(correct).bool()
    n, m = right.shape
    zeros = torch.zeros(n, m)
    return ScoreTable(
        models=ModelNames([f"m{k}" for k in range(m)]),
        gold_ids=torch.full((n,), 5),
        gold_logprobs=zeros - 1 if logprobs is None else torch.tensor(logprobs),
        known=torch.ones(n, m).bool() if known is None else torch.tensor(known).bool(),
        top1_ids=torch.where(right, 5, 6),
        top1_logprobs=zeros,
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) if example is None else torch.tensor(example),
        place=torch.zeros(n).long(),
        base={},
    )


def test_weak_labels_are_those_worked_out_by_hand() -> None:
    correct = [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]
    expected = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [1, 0, 0]]
    assert weak_labels(table_of(correct)).tolist() == expected


def test_an_assistant_that_could_not_score_a_position_is_not_right_there() -> None:
    labels = weak_labels(table_of([[0, 1, 1]], known=[[1, 0, 1]]))
    assert labels.tolist() == [[0, 0, 1]]


def test_usable_positions_are_those_that_can_teach_something() -> None:
    logprobs = [[-1.0, -1.0, -1.0]] * 4 + [[-INF, -INF, -2.0], [-INF, -INF, -INF], [-INF, -1, -INF]]
    known = [[1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 1]]
    found = usable(table_of([[1, 0, 0]] * 7, logprobs, known))
    assert found.tolist() == [True, False, False, True, True, False, False]


def test_class_weights_lift_rare_classes_up_to_a_cap() -> None:
    labels = torch.tensor([[1.0, 0, 0, 0]] * 12 + [[0.0, 1, 0, 0]] * 4 + [[0.0, 0, 1, 0]])
    assert class_weights(labels.sum(0), 8.0).tolist() == pytest.approx([1, 3, 8, 8])
    assert class_weights(labels.sum(0), 1.0).tolist() == [1, 1, 1, 1]


def test_weighted_cross_entropy_is_that_worked_out_by_hand() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, -2.0]])
    labels, weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 3.0])
    first, second = math.log(1 + math.e), math.log(1 + math.e**2)
    assert cross_entropy(scores, labels, weights).tolist() == pytest.approx([first, 3 * second])


# --- the threshold of a recall -------------------------------------------------------------------


def test_the_threshold_is_the_greatest_one_that_finds_enough() -> None:
    handed = torch.tensor([0.95, 0.605, 0.405, 0.205, 0.99, 0.99])
    wanted = torch.tensor([True, True, True, True, False, False])
    found = [threshold_for_recall(handed, wanted, recall) for recall in (1.0, 0.75, 0.5, 0.25)]
    assert found == [0.20, 0.40, 0.60, 0.94]
    assert found == sorted(found), "less recall hands over less"


def test_a_threshold_is_found_where_nothing_or_not_enough_can_be() -> None:
    handed = torch.tensor([0.001, 0.5])
    assert threshold_for_recall(handed, torch.tensor([False, False]), 0.95) == 0.5
    assert threshold_for_recall(handed, torch.tensor([True, False]), 0.95) == 0.01


@given(seed=st.integers(0, 1000), recall=st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_no_greater_threshold_of_the_grid_finds_enough(seed, recall) -> None:
    g = torch.Generator().manual_seed(seed)
    handed, wanted = torch.rand(40, generator=g), torch.rand(40, generator=g) < 0.5
    wanted[0] = True

    def part(threshold: float) -> float:
        return float((handed[wanted] > threshold).float().mean())

    found = threshold_for_recall(handed, wanted, recall)
    assert part(found) >= recall or found == 0.01
    grid = [percent / 100 for percent in range(1, 100)]
    assert all(part(t) < recall for t in grid if t > found + 1e-9)


# --- splitting -----------------------------------------------------------------------------------


def test_whole_texts_are_held_out_and_equal_tables_split_equally() -> None:
    example = [n for n in range(20) for _ in range(n % 4 + 1)]
    table = table_of([[1, 0]] * len(example), example=example)
    learnt, judged = table.split(0.2, 7)
    texts = [set(part.example.tolist()) for part in (learnt, judged)]
    assert not texts[0] & texts[1] and len(texts[1]) == 4
    assert len(learnt) + len(judged) == len(table)
    again = table.split(0.2, 7)[1]
    assert torch.equal(again.example, judged.example)
    assert any(
        not torch.equal(table.split(0.2, a)[1].example, table.split(0.2, b)[1].example)
        for a, b in pairwise(range(5))
    )


def test_a_single_text_is_learnt_from_and_not_held_out() -> None:
    table = table_of([[1, 0]] * 3, example=[4, 4, 4])
    learnt, judged = table.split(0.9, 0)
    assert len(learnt) == 3 and len(judged) == 0
    assert [len(part) for part in table_of([[1, 0]] * 3).split(0.0, 0)] == [3, 0]
