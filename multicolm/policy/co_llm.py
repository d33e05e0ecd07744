"""Co-LLM: a softmax head on the base model's hidden state says who writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.artefacts import Weights
from multicolm.errors import CapabilityError
from multicolm.policy.base import (
    Deferral,
    MixPolicy,
    ModelFacts,
    Needs,
    SelectPolicy,
    register_policy,
)
from multicolm.policy.learned import check_made_for, untrained
from multicolm.policy.threshold import PROBABILITIES
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

if TYPE_CHECKING:
    from torch import nn

    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreTable

__all__ = ["CoLlmPolicy"]


@register_policy("co-llm")
class CoLlmPolicy(SelectPolicy, MixPolicy):
    """A learned distribution pi over the models says who writes.

    pi is the softmax of a head on the base model's last hidden state, the base model's own score
    fixed at zero; it was trained so that sum_k pi_k p_k gives the right tokens a high likelihood.

    Attributes:
        head: what was learned; nothing yet if not given.
        decode: ``argmax`` lets the likeliest model write. ``threshold`` hands over where 1 - pi_0
            is greater than the threshold, to the likeliest assistant. ``sample`` draws the writer
            from pi. ``mixture`` draws tokens from sum_k pi_k p_k, the joint model itself, and runs
            every model at every token.
        threshold: of ``threshold``: probability, below 0 (assistants alone) to 1 (the base alone).
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        Co-LLM, arXiv 2403.03870 (ACL 2024), sections 3.1 to 3.3, for any number of assistants; for
        one assistant, ``threshold`` is the published rule.
    """

    head: Weights | None = None
    decode: Literal["argmax", "threshold", "sample", "mixture"] = "argmax"
    threshold: float = Field(default=0.5, ge=-1, le=1)
    made_for: dict[str, str] | None = None

    base_signals: ClassVar[set[Signal]] = {"hidden"}

    def __post_init__(self) -> None:
        """What it needs hangs on how it decodes."""
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
        if self.head is None:
            raise untrained(self.name)
        n_models = self._shape[1] + 1
        if n_models != len(models):
            raise CapabilityError(
                f"this '{self.name}' policy was made for {n_models} models, and this ensemble has "
                f"{len(models)} ({', '.join(models)}); train one for these."
            )
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
        width, hidden_size = self._shape[0], models[0].hidden_size
        if hidden_size is not None and width != hidden_size:
            raise CapabilityError(
                f"this '{self.name}' head was made for hidden states of width {width}, and those "
                f"of base model '{models[0].name}' have {hidden_size}; train one for this model."
            )

    @cached_property
    def _network(self) -> nn.Sequential:
        from multicolm.learning.networks import from_tensors

        if self.head is None:
            raise untrained(self.name)
        return from_tensors(self.head.content, self.head.path or "the head")

    @property
    def _shape(self) -> tuple[int, int]:
        from multicolm.learning.networks import shape_of

        return shape_of(self._network)

    def _log_pi(self, views: Views) -> Float[Tensor, "positions models"]:
        from multicolm.learning.networks import router_scores

        hidden = views.base.hidden.float()
        network = self._network
        if hidden.device.type != "cpu":
            network = network.to(hidden.device)  # moves in place, so only the first time
        return router_scores(network, hidden).log_softmax(-1)

    def model_probs(self, views: Views) -> Float[Tensor, "positions models"]:
        """The head's pi."""
        return self._log_pi(views).exp()

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """1 - pi_0: how likely it is that an assistant writes."""
        return -self._log_pi(views)[:, 0].expm1()

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where an assistant writes, by the way of decoding."""
        return self._writers(views) > 0

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The likeliest model, the likeliest assistant, or one drawn from pi."""
        return self._writers(views)

    def _writers(self, views: Views) -> Int[Tensor, "positions"]:
        log_pi = self._log_pi(views)
        if self.decode == "threshold":
            handed = -log_pi[:, 0].expm1() > self.threshold
            return (log_pi[:, 1:].argmax(-1) + 1) * handed
        if self.decode == "sample":
            below = log_pi.exp().cumsum(-1)[:, :-1] <= views.uniform.to(log_pi.device)[:, None]
            return below.sum(-1)
        return log_pi.argmax(-1)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The joint model: log sum_k pi_k p_k, in nats."""
        log_pi = self._log_pi(views)
        logprobs = views.stack(lambda view: view.logprobs)
        return (logprobs + log_pi.T[:, :, None]).logsumexp(0)

    def fit(self, table: ScoreTable, training: Training | None = None) -> CoLlmPolicy:
        """The same policy with a head that was trained on a score table with hidden states.

        Args:
            table: of the ensemble's models, made with ``--hidden``.
            training: options (:class:`multicolm.learning.router.RouterSettings`), progress, and
                what is reported back.

        Raises:
            ArtefactError: if the table holds no hidden states.
            TrainingError: if there is nothing to learn from, or training diverges.
        """
        from multicolm.learning.router import fit_marginal
        from multicolm.learning.training import Training

        tensors = fit_marginal(table, lambda part: part.feature("hidden"), training or Training())
        made_for = dict(zip(table.models, table.identities, strict=True))
        return replace(self, head=Weights(tensors), made_for=made_for)
