"""CPR: a learned router with momentum, and a blend between the base model and an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.errors import ConfigError
from multicolm.policy.base import MixPolicy, ModelFacts, Needs, NewTokens, register_policy
from multicolm.policy.learned import (
    check_count,
    check_made_for,
    check_width,
    network_of,
    on_device_of,
)
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

if TYPE_CHECKING:
    from torch import nn

    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreBlocks

__all__ = ["CprPolicy"]


@register_policy("cpr")
class CprPolicy(MixPolicy):
    """The base model, an expert, or a blend of the two, by a router's smoothed probability.

    A network on the base model's hidden state gives p_t, the probability that an assistant is right
    where the base model is not, which is smoothed over the text: ``m_t = momentum m_(t-1) + (1 -
    momentum) p_t`` with ``m_0 = 0``. Lambda is m_t of the likeliest assistant, which is the expert:

        lambda < low              the base model writes, and no other model is run
        low <= lambda <= high     ``(1 - lambda) p_base + lambda p_expert``
        lambda > high             the expert writes

    Attributes:
        network: what was learned; nothing yet if not given.
        momentum: how much of the past is kept; 0 is none.
        low: probability; at 1 the base model writes alone.
        high: probability, at least ``low``; equal to it, nothing is blended.
        cost_weight: nats per unit of an assistant's cost (:attr:`multicolm.Views.costs`), taken off
            the log-odds of its p_t.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Raises:
        ConfigError: if ``low`` is greater than ``high``.

    Source:
        CPR, arXiv 2608.30158, section 3.3, with its settings; more than one assistant, and costs,
        are ours. The network is that of `mlp-router`, with the labels of section 3.2; the paper's
        also sees the mean hidden state of the question, and balances classes by the root of their
        ratio.
    """

    network: Weights | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    low: Annotated[float, Field(ge=0, le=1)] = 0.35
    high: Annotated[float, Field(ge=0, le=1)] = 0.65
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    made_for: dict[str, str] | None = None

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "low": (0.1, 0.2, 0.35, 0.5),
        "high": (0.5, 0.65, 0.8, 0.9),
        "momentum": (0.0, 0.25, 0.5, 0.75),
    }
    base_signals: ClassVar[set[Signal]] = {"hidden", "logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}
    streams: ClassVar[bool] = True
    """``fit`` takes a table that is on disk, and reads it block by block."""

    def __post_init__(self) -> None:
        """The blend lies between the two thresholds."""
        if self.low > self.high:
            raise ConfigError(f"cpr: low: must be at most high ({self.high:g}), got {self.low:g}.")

    def needs(self, models: ModelNames) -> Needs:
        """The base model always, the expert where it may write.

        Raises:
            CapabilityError: if it is not trained, or for another number of models.
        """
        check_count(self.name, self._shape[1] + 1, models)
        signals = frozenset(self.assistant_signals)
        experts = dict.fromkeys(range(1, len(models)), signals)
        return Needs({0: frozenset(self.base_signals)}, experts)

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse models that it was not trained with.

        Raises:
            CapabilityError: naming both.
        """
        check_made_for(self.name, self.made_for, models)
        check_width(self.name, self._shape[0], models[0])

    @property
    def table_features(self) -> dict[str, int]:
        """Hidden states."""
        return MlpRouterPolicy().table_features

    def initial_state(self, views: Views) -> Float[Tensor, "positions assistants"]:
        """The smoothed probabilities before the first token: none."""
        import torch

        return torch.zeros(views.n_positions, len(views.models) - 1)

    def update(self, views: Views, written: NewTokens) -> Float[Tensor, "positions assistants"]:
        """The smoothed probabilities at the token."""
        return self._smoothed(views)

    @cached_property
    def _net(self) -> nn.Sequential:
        return network_of(self.name, self.network, "the network")

    @property
    def _shape(self) -> tuple[int, int]:
        from multicolm.learning.networks import shape_of

        return shape_of(self._net)

    def _smoothed(self, views: Views) -> Float[Tensor, "positions assistants"]:
        from multicolm.learning.networks import router_scores

        hidden = views.base.hidden.float()
        log_odds = router_scores(on_device_of(hidden, self._net), hidden)[:, 1:]
        probs = (log_odds - self.cost_weight * views.costs[1:].to(log_odds)).sigmoid()
        return self.momentum * views.state.to(probs) + (1 - self.momentum) * probs

    def _dispatch(self, views: Views) -> tuple[Tensor, Tensor]:
        """Lambda, and the index of the expert, per position."""
        share, which = self._smoothed(views).max(-1)
        return share, which + 1

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """The smoothed probability of handing over."""
        return self._dispatch(views)[0]

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The expert, where it is blended in or writes."""
        import torch

        share, expert = self._dispatch(views)
        named = torch.nn.functional.one_hot(expert, len(views.models)).bool()
        return named & (share >= self.low)[:, None]

    def writers(self, views: Views) -> Int[Tensor, "positions"]:
        """The base model, the mixture, or the expert."""
        share, expert = self._dispatch(views)
        writers = expert.masked_fill(share <= self.high, len(views.models))
        return writers.masked_fill(share < self.low, 0)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The distribution of whoever writes."""
        import torch

        share, expert = self._dispatch(views)
        mixed = base = views.base.logprobs
        for k in views.assistants:
            own = views[k].logprobs
            weight = share[:, None].clamp(0, 1)
            blend = torch.logaddexp(base + torch.log1p(-weight), own + weight.log())
            handed = torch.where((share > self.high)[:, None], own, blend)
            mixed = torch.where(((expert == k) & (share >= self.low))[:, None], handed, mixed)
        return mixed

    def fit(self, table: ScoreBlocks, training: Training | None = None) -> CprPolicy:
        """The same policy with a network that was trained on a score table with hidden states.

        Args:
            table: of the ensemble's models.
            training: options (:class:`multicolm.learning.classifier.ClassifierSettings`),
                progress, and what is reported back.

        Raises:
            ArtefactError: if the table lacks hidden states.
            TrainingError: if there is nothing to learn from, or training diverges.
        """
        learned = MlpRouterPolicy().fit(table, training)
        return replace(self, network=learned.network, made_for=learned.made_for)
