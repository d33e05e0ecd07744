"""R-Stitch: two models that hand a text to each other by how uncertain they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import FiniteFloat

from multicolm.policy.base import Needs, NewTokens, SelectPolicy, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, View, Views

__all__ = ["RStitchPolicy"]


@register_policy("r-stitch")
class RStitchPolicy(SelectPolicy):
    """The small base model writes until it is uncertain, then the large one until it is certain.

    Where the small model's entropy exceeds the threshold, the large model writes the token in its
    place, and continues. After a token at which its own entropy did not exceed the threshold the
    small model continues. Only the model whose turn it is runs; at a hand-over to the large
    model both do.

    Attributes:
        threshold: of the entropy as a part of the greatest possible, log V for V tokens (the
            paper's tau); 1 is the small model alone, below 0 the large one alone.
        large: the large model.

    Source:
        R-Stitch, arXiv 2507.17307, section 3. The threshold is our choice: 0.03 is about 0.36 nats
        in a vocabulary of 150,000 tokens. Its learned router, R-Stitch+, is not here.
    """

    threshold: FiniteFloat = 0.03
    large: Role = "assistant"

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "threshold": (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
    }
    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}

    def needs(self, models: ModelNames) -> Needs:
        """Whichever of the two models has the text."""
        return Needs({}, dict.fromkeys(sorted(self.uses(models)), frozenset(self.base_signals)))

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The small and the large model."""
        return frozenset({0, models.role(self.large)})

    def initial_state(self, views: Views) -> Int[Tensor, "positions width"]:
        """The index of the model that has the text: the small one."""
        import torch

        return torch.zeros(views.n_positions, 1, dtype=torch.long)

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The model that has the text."""
        import torch

        return torch.nn.functional.one_hot(views.state[:, 0], len(views.models)).bool()

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Entropy of the model that has the text, as a part of the greatest possible."""
        return _entropy(views.base if 0 in views else views[self.large])

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The large model where it has the text, or the small one is uncertain."""
        large = views.models.role(self.large)
        is_large = views.state[:, 0] == large
        if 0 in views:
            is_large = is_large | (_entropy(views.base) > self.threshold)
        return is_large.long() * large

    def update(self, views: Views, written: NewTokens) -> Int[Tensor, "positions width"]:
        """The large model keeps the text after a token of its own that it was uncertain of."""
        import torch

        large = views.models.role(self.large)
        if large not in views:
            return torch.zeros_like(views.state)
        keeps = (written.writers == large) & (_entropy(views[large]) > self.threshold)
        return (keeps.long() * large)[:, None]


def _entropy(view: View) -> Float[Tensor, "positions"]:
    """As a part of the greatest possible with the tokens that the model has."""
    n_tokens = (view.logprobs > float("-inf")).sum(-1)
    return view.entropy_nats / n_tokens.clamp_min(2).log()
