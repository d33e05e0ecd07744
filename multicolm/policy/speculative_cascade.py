"""Speculative cascades: a token of the small model stays where it is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from pydantic import FiniteFloat

from multicolm.errors import ConfigError
from multicolm.policy.base import register_policy
from multicolm.policy.speculative import TargetPolicy
from multicolm.types import Tensor
from multicolm.views import Role, Views

__all__ = ["SpeculativeCascadePolicy"]

_RANGES = {
    "chow": (0.0, 1.0),
    "diff": (-1.0, 1.0),
    "token-v1": (-1.0, 1.0),
    "token-v2": (-1.0, 1.0),
    "token-v3": (0.0, 1.0),
}


@register_policy("speculative-cascade")
class SpeculativeCascadePolicy(TargetPolicy):
    """The base model drafts, and the text follows a distribution between its own and the target's.

    With q and p what the base and the target model would draw from, the text follows

        token rules    pi(v) = q(v) 1[v in A] + (1 - sum of q over A) p(v)
        other rules    pi = q if the base model is good enough, else p

    and is drawn by speculative sampling, so that it follows pi exactly:

        rule        A, or where the base model is good enough
        token-v3    A = {v: p(v) >= (1 - alpha) max p}
        token-v2    A = {v: p(v) >= max p - alpha}
        token-v1    A = {v: q(v) >= max p - alpha}
        chow        max q >= 1 - alpha
        diff        max q >= max p - alpha
        opt         max q >= max p - alpha D(p, q), with D the total variation distance

    The conditions compare the models' probabilities before temperature, top-k and top-p; D and pi
    are of those that tokens are drawn from. A greater alpha means more of the base model. In a
    trace it has written the drafted tokens that were accepted, the target what replaced one.

    Attributes:
        target: the model that the base model drafts for.
        rule: which tokens of the base model are good enough.
        alpha: lenience; 0 to 1 for ``chow`` and ``token-v3``, any number for ``opt``, -1 to 1 for
            the others. At the upper end the base model writes alone; for ``opt`` it does so as
            alpha grows without bound.

    Raises:
        ConfigError: if alpha is out of the rule's range.

    Source:
        Narasimhan et al., "Faster cascades via speculative decoding", arXiv 2405.19261 (ICLR
        2025), sections 4 and 5; rule and alpha of the authors' notebook. That drafts one token at
        a time, which does not change the distribution.
    """

    target: Role = "assistant"
    rule: Literal["chow", "diff", "opt", "token-v1", "token-v2", "token-v3"] = "token-v3"
    alpha: FiniteFloat = 0.5

    tunable: ClassVar[dict[str, Sequence[float]]] = {"alpha": (0.1, 0.3, 0.5, 0.7, 0.9)}

    def __post_init__(self) -> None:
        """What alpha may be depends on the rule."""
        low, high = _RANGES.get(self.rule, (self.alpha, self.alpha))
        if not low <= self.alpha <= high:
            raise ConfigError(
                f"speculative-cascade: alpha: must be from {low:g} to {high:g} for rule "
                f"'{self.rule}', got {self.alpha:g}."
            )

    def target_probs(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The distribution pi that the rule makes of the two models'."""
        q, p = views.drawn_probs(0), views.drawn_probs(self.target)
        kept = q * self._is_good_enough(views, q, p)
        return kept + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * p

    def _is_good_enough(
        self,
        views: Views,
        q: Float[Tensor, "positions vocab"],
        p: Float[Tensor, "positions vocab"],
    ) -> Bool[Tensor, "positions n"]:
        """Per token (n is the vocabulary's size), or for all tokens at once (n is 1)."""
        small, large = views.base.probs, views[self.target].probs
        best_small = small.max(-1, keepdim=True).values
        best_large = large.max(-1, keepdim=True).values
        if self.rule == "chow":
            return best_small >= 1 - self.alpha
        if self.rule == "diff":
            return best_small >= best_large - self.alpha
        if self.rule == "opt":
            distance = (q - p).clamp_min(0).sum(-1, keepdim=True)
            return best_small >= best_large - self.alpha * distance
        if self.rule == "token-v1":
            return small >= best_large - self.alpha
        if self.rule == "token-v2":
            return large >= best_large - self.alpha
        return large >= (1 - self.alpha) * best_large
