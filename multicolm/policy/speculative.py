"""Speculative decoding: the target model's own text, at the draft model's pace."""

from __future__ import annotations

from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field

from multicolm.policy.base import Needs, VerifyPolicy, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["SpeculativePolicy", "TargetPolicy"]


class TargetPolicy(VerifyPolicy):
    """The base model drafts for the model in its field ``target``.

    In a trace the base model has written what was accepted, the target what replaced a draft token.
    """

    target: Role

    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}

    def needs(self, models: ModelNames) -> Needs:
        """Both models always."""
        target = {models.role(self.target): frozenset(self.assistant_signals)}
        return Needs({0: frozenset(self.base_signals), **target}, {})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model and the target."""
        return frozenset({0, models.role(self.target)})

    def replaces(self, models: ModelNames) -> int:
        """The target model."""
        return models.role(self.target)


@register_policy("speculative")
class SpeculativePolicy(TargetPolicy):
    """The base model drafts, and the text follows the target model's distribution exactly.

    In a trace the base model has written what was accepted, the target what replaced a draft token.

    Attributes:
        target: the model whose text is wanted.
        lenience: 0 to 1; 0 is exact, towards 1 the base model's tokens pass more easily. One minus
            the paper's lenience, which is 1 where nothing is lost.

    Source:
        Leviathan et al. 2023, arXiv 2211.17192, algorithm 1 and appendix A.5 (lenience).
    """

    target: Role = "assistant"
    lenience: Annotated[float, Field(ge=0, le=1)] = 0.0

    def target_probs(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """What the target model would draw from."""
        return views.drawn_probs(self.target)
