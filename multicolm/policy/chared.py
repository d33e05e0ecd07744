"""CharED: models of any vocabularies write together character by character."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float

from multicolm.policy.base import Support, register_policy
from multicolm.policy.mixture import WeightedPolicy
from multicolm.types import Tensor
from multicolm.views import Views

__all__ = ["CharEdPolicy"]


@register_policy("chared")
class CharEdPolicy(WeightedPolicy):
    """Every character is drawn from the weighted average of all models' distributions.

    A model's next character has the probability of all tokens that begin with it; what stays
    after a character are the tokens that began with it. An end of a token is an outcome too: all
    models are asked anew after it. So a model that is within a token takes the text so far as
    ended there, which `byte-mixture` does not: it sums over all ways to spell the text.

    Attributes:
        weights: one per model, as a list or by name; equal if not given. For two models they are
            the published alpha and 1 - alpha. A model of weight 0 is never run.

    Source:
        CharED, arXiv 2407.11009 (ICML 2024 workshop), algorithm 1. Sampled with all weight on one
        model it writes that model's own text; the likeliest characters need not be those of the
        likeliest token, so greedy decoding does not.
    """

    weights: list[float] | dict[str, float] | None = None

    support: ClassVar[Support] = "characters"

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Logarithm of the average."""
        return self._arithmetic(views)
