"""A small network on the base model's state says whether to hand over, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.errors import ArtefactError, CapabilityError
from multicolm.policy.base import (
    Deferral,
    ModelFacts,
    Needs,
    SelectPolicy,
    When,
    register_policy,
)
from multicolm.policy.learned import (
    check_count,
    check_made_for,
    check_width,
    network_of,
    on_device_of,
)
from multicolm.policy.threshold import PROBABILITIES, best_assistant
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, View, Views

if TYPE_CHECKING:
    from torch import nn

    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreBlocks, ScoreTable

__all__ = ["MlpRouterPolicy"]

Feature = Literal["hidden", "topk", "embedding"]


@register_policy("mlp-router")
class MlpRouterPolicy(SelectPolicy):
    """The base model writes unless a network says, with more than a threshold, that it should not.

    Attributes:
        network: what was learned; nothing yet if not given.
        features: what the network sees of the base model: its last ``hidden`` state, its ``topk``
            log-probabilities, the input ``embedding`` of its most likely token.
        top_k: how many log-probabilities ``topk`` is.
        ways: ``each`` has a probability for each assistant, that it is right where the base model
            is not, and the likeliest writes; ``binary`` has one for handing over, and the surest
            assistant writes; ``models``, of checkpoints of 0.1, has a distribution over the models,
            and the likeliest assistant writes. :meth:`fit` learns ``each`` in its place.
        threshold: on the probability of handing over, below 0 (always) to 1 (never); :meth:`fit`
            finds the one of the most right tokens.
        cost_weight: lambda, nats per unit of an assistant's cost
            (:attr:`multicolm.Views.costs`), which is taken off the log-odds of handing over to it.
            Under ``binary`` all assistants that are run to find the surest count.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        CITER, arXiv 2502.01976 (``features: [hidden]``, ``network: mlp``), and R2R, arXiv
        2505.21600 (all three features, a residual network). Theirs are for one assistant and
        learn from roll-outs besides; ours from who would have written the right token. R2R's
        threshold is the option ``recall=0.95``.
    """

    network: Weights | None = None
    features: tuple[Feature, ...] = Field(default=("hidden",), min_length=1)
    top_k: int = Field(default=100, ge=1)
    ways: Literal["each", "models", "binary"] = "each"
    threshold: float = Field(default=0.5, ge=-1, le=1)
    cost_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    made_for: dict[str, str] | None = None

    streams: ClassVar[bool] = True
    """``fit`` takes a table that is on disk, and reads it block by block."""

    assistants: ClassVar[When] = "deferred"
    certain: ClassVar[bool] = True
    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": PROBABILITIES}
    deferral: ClassVar[Deferral | None] = Deferral("threshold", above=True, never=1.0, always=-1.0)

    def needs(self, models: ModelNames) -> Needs:
        """The features; of the assistants how sure they are, where there is a choice to make.

        Raises:
            CapabilityError: if it is not trained, or for another number of models.
        """
        n_outputs = self._shape[1]
        if len(models) == 1:
            raise CapabilityError(
                f"policy '{self.name}' hands over to assistants, and this ensemble has one model "
                f"({models[0]}); add assistants, or use the policy single."
            )
        if self.ways == "binary" and n_outputs != 1:
            raise CapabilityError(
                f"this '{self.name}' network has probabilities for {n_outputs + 1} models, and "
                "`ways: binary` wants one for handing over; set ways to each, or to models if it "
                "was trained so."
            )
        n_models = len(self.made_for or models) if self.ways == "binary" else n_outputs + 1
        check_count(self.name, n_models, models)
        signals: frozenset[Signal] = frozenset(self.features)
        top1: frozenset[Signal] = frozenset({"top1"})
        choice = self.ways == "binary" and len(models) > 2
        return Needs({0: signals}, dict.fromkeys(range(1, len(models)), top1) if choice else {})

    @property
    def table_features(self) -> dict[str, int]:
        """Its features."""
        return {name: self.top_k if name == "topk" else 0 for name in self.features}

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse models that it was not trained with.

        Raises:
            CapabilityError: naming both.
        """
        check_made_for(self.name, self.made_for, models)
        if self.features == ("hidden",):
            check_width(self.name, self._shape[0], models[0])

    @cached_property
    def _net(self) -> nn.Sequential:
        return network_of(self.name, self.network, "the network")

    @property
    def _shape(self) -> tuple[int, int]:
        from multicolm.learning.networks import shape_of

        return shape_of(self._net)

    def _scores(self, views: Views) -> Float[Tensor, "positions ways"]:
        """Of the network, in nats; the base model's are 0."""
        from multicolm.learning.networks import joined, router_scores

        seen = joined([self._feature(name, views.base) for name in self.features])
        if seen.shape[1] != self._shape[0]:
            raise CapabilityError(
                f"this '{self.name}' network was made for {self._shape[0]} features, and "
                f"{' and '.join(self.features)} of model '{views.base.name}' have {seen.shape[1]}; "
                "use the features, top_k and base model that it was trained with."
            )
        return router_scores(on_device_of(seen, self._net), seen)

    def _decision(self, views: Views) -> tuple[Tensor, Tensor]:
        """The probability of handing over, less where assistants cost, and to whom."""
        import torch

        from multicolm.learning.decision import hand_over

        scores = self._scores(views)
        if self.ways == "models":
            return hand_over(scores.log_softmax(-1), views.costs, self.cost_weight)
        prices = self.cost_weight * views.costs[1:].to(scores)
        # Of one output for several assistants: whoever is run to be compared is paid.
        prices = prices if scores.shape[1] == len(views.models) else prices.sum()[None]
        best, which = (scores[:, 1:] - prices).max(-1)
        return torch.sigmoid(best), which + 1

    def _feature(self, name: Feature, view: View) -> Float[Tensor, "positions width"]:
        if name == "hidden":
            return view.hidden
        return view.top1_embeddings if name == "embedding" else view.topk_logprobs(self.top_k)

    def model_probs(self, views: Views) -> Float[Tensor, "positions models"] | None:
        """The network's, where it is a distribution over the models."""
        scores = self._scores(views)
        is_one = self.ways == "models" or len(views.models) == 2
        return scores.softmax(-1) if is_one else None

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """The probability of handing over, less where assistants cost."""
        return self._decision(views)[0]

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where that exceeds the threshold."""
        return self.score(views) > self.threshold

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The likeliest assistant, or the surest one."""
        import torch

        score, writers = self._decision(views)
        if self.ways == "binary" and len(views.models) > 2:
            sureness = torch.stack([views[k].top1_logprobs for k in views.assistants])
            writers = best_assistant(views, sureness)
        return writers * (score > self.threshold)

    def fit(self, table: ScoreBlocks, training: Training | None = None) -> MlpRouterPolicy:
        """The same policy with a network that was trained on a score table with its features.

        Args:
            table: of the ensemble's models.
            training: options (:class:`multicolm.learning.classifier.ClassifierSettings`),
                progress, and what is reported back.

        Raises:
            ArtefactError: if the table lacks a feature.
            TrainingError: if there is nothing to learn from, or training diverges.
        """
        from multicolm.learning.classifier import fit_classifier
        from multicolm.learning.networks import joined
        from multicolm.learning.training import Training

        def features(part: ScoreTable) -> Tensor:
            return joined([self._scored(name, part) for name in self.features])

        ways: Literal["each", "binary"] = "binary" if self.ways == "binary" else "each"
        tensors, threshold = fit_classifier(table, features, ways, training or Training())
        return replace(
            self,
            ways=ways,
            network=Weights(tensors),
            threshold=self.threshold if threshold is None else threshold,
            made_for=dict(zip(table.models, table.identities, strict=True)),
        )

    def _scored(self, name: Feature, table: ScoreTable) -> Float[Tensor, "positions width"]:
        values = table.feature(name)
        if name != "topk":
            return values
        if values.shape[1] < self.top_k:
            raise ArtefactError(
                f"this score table holds {values.shape[1]} log-probabilities of the base model, "
                f"and the policy wants {self.top_k}; set top_k, or score with --topk {self.top_k}."
            )
        return values[:, : self.top_k]
