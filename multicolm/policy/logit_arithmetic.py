"""Sums and differences of log-probabilities: proxy tuning and contrastive decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field

from multicolm.policy.base import MixPolicy, Needs, Schedule, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["MOST_STRENGTH", "ContrastivePolicy", "ProxyTuningPolicy"]

MOST_STRENGTH = 1e6
"""A factor of log-probabilities beyond which nothing changes but that sums become infinite."""

_NEVER = float("-inf")


class _Arithmetic(MixPolicy):
    """Looks at all log-probabilities of the models that its fields name."""

    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}
    schedule: ClassVar[Schedule] = "block"

    def roles(self) -> tuple[Role, ...]:
        """The models that run."""
        raise NotImplementedError

    def needs(self, models: ModelNames) -> Needs:
        """All log-probabilities of the models with a role."""
        return Needs({k: frozenset(self.base_signals) for k in self.uses(models)}, {})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The models with a role."""
        return frozenset(models.role(role) for role in self.roles())


@register_policy("proxy-tuning")
class ProxyTuningPolicy(_Arithmetic):
    """What tuning changed in a small model is added to a large one.

    ``log p_base + alpha (log p_expert - log p_antiexpert)``, where the expert is the tuned small
    model and the anti-expert the same before tuning. A token that either of the two cannot write
    (its probability is 0, as where a model has no such token) is judged without the difference.

    Attributes:
        alpha: strength; 0 is the base model alone.
        expert: the tuned small model.
        antiexpert: the untuned small model.

    Source:
        arXiv 2401.08565, section 2; alpha = 1 there.
    """

    alpha: Annotated[float, Field(ge=-MOST_STRENGTH, le=MOST_STRENGTH, allow_inf_nan=False)] = 1.0
    expert: Role = 1
    antiexpert: Role = 2

    tunable: ClassVar[dict[str, Sequence[float]]] = {"alpha": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)}

    def roles(self) -> tuple[Role, ...]:
        """Base model, expert and anti-expert."""
        return (0, self.expert, self.antiexpert)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Sum of the base model and the scaled difference."""
        base = views.base.logprobs
        expert, anti = views[self.expert].logprobs, views[self.antiexpert].logprobs
        known = (anti != _NEVER) & (expert != _NEVER)
        for role in (self.expert, self.antiexpert):
            known = known & views.is_open(role).to(known.device)[:, None]
        change = (expert - anti).masked_fill(~known, 0.0)
        return base + self.alpha * change


@register_policy("contrastive")
class ContrastivePolicy(_Arithmetic):
    """What the expert knows and the amateur does not.

    ``(1 + beta) log p_expert - beta log p_amateur`` over the tokens whose expert probability is at
    least ``alpha`` times the greatest one.

    Attributes:
        alpha: 0 to 1; 1 is the expert's greedy text.
        beta: strength; 0 is the expert alone (within ``alpha``).
        expert: the strong model.
        amateur: the weak model.

    Source:
        O'Brien and Lewis 2023, arXiv 2309.09117, after Li et al. 2022, arXiv 2210.15097. The
        cut is by the expert's own probabilities, as in the papers.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    beta: Annotated[float, Field(ge=0, le=MOST_STRENGTH, allow_inf_nan=False)] = 0.5
    expert: Role = "assistant"
    amateur: Role = "base"

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "beta": (0.1, 0.25, 0.5, 1.0, 2.0),
        "alpha": (0.01, 0.1, 0.3, 0.5),
    }

    def roles(self) -> tuple[Role, ...]:
        """Expert and amateur."""
        return (self.expert, self.amateur)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The contrast, -inf for tokens that the expert finds implausible."""
        expert, amateur = views[self.expert].logprobs, views[self.amateur].logprobs
        floor = expert.max(-1, keepdim=True).values
        floor = floor + (math.log(self.alpha) if self.alpha > 0 else _NEVER)
        plausible = (expert >= floor) & (expert != _NEVER)
        if self.beta == 0:
            return expert.masked_fill(~plausible, _NEVER)
        # A token that the amateur cannot write at all gets the greatest finite contrast.
        contrast = (1 + self.beta) * expert - self.beta * amateur.clamp_min(-1e4)
        if not views.all_open:
            silent = ~views.is_open(self.amateur).to(expert.device)[:, None]
            contrast = contrast.masked_fill(silent, 0.0) + expert.masked_fill(~silent, 0.0)
        return contrast.masked_fill(~plausible, _NEVER)
