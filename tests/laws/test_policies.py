"""The laws of policies, on every registered policy; and proof that each check bites."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tables import READY

import multicolm
from multicolm import MixPolicy, SelectPolicy, VerifyPolicy, Views
from multicolm.errors import CapabilityError, PolicyError
from multicolm.plugins import policies
from multicolm.testing import LawBroken, check_policy


@pytest.mark.parametrize("kind", READY)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_registered_policy_keeps_the_laws(kind: str, seed: int) -> None:
    check_policy(policies.get(kind)(), seed=seed)
    assert policies.get(kind).name == kind


def test_the_policies_that_learn_are_tested_where_they_are_trained() -> None:
    learned = [kind for kind in policies if hasattr(policies.get(kind), "fit")]
    assert learned == ["co-llm", "cosd-tree", "cpr", "fusion-route", "mlp-router"]
    for kind in learned:
        with pytest.raises(CapabilityError, match="has not learned anything yet; train one with"):
            check_policy(policies.get(kind)())
        tests = Path(__file__).parents[1] / "policy" / f"test_{kind.replace('-', '_')}.py"
        assert "check_policy(" in tests.read_text(encoding="utf-8"), tests


class _Top1(SelectPolicy):
    base_signals: ClassVar[Any] = {"top1"}
    assistant_signals: ClassVar[Any] = {"top1"}


class Moody(_Top1):
    def select(self, views: Views) -> torch.Tensor:
        return torch.randint(0, len(views.models), (views.n_positions,))


class ComparesRows(_Top1):
    def select(self, views: Views) -> torch.Tensor:
        probs = views.base.top1_probs
        return (probs < probs.mean()).long() * (len(views.models) - 1)


class NamesNobody(_Top1):
    def select(self, views: Views) -> torch.Tensor:
        return torch.full((views.n_positions,), 7)


class NamesMoreThanItUses(_Top1):
    def uses(self, models: multicolm.ModelNames) -> frozenset[int]:
        return frozenset({0})

    def select(self, views: Views) -> torch.Tensor:
        return (views.base.top1_probs < 0.5).long() * (len(views.models) - 1)


class OneAnswerForAll(_Top1):
    def select(self, views: Views) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.long)


class SaysCertainAndIsNot(_Top1):
    certain: ClassVar[bool] = True

    def defers(self, views: Views) -> torch.Tensor:
        return views.base.top1_probs < 0.9

    def select(self, views: Views) -> torch.Tensor:
        return (views.base.top1_probs < 0.5).long() * (len(views.models) - 1)


class WritesIntoTheViews(MixPolicy):
    base_signals: ClassVar[Any] = {"logprobs"}

    def mix(self, views: Views) -> torch.Tensor:
        return views.base.logits.mul_(1.5)


class Impossible(MixPolicy):
    base_signals: ClassVar[Any] = {"logprobs"}

    def mix(self, views: Views) -> torch.Tensor:
        return torch.full_like(views.base.logits, float("-inf"))


class NotANumber(MixPolicy):
    base_signals: ClassVar[Any] = {"logprobs"}

    def mix(self, views: Views) -> torch.Tensor:
        return views.base.logits * float("nan")


class NamesTheWrongWriter(MixPolicy):
    base_signals: ClassVar[Any] = {"logprobs"}

    def mix(self, views: Views) -> torch.Tensor:
        return 2 * views.base.logprobs

    def writers(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, dtype=torch.long)


class SumsToTwo(VerifyPolicy):
    base_signals: ClassVar[Any] = {"logprobs"}

    def target_probs(self, views: Views) -> torch.Tensor:
        return 2 * views.drawn_probs(0)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Moody, "deterministic"),
        (ComparesRows, "that position alone"),
        (NamesNobody, "models that exist"),
        (NamesMoreThanItUses, "models that exist and that it uses"),
        (OneAnswerForAll, "one answer per position"),
        (SaysCertainAndIsNot, "certain deferral"),
        (WritesIntoTheViews, "leaves the views as they are"),
        (Impossible, "a possible token"),
        (NotANumber, "no NaN"),
        (NamesTheWrongWriter, "ascribes to a model is drawn from its distribution"),
        (SumsToTwo, "sum to 1"),
    ],
)
def test_a_policy_that_breaks_a_law_is_caught(wrong: type[multicolm.Policy], law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        check_policy(wrong())


def test_a_policy_that_reads_what_it_did_not_declare_is_caught() -> None:
    class Curious(_Top1):
        def select(self, views: Views) -> torch.Tensor:
            return (views.base.entropy_nats > 1).long()

    with pytest.raises(PolicyError, match="reads 'logprobs' of model 'base'"):
        check_policy(Curious())


def test_a_policy_that_looks_back_without_saying_so_is_caught() -> None:
    class Nostalgic(_Top1):
        def select(self, views: Views) -> torch.Tensor:
            return views.previous.clamp(min=0)

    with pytest.raises(PolicyError, match="history = True"):
        check_policy(Nostalgic())
