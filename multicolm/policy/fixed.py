"""One model alone, and one drawn at random at every token: the baselines of every comparison."""

from __future__ import annotations

from jaxtyping import Float, Int

from multicolm.policy.base import SelectPolicy, register_policy
from multicolm.types import Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["RandomPolicy", "SinglePolicy"]


@register_policy("single")
class SinglePolicy(SelectPolicy):
    """One model alone writes everything; the others are never run.

    Attributes:
        model: which one.

    Source:
        The baseline of every paper.
    """

    model: Role = "base"

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The one model."""
        return frozenset({models.role(self.model)})

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The same model everywhere."""
        import torch

        return torch.full((views.n_positions,), views.models.role(self.model))


@register_policy("random")
class RandomPolicy(SelectPolicy):
    """At every token a model that is drawn at random.

    With equal chances and sampling this is the mixture-like ensemble: its text follows the
    weighted average of the models' distributions while one model is run per token.

    Attributes:
        weights: each model's chance, as a list or by name; equal if not given.

    Source:
        "Mixture-like ensemble", arXiv 2605.00419 (ICML 2026); random routing as a baseline in
        Co-LLM, arXiv 2403.03870.
    """

    weights: list[float] | dict[str, float] | None = None

    def uses(self, models: ModelNames) -> frozenset[int]:
        """Every model with a chance."""
        chances = models.weights(self.weights)
        return frozenset(k for k, chance in enumerate(chances) if chance > 0)

    def model_probs(self, views: Views) -> Float[Tensor, "positions models"]:
        """The chances, the same everywhere."""
        import torch

        return torch.tensor(views.models.weights(self.weights)).expand(views.n_positions, -1)

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The model in whose part of [0, 1) the position's random number falls."""
        import torch

        chances = torch.tensor(views.models.weights(self.weights), dtype=torch.float64)
        drawn = torch.searchsorted(chances.cumsum(0), views.uniform.double(), right=True)
        # Rounding may leave the sum a little below 1: then the last model with a chance.
        return drawn.clamp(max=int(chances.nonzero().max()))
