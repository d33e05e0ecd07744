"""FusionRoute: the base model's state names one expert, and the two write together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.policy.base import MixPolicy, ModelFacts, Needs, register_policy
from multicolm.policy.learned import (
    check_count,
    check_made_for,
    check_width,
    network_of,
    on_device_of,
)
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

if TYPE_CHECKING:
    from torch import nn

    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreBlocks

__all__ = ["FusionRoutePolicy"]

_NEVER = float("-inf")


@register_policy("fusion-route")
class FusionRoutePolicy(MixPolicy):
    """At every token one assistant is named, and its log-probabilities and the base model's add up.

        log p = log p_I + complement log p_0 + const,   I = argmax_k (W h)_k over the assistants,

    with h the base model's last hidden state. Two models are run per token, however many there
    are: the base model and the one that is named.

    Attributes:
        head: what was learned, W and its bias; nothing yet if not given.
        complement: how much the base model's log-probabilities count; 1 as published, 0 leaves the
            named assistant alone. Where the assistants know facts and not the form of an answer,
            more than 1 may be right: tune it.
        cost_weight: nats per unit of an assistant's cost (:attr:`multicolm.Views.costs`), taken off
            its score; it decides which assistant is named, not whether one is.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        FusionRoute, arXiv 2601.05106, section 3. There the base model is fine-tuned with the head,
        first to write good answers and then, by preferences (CDPO), to correct the experts. Here it
        stays as it is, so that `complement` is worth tuning, and the head alone is trained, by the
        likelihood -log sum_k softmax(W h)_k p_k(x_t) of the text under the assistants.
    """

    head: Weights | None = None
    complement: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cost_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    made_for: dict[str, str] | None = None

    base_signals: ClassVar[set[Signal]] = {"hidden", "logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}
    streams: ClassVar[bool] = True
    tunable: ClassVar[dict[str, Sequence[float]]] = {"complement": (0.25, 0.5, 1.0, 2.0, 4.0)}

    def needs(self, models: ModelNames) -> Needs:
        """The base model always, an assistant where it is named.

        Raises:
            CapabilityError: if it is not trained, or for another number of models.
        """
        check_count(self.name, self._shape[1] + 1, models)
        return super().needs(models)

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse models that it was not trained with.

        Raises:
            CapabilityError: naming both.
        """
        check_made_for(self.name, self.made_for, models)
        check_width(self.name, self._shape[0], models[0])

    @cached_property
    def _network(self) -> nn.Sequential:
        return network_of(self.name, self.head, "the head")

    @property
    def _shape(self) -> tuple[int, int]:
        from multicolm.learning.networks import shape_of

        return shape_of(self._network)

    def _weights(self, views: Views) -> Float[Tensor, "positions experts"]:
        hidden = views.base.hidden.float()
        scores: Float[Tensor, "positions experts"] = on_device_of(hidden, self._network)(hidden)
        return (scores - self.cost_weight * views.costs[1:].to(scores)).softmax(-1)

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The assistant with the greatest weight, the first of equal ones."""
        import torch

        named = self._weights(views).argmax(-1) + 1
        return torch.nn.functional.one_hot(named, len(views.models)).bool()

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """The weight of the assistant that is named."""
        return self._weights(views).max(-1).values

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The sum of log-probabilities; the assistant's alone where the two rule all tokens out."""
        import torch

        [named] = views.assistants
        own = views[named].logprobs
        if self.complement == 0:
            return own
        fused = own + self.complement * views.base.logprobs
        return torch.where((fused == _NEVER).all(-1, keepdim=True), own, fused)

    def fit(self, table: ScoreBlocks, training: Training | None = None) -> FusionRoutePolicy:
        """The same policy with a head that was trained on a score table with hidden states.

        Args:
            table: of the ensemble's models, made with ``--hidden``; in memory or on disk.
            training: options (:class:`multicolm.learning.router.RouterSettings`), progress, and
                what is reported back: of the assistant that is named, without the base model.

        Raises:
            ArtefactError: if the table holds no hidden states.
            TrainingError: if there is nothing to learn from, or training diverges.
        """
        from multicolm.learning.experts import fit_experts
        from multicolm.learning.training import Training

        tensors = fit_experts(table, lambda part: part.feature("hidden"), training or Training())
        made_for = dict(zip(table.models, table.identities, strict=True))
        return replace(self, head=Weights(tensors), made_for=made_for)
