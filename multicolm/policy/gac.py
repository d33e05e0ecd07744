"""Mixtures across vocabularies on the union of the models' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Bool, Float
from pydantic import Field

from multicolm.policy.base import Needs, Support, When, register_policy
from multicolm.policy.mixture import AveragePolicy
from multicolm.types import Tensor
from multicolm.views import ModelNames, Views

__all__ = ["GacPolicy"]

_ROUNDING = 1e-5  # how close two sums of float32 probabilities may be to count as equal


@register_policy("gac")
class GacPolicy(AveragePolicy):
    """Every token is drawn from the average over the union of the models' vocabularies.

    A token has its probability under a model that has it, and 0 under one that does not. Each model
    reads what was written in its own tokens. Gated, the base model writes where it is sure enough,
    and the others are not run there; nor are they where a greedy token is settled without them:
    the base model's margin, by its weight, is greater than all that the others weigh.

    Attributes:
        threshold: the base model writes alone where its likeliest token has this probability or
            more; the default asks all models everywhere.

    Source:
        GaC, arXiv 2406.12585 (EMNLP 2024), section 3, and its thresholded form, which others run
        with 0.5 (SAFE, arXiv 2510.15346, section 4.1). Published for greedy decoding, and with the
        arithmetic mean; a model that spells a likely word in two tokens gives it less there than
        it means, which `byte-mixture` does not.
    """

    threshold: float = Field(default=2.0, ge=0, le=2)

    support: ClassVar[Support] = "union"
    assistants: ClassVar[When] = "deferred"
    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": (0.3, 0.5, 0.7, 0.9, 1.0)}

    def needs(self, models: ModelNames) -> Needs:
        """The base model always, the others where it is not sure."""
        used = self.uses(models)
        signals = frozenset(self.base_signals)
        return Needs({0: signals}, dict.fromkeys(sorted(used - {0}), signals))

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model, and every model that weighs something."""
        return super().uses(models) | {0}

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where the base model is less sure than the threshold, and the others can matter."""
        unsure = views.base.top1_probs < self.threshold
        own = views.models.weights(self.weights)[0]
        if self.mean != "arithmetic" or own <= 0.5:
            return unsure
        settled = own * views.base.margins > 1 - own + _ROUNDING
        return unsure & ~(settled & views.greedy.to(settled.device))

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's likeliest token."""
        return views.base.top1_probs
