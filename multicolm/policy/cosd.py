"""CoSD: speculate, then collaborate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat

from multicolm.policy.base import Schedule, SelectPolicy, When, register_policy
from multicolm.policy.threshold import ProbabilityThreshold, best_assistant
from multicolm.types import Signal, Tensor
from multicolm.views import Views

__all__ = ["CosdRulePolicy"]


@register_policy("cosd-rule")
class CosdRulePolicy(SelectPolicy):
    """An unsure base model is corrected by an assistant that is sure of something else.

    Assistant k is a candidate where its most likely token differs from the base model's, the base
    model's has probability below ``alpha``, and its own has more than ``beta`` times that. The
    surest candidate writes; without one, the base model.

    Assistants are run only where the second condition holds, which changes nothing but the cost.

    Attributes:
        alpha: probability below which the base model counts as unsure; 0 is the base model alone,
            above 1 (up to 2) it always does.
        beta: how sure an assistant must be, relative to the base model.

    Source:
        arXiv 2502.08020 (ICML 2025), section 3, rule-based verification; more than one assistant
        by the greatest probability. The published code implements another rule.
    """

    alpha: ProbabilityThreshold = 0.5
    beta: NonNegativeFloat = 0.5

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "alpha": (0.1, 0.3, 0.5, 0.7, 0.9, 1.1),
        "beta": (0.0, 0.25, 0.5, 0.75, 1.0),
    }
    base_signals: ClassVar[set[Signal]] = {"top1"}
    assistant_signals: ClassVar[set[Signal]] = {"top1"}
    assistants: ClassVar[When] = "deferred"
    schedule: ClassVar[Schedule] = "block"

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's most likely token."""
        return views.base.top1_probs

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where the base model is unsure."""
        return views.base.top1_probs < self.alpha

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The surest candidate, else the base model."""
        import torch

        base = views.base
        if not views.assistants:
            return torch.zeros(views.n_positions, dtype=torch.long)
        sureness = []
        for k in views.assistants:
            view = views[k]
            candidate = (view.top1_ids != base.top1_ids) & (
                view.top1_probs > self.beta * base.top1_probs
            )
            sureness.append(view.top1_logprobs.masked_fill(~candidate, float("-inf")))
        score = torch.stack(sureness)
        nobody = score.max(0).values == float("-inf")
        return best_assistant(views, score).masked_fill(nobody, 0)
