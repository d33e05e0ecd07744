"""SAFE: mix models only where their tokens meet and they do not agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field

from multicolm.policy.base import Support, register_policy
from multicolm.policy.mixture import AveragePolicy
from multicolm.types import Tensor
from multicolm.views import ModelNames, Views

__all__ = ["SafePolicy"]


@register_policy("safe")
class SafePolicy(AveragePolicy):
    """The base model writes, and all are mixed only where that is safe and worth it.

    That is where every other model could go on (no token of its own lies across the place), one of
    them would write another token, and on average they give the base model's token less than
    ``threshold``.

    Attributes:
        threshold: the mean probability of the base model's likeliest token under the others, below
            which the models are mixed; 0 is the base model alone.

    Source:
        SAFE, arXiv 2510.15346, generate-verify-ensemble. Its exact thresholds are not public, nor
        is its sharpening of smooth mixtures here; 0.5 is the stand-in that most of the verifiers'
        mass speaks against the token.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    support: ClassVar[Support] = "union"
    seams: ClassVar[bool] = True
    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": (0.1, 0.3, 0.5, 0.7, 0.9)}

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model, and every model that weighs something."""
        return super().uses(models) | {0}

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's likeliest token."""
        return views.base.top1_probs

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The mixture where that is safe and worth it, else what the base model says."""
        import torch

        if not views.assistants:
            return views.base.logprobs
        token = views.base.top1_ids
        probs = torch.stack([views[k].logprob_of(token).exp() for k in views.assistants])
        others = torch.stack([views[k].top1_ids != token for k in views.assistants])
        is_open = torch.stack([views.is_open(k).to(token.device) for k in views.assistants])
        worth = others.any(0) & (probs.mean(0) < self.threshold) & is_open.all(0)
        return torch.where(worth[:, None], super().mix(views), views.base.logprobs)
