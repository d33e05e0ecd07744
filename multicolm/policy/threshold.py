"""Rules on how sure a model is: of its top-1 probability, its entropy, its margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, TypeAlias

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.policy.base import Deferral, Schedule, SelectPolicy, When, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import Views

__all__ = [
    "PROBABILITIES",
    "ConfidencePolicy",
    "EntropyPolicy",
    "MarginPolicy",
    "MaxConfidencePolicy",
    "ProbabilityThreshold",
]

PROBABILITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds on a probability that are worth trying."""

ProbabilityThreshold: TypeAlias = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
"""A threshold below which a probability makes the base model hand over: 0 is never, and 2, above
every probability, is always."""


def best_assistant(views: Views, score: Tensor) -> Int[Tensor, "positions"]:
    """Index of the assistant with the greatest score, the lowest of equal ones.

    Args:
        views: whose assistants are compared; without any, the base model continues.
        score: [assistants, positions], in the order of ``views.assistants``.
    """
    import torch

    return torch.tensor(views.assistants, device=score.device)[score.argmax(0)]


class _Unsure(SelectPolicy):
    """The base model writes unless its own number says that it is unsure."""

    assistants: ClassVar[When] = "deferred"
    certain: ClassVar[bool] = True

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The surest assistant, by the number the policy goes by."""
        import torch

        if not views.assistants:  # nobody to hand over to
            return torch.zeros(views.n_positions, dtype=torch.long)
        return best_assistant(
            views, torch.stack([self.sureness(views, k) for k in views.assistants])
        )

    def sureness(self, views: Views, k: int) -> Float[Tensor, "positions"]:
        """How sure model ``k`` is; greater is surer."""
        raise NotImplementedError


@register_policy("confidence")
class ConfidencePolicy(_Unsure):
    """The base model writes unless its most likely token is less likely than the threshold.

    Then the assistant whose own most likely token is the most likely writes.

    Attributes:
        threshold: probability, 0 (the base model alone) to 1; up to 2 is assistants alone.

    Source:
        Token-level deferral by confidence, as in BiLD's fallback, arXiv 2302.07863, section 3.
    """

    threshold: ProbabilityThreshold = 0.5

    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": PROBABILITIES}
    deferral: ClassVar[Deferral | None] = Deferral("threshold", above=False, never=0.0, always=2.0)
    base_signals: ClassVar[set[Signal]] = {"top1"}
    assistant_signals: ClassVar[set[Signal]] = {"top1"}

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's most likely token."""
        return views.base.top1_probs

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where that is below the threshold."""
        return views.base.top1_probs < self.threshold

    def sureness(self, views: Views, k: int) -> Float[Tensor, "positions"]:
        """Log-probability of the model's most likely token."""
        return views[k].top1_logprobs


@register_policy("entropy")
class EntropyPolicy(_Unsure):
    """The base model writes unless its entropy exceeds the threshold.

    Then the assistant of least entropy writes.

    Attributes:
        threshold: nats; below 0 is assistants alone.

    Source:
        Entropy switching, one of the baselines of R2R, arXiv 2505.21600.
    """

    threshold: float = 1.0

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "threshold": (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
    }
    deferral: ClassVar[Deferral | None] = Deferral("threshold", above=True, never=1e9, always=-1.0)
    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Entropy of the base model, in nats."""
        return views.base.entropy_nats

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where that exceeds the threshold."""
        return views.base.entropy_nats > self.threshold

    def sureness(self, views: Views, k: int) -> Float[Tensor, "positions"]:
        """Negative entropy, in nats."""
        return -views[k].entropy_nats


@register_policy("margin")
class MarginPolicy(_Unsure):
    """The base model writes unless its two most likely tokens are nearly as likely.

    Then the assistant of largest margin writes.

    Attributes:
        threshold: difference of two probabilities, 0 (the base model alone) to 1; up to 2 is
            assistants alone.

    Source:
        Margin sampling (Scheffer et al. 2001), used per token.
    """

    threshold: ProbabilityThreshold = 0.2

    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": PROBABILITIES}
    deferral: ClassVar[Deferral | None] = Deferral("threshold", above=False, never=0.0, always=2.0)
    base_signals: ClassVar[set[Signal]] = {"topk"}
    assistant_signals: ClassVar[set[Signal]] = {"topk"}

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Margin of the base model."""
        return views.base.margins

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where that is below the threshold."""
        return views.base.margins < self.threshold

    def sureness(self, views: Views, k: int) -> Float[Tensor, "positions"]:
        """The model's margin."""
        return views[k].margins


@register_policy("max-confidence")
class MaxConfidencePolicy(SelectPolicy):
    """The model whose most likely token is the most likely writes; all models are always run.

    Source:
        The "greedy" ablation of Co-LLM's code, arXiv 2403.03870.
    """

    base_signals: ClassVar[set[Signal]] = {"top1"}
    assistant_signals: ClassVar[set[Signal]] = {"top1"}
    schedule: ClassVar[Schedule] = "block"

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the most likely token of the surest model."""
        return views.stack(lambda view: view.top1_probs).max(0).values

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The surest model, the lowest of equal ones."""
        return views.stack(lambda view: view.top1_logprobs).argmax(0)
