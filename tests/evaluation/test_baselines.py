"""Random choices of models with a policy's shares, and what they are of: tokens or questions."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from duo_world import duo_ensemble

from multicolm.evaluation.compare import NamedPolicy, compare
from multicolm.evaluation.results import RowResult
from multicolm.policy.base import SelectPolicy
from multicolm.policy.threshold import ConfidencePolicy
from multicolm.types import Signal
from multicolm.views import Views


class ByQuestion(SelectPolicy):
    """The helper writes the whole answer to every question whose first look is unsure."""

    base_signals: ClassVar[set[Signal]] = {"top1"}
    history: ClassVar[bool] = True

    def select(self, views: Views) -> torch.Tensor:
        first = (views.base.top1_probs < 0.7).long()
        return torch.where(views.previous < 0, first, views.previous.clamp(min=0).long())


@pytest.fixture
def compared(make_task, tmp_path, reported):
    def run(*policies: Any, **settings: Any) -> dict[str, RowResult]:
        settings = {"out": tmp_path / "out", "batch_size": 2, "sweep": 0, **settings}
        comparison = compare(duo_ensemble(), policies, make_task(), **settings)
        return {row.name: row for row in comparison.rows}

    return run


# Worked out by hand: base alone x. x. x. x. (one right: the first), helper alone y. y. y. x. (one
# right: the second). The policy lets the helper answer the second question only.


def test_a_policy_of_whole_questions_is_held_against_random_questions(compared) -> None:
    found = compared(NamedPolicy("router", ByQuestion()))
    router, baseline = found["router"], found["random as router"]
    assert (router.quality, router.n_shared) == (0.5, 0)
    assert (baseline.kind, baseline.of, baseline.policy) == ("random", "router", None)
    # Three quarters of the base's 0.25 and a quarter of the helper's 0.25.
    assert baseline.quality == pytest.approx(0.25)
    assert [use.share for use in baseline.uses] == [0.75, 0.25]
    assert (baseline.n_tokens, baseline.cost, baseline.n_shared) == (8, 1.0, 0)
    assert baseline.seconds > 0
    assert baseline.note.startswith("Each question goes to a model at random")
    assert baseline.gain == pytest.approx(0)
    assert baseline.p_holm is None


def test_of_zeros_and_ones_the_expectations_of_a_baseline_change_no_method(
    compared, reported
) -> None:
    compared(NamedPolicy("router", ByQuestion()))
    assert reported[-1][0].binary is True


def test_without_the_models_alone_the_baseline_is_of_tokens(compared) -> None:
    row = compared(NamedPolicy("router", ByQuestion()), alone=False)["random as router"]
    assert row.policy is not None and row.policy["kind"] == "random"


def test_a_policy_of_tokens_is_held_against_random_tokens(compared) -> None:
    row = compared(NamedPolicy("rule", ConfidencePolicy(threshold=0.7)))["random as rule"]
    assert row.policy is not None and row.policy["kind"] == "random"


def test_without_random_rows_there_is_neither(compared) -> None:
    found = compared(NamedPolicy("router", ByQuestion()), random=False)
    assert not any(row.kind == "random" for row in found.values())
