"""Co-LLM: a softmax head on the base model's hidden state says who writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.errors import ConfigError
from multicolm.policy.base import (
    Deferral,
    MixPolicy,
    ModelFacts,
    Needs,
    SelectPolicy,
    register_policy,
)
from multicolm.policy.learned import (
    check_count,
    check_made_for,
    check_width,
    network_of,
    on_device_of,
)
from multicolm.policy.threshold import PROBABILITIES
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

if TYPE_CHECKING:
    from torch import nn

    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreBlocks

__all__ = ["CoLlmPolicy"]


@register_policy("co-llm")
class CoLlmPolicy(SelectPolicy, MixPolicy):
    """A learned distribution pi over the models says who writes.

    pi is the softmax of a head on the base model's last hidden state, the base model's own score
    fixed at zero; it was trained so that sum_k pi_k p_k gives the right tokens a high likelihood.

    Attributes:
        head: what was learned; nothing yet if not given.
        decode: ``threshold`` decides between the base model and all assistants together: where
            1 - pi_0 is greater than the threshold, the likeliest assistant writes. ``argmax`` lets
            the likeliest model write, so that assistants that can do the same share the vote, and
            the base model beats three of them that are twice as likely together; it was the
            default up to 0.1. ``sample`` draws the writer from pi. ``mixture`` draws tokens from
            sum_k pi_k p_k, the joint model itself, and runs every model at every token.
        threshold: of ``threshold``: probability, below 0 (assistants alone) to 1 (the base alone).
        cost_weight: nats that one unit of cost counts against an assistant, for ``threshold`` and
            ``argmax``; costs are those of the ensemble file. The greater it is, the less the
            chosen writers cost: one head gives a whole frontier. See
            :func:`multicolm.learning.decision.hand_over`.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        Co-LLM, arXiv 2403.03870 (ACL 2024), sections 3.1 to 3.3, for any number of assistants; for
        one assistant, ``threshold`` is the published rule.
    """

    head: Weights | None = None
    decode: Literal["argmax", "threshold", "sample", "mixture"] = "threshold"
    threshold: float = Field(default=0.5, ge=-1, le=1)
    cost_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    made_for: dict[str, str] | None = None

    streams: ClassVar[bool] = True
    """``fit`` takes a table that is on disk, and reads it block by block."""

    base_signals: ClassVar[set[Signal]] = {"hidden"}

    def __post_init__(self) -> None:
        """What it needs depends on how it decodes.

        Raises:
            ConfigError: if a cost is to count where nothing is decided by pi.
        """
        if self.cost_weight and self.decode in ("sample", "mixture"):
            raise ConfigError(
                "co-llm: cost_weight: it counts where pi decides, with decode threshold or argmax, "
                f"and decode is {self.decode}; leave it at 0."
            )
        mixes = self.decode == "mixture"
        handing = Deferral("threshold", above=True, never=1.0, always=-1.0)
        settings = {
            "acts": "mix" if mixes else "select",
            "assistants": "always" if mixes else "deferred",
            "certain": not mixes,
            "schedule": "block" if mixes else "stepwise",
            "tunable": {"threshold": PROBABILITIES} if self.decode == "threshold" else {},
            "deferral": handing if self.decode == "threshold" else None,
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def params_at(self, threshold: float) -> dict[str, Any]:
        """However it decodes otherwise, a threshold is the published rule."""
        return {"decode": "threshold", "threshold": threshold}

    def needs(self, models: ModelNames) -> Needs:
        """The base model's hidden state; for ``mixture`` every model's log-probabilities.

        Raises:
            CapabilityError: if it is not trained, or for another number of models.
        """
        n_models = self._shape[1] + 1
        check_count(self.name, n_models, models)
        if self.decode != "mixture":
            return Needs({0: frozenset({"hidden"})}, {})
        signals: frozenset[Signal] = frozenset({"logprobs"})
        return Needs({k: signals | ({"hidden"} if k == 0 else set()) for k in range(n_models)}, {})

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

    def _log_pi(self, views: Views) -> Float[Tensor, "positions models"]:
        from multicolm.learning.networks import router_scores

        hidden = views.base.hidden.float()
        return router_scores(on_device_of(hidden, self._network), hidden).log_softmax(-1)

    def model_probs(self, views: Views) -> Float[Tensor, "positions models"]:
        """The head's pi."""
        return self._log_pi(views).exp()

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """1 - pi_0: how likely it is that an assistant writes; less where assistants cost."""
        from multicolm.learning.decision import hand_over

        return hand_over(self._log_pi(views), views.costs, self.cost_weight)[0]

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where an assistant writes, by the way of decoding."""
        return self.select(views) > 0

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The base model or the likeliest assistant, the likeliest model, or one drawn from pi."""
        log_pi = self._log_pi(views)
        if self.decode == "sample":
            below = log_pi.exp().cumsum(-1)[:, :-1] <= views.uniform.to(log_pi.device)[:, None]
            return below.sum(-1)
        return self._writers(log_pi, views.costs)

    def _writers(
        self, log_pi: Float[Tensor, "positions models"], costs: Float[Tensor, "models"]
    ) -> Int[Tensor, "positions"]:
        """Who writes, where nothing is drawn: by the threshold, or the likeliest model."""
        from multicolm.learning.decision import hand_over

        if self.decode == "threshold":
            score, assistant = hand_over(log_pi, costs, self.cost_weight)
            return assistant * (score > self.threshold)
        paid = costs.to(log_pi).clone()
        paid[0] = 0  # it is run anyway
        return (log_pi - self.cost_weight * paid).argmax(-1)

    def writing(
        self, log_pi: Float[Tensor, "positions models"], costs: Float[Tensor, "models"]
    ) -> Float[Tensor, "positions models"]:
        """The probability that each model writes, for the report of a training.

        For ``mixture``, whose tokens are nobody's alone, the weight of each model.

        Args:
            log_pi: of the head, in nats.
            costs: per model.
        """
        import torch

        if self.decode in ("sample", "mixture"):
            return log_pi.exp()
        chosen = self._writers(log_pi, costs)
        return torch.nn.functional.one_hot(chosen, log_pi.shape[1]).to(log_pi)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The joint model: log sum_k pi_k p_k, in nats."""
        log_pi = self._log_pi(views)
        logprobs = views.stack(lambda view: view.logprobs)
        return (logprobs + log_pi.T[:, :, None]).logsumexp(0)

    def fit(self, table: ScoreBlocks, training: Training | None = None) -> CoLlmPolicy:
        """The same policy with a head that was trained on a score table with hidden states.

        Args:
            table: of the ensemble's models, made with ``--hidden``; in memory or on disk.
            training: options (:class:`multicolm.learning.router.RouterSettings`), progress, and
                what is reported back.

        Raises:
            ArtefactError: if the table holds no hidden states.
            TrainingError: if there is nothing to learn from, or training diverges.
        """
        from multicolm.learning.router import fit_marginal
        from multicolm.learning.training import Training

        tensors = fit_marginal(
            table, lambda part: part.feature("hidden"), training or Training(), self.writing
        )
        made_for = dict(zip(table.models, table.identities, strict=True))
        return replace(self, head=Weights(tensors), made_for=made_for)
