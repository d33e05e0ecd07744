"""Steering by a classifier of what the text becomes: FUDGE's product, with GeDi's classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field

from multicolm.policy.base import MixPolicy, Needs, register_policy
from multicolm.policy.logit_arithmetic import MOST_STRENGTH
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["GediPolicy"]

_NEVER = float("-inf")
_LEAST = -1e4  # log-odds of a text that only the other model can write; finite, so that a text that
# has gone wrong already can still be written on


@register_policy("gedi")
class GediPolicy(MixPolicy):
    """The base model writes, steered to where a classifier would find an attribute in the text.

    ``p(x) ~ p_base(x) P(a | text + x)^alpha``: every next token is weighed by how likely the text
    with it has the attribute. The classifier is made of two models, one that writes texts with the
    attribute and one that writes texts without, by Bayes' rule with equal priors:

        P(a | text) = s(log p_attribute(text) - log p_opposite(text)),   s the logistic function

    with the probability of the whole text so far, its prompt given. So one pass of each of the
    three models gives the classifier's answer for every possible next token, exactly. A classifier
    of another kind has to read the text once with each candidate, which no policy can ask for.

    A token that neither of the two models can write says nothing; one that only the opposite can
    write practically never comes.

    Attributes:
        alpha: strength; 0 is the base model alone, 1 is Bayes' rule.
        attribute: the model of texts with the attribute.
        opposite: the model of texts without it. It may be the same weights under another prompt
            (`chat_template`).
        normalise: whether the log-odds are divided by the number of tokens, as in GeDi, so that a
            long text is not beyond doubt; then a greater alpha (GeDi takes 30) is of use.

    Source:
        FUDGE, arXiv 2104.05218 (NAACL 2021), section 3, the product; GeDi, arXiv 2009.06367
        (EMNLP Findings 2021), section 3, the classifier. FUDGE weighs its 200 likeliest tokens
        only, GeDi cuts tokens off after weighing; neither is needed here.
    """

    alpha: Annotated[float, Field(ge=0, le=MOST_STRENGTH, allow_inf_nan=False)] = 1.0
    attribute: Role = 1
    opposite: Role = 2
    normalise: bool = False

    tunable: ClassVar[dict[str, Sequence[float]]] = {"alpha": (0.25, 0.5, 1.0, 2.0, 4.0, 10.0)}
    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}
    likelihoods: ClassVar[bool] = True

    def needs(self, models: ModelNames) -> Needs:
        """All log-probabilities of the three models."""
        return Needs({k: frozenset(self.base_signals) for k in self.uses(models)}, {})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model and the two that make the classifier."""
        return frozenset({0, models.role(self.attribute), models.role(self.opposite)})

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability that the text so far has the attribute."""
        return self._log_odds(views, 0.0, views.place)[:, 0].sigmoid()

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The base model's log-probability, and alpha times that of the attribute."""
        import torch

        plus, minus = views[self.attribute].logprobs, views[self.opposite].logprobs
        neither = (plus == _NEVER) & (minus == _NEVER)
        step = torch.where(neither, 0.0, plus - minus)
        log_odds = self._log_odds(views, step, views.place + 1)
        return views.base.logprobs + self.alpha * torch.nn.functional.logsigmoid(log_odds)

    def _log_odds(
        self, views: Views, step: Tensor | float, n_tokens: Tensor
    ) -> Float[Tensor, "positions n"]:
        """Of the attribute, in nats, after a text of some tokens whose last one is a ``step``."""
        roles = [views.models.role(role) for role in (self.attribute, self.opposite)]
        plus, minus = views.text_nll[:, roles].unbind(-1)
        # A text that both rule out says nothing.
        text = (minus - plus).nan_to_num(nan=0.0).clamp(_LEAST, -_LEAST)
        odds = (text[:, None] + step).clamp(_LEAST, -_LEAST)
        return odds / n_tokens.clamp_min(1)[:, None] if self.normalise else odds
