"""Averages of distributions."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float

from multicolm.policy.base import MixPolicy, Needs, Schedule, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

__all__ = ["AveragePolicy", "WeightedPolicy"]


class WeightedPolicy(MixPolicy):
    """Mixes models by the weights in its field ``weights``; one of weight 0 is never run."""

    weights: list[float] | dict[str, float] | None

    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}

    def needs(self, models: ModelNames) -> Needs:
        """Every model that weighs something."""
        return Needs({k: frozenset(self.base_signals) for k in self.uses(models)}, {})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """Every model that weighs something."""
        return frozenset(k for k, w in enumerate(models.weights(self.weights)) if w > 0)

    def _weighed(self, views: Views) -> tuple[Tensor, Tensor]:
        """Log-probabilities [models, positions, vocab], and the weight of each model there.

        A model that cannot continue, as no tokens of its own spell what others wrote, has no say.
        """
        import torch

        weights = views.models.weights(self.weights)
        logprobs = views.stack(lambda view: view.logprobs)
        weight = torch.tensor([weights[k] for k in views], device=logprobs.device)[:, None, None]
        if not views.all_open:
            can = torch.stack([views.is_open(k).to(weight.device) for k in views])[:, :, None]
            weight = weight * can
            weight = weight / weight.sum(0, keepdim=True)
        # A weight too small for this dtype would turn 0 * -inf into NaN.
        return logprobs, weight.clamp_min(torch.finfo(weight.dtype).tiny)

    def _arithmetic(self, views: Views) -> Float[Tensor, "positions vocab"]:
        logprobs, weight = self._weighed(views)
        return (logprobs + weight.log()).logsumexp(0)

    def _geometric(self, views: Views) -> Float[Tensor, "positions vocab"]:
        logprobs, weight = self._weighed(views)
        return (logprobs * weight).sum(0)

    def _median(self, views: Views) -> Float[Tensor, "positions vocab"]:
        import torch

        from multicolm.policy.median import median_shares

        logprobs, weight = self._weighed(views)
        given = views.models.weights(self.weights)
        shares = median_shares(logprobs.exp(), weight.new_tensor([given[k] for k in views]))
        if not views.all_open:  # a median of fewer models at some positions: there their average
            silent = torch.stack([~views.is_open(k) for k in views]).any(0).to(shares.device)
            shares = torch.where(silent[:, None], weight[:, :, 0].T, shares)
        shares = shares.T[:, :, None].clamp_min(torch.finfo(shares.dtype).tiny)
        return (logprobs + shares.log()).logsumexp(0)


@register_policy("average")
class AveragePolicy(WeightedPolicy):
    """Every token is drawn from the weighted average of all models' distributions.

    Attributes:
        weights: one per model, as a list or by name; equal if not given. A model of weight 0 is
            never run.
        mean: ``arithmetic`` averages probabilities, ``geometric`` log-probabilities. ``median`` is
            the geometric median of the distributions, the point with the least weighted sum of
            distances to them, which models that are wrong cannot move far as long as they weigh
            less than half; of two models of equal weight it is the arithmetic mean, and a model of
            more than half of the weight is the median itself. It is meant for models that know the
            same: of experts for different things it follows the majority, which does not know.

    Source:
        Linear and log-linear opinion pools (Genest and Zidek 1986); per token in speculative
        ensembles, arXiv 2502.01662. The geometric median is a common robust aggregate, as in RFA,
        arXiv 1912.13445; no publication is known that takes it for language models' tokens.
    """

    weights: list[float] | dict[str, float] | None = None
    mean: Literal["arithmetic", "geometric", "median"] = "arithmetic"

    schedule: ClassVar[Schedule] = "block"

    def __post_init__(self) -> None:
        """A product of probabilities has no use for one that is not known."""
        if self.mean != "geometric":
            text = "tokens outside a server's top k count with probability 0"
            object.__setattr__(self, "partial", text)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Logarithm of the average (of a geometric one, up to a constant)."""
        if self.mean == "median":
            return self._median(views)
        return self._geometric(views) if self.mean == "geometric" else self._arithmetic(views)
