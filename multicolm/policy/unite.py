"""UniTE: the few likeliest tokens of every model, weighed by all of them."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field

from multicolm.policy.base import Support, register_policy
from multicolm.policy.mixture import WeightedPolicy
from multicolm.types import Tensor
from multicolm.views import Views

__all__ = ["UnitePolicy"]

_NEVER = float("-inf")


@register_policy("unite")
class UnitePolicy(WeightedPolicy):
    """Every model weighs the union of all models' likeliest tokens, and the average writes.

    A model's probabilities are renormalised over the union. A token that it does not have counts as
    the first one with which it spells the same text; one whose probability is 0 stays at 0.

    Attributes:
        top_k: how many tokens of each model make up the union.
        weights: one per model, as a list or by name; equal if not given. A model of weight 0 is
            never run.

    Source:
        UniTE, "Determine-then-Ensemble", arXiv 2410.03777 (ICLR 2025), section 4; k = 10 there.
        Its code gives a logit of 0 to a token whose first part is in the union already; here it
        has that part's own.
    """

    top_k: int = Field(default=10, ge=1)
    weights: list[float] | dict[str, float] | None = None

    support: ClassVar[Support] = "union"

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Logarithm of the average over the union; -inf outside of it."""
        import torch

        weights = views.models.weights(self.weights)
        logprobs = views.stack(lambda view: view.logprobs)
        top = logprobs.topk(min(self.top_k, logprobs.shape[-1]), dim=-1)
        # Fewer than k tokens may have any probability at all.
        likely = top.values > _NEVER
        union = torch.zeros(logprobs.shape[1:], dtype=torch.bool, device=logprobs.device)
        for ids, real in zip(top.indices, likely, strict=True):
            union |= torch.zeros_like(union).scatter(-1, ids, real)
        shown = []
        for k, own in zip(views, logprobs, strict=True):
            first = views.first_tokens(k)
            weighed = own if first is None else own[:, first.to(own.device)]
            weighed = weighed.masked_fill(~union, _NEVER)
            # A model that finds the whole union impossible has nothing to say here.
            share = weighed.log_softmax(-1).nan_to_num(nan=_NEVER, neginf=_NEVER)
            shown.append(share + torch.tensor(weights[k], device=own.device).log())
        return torch.stack(shown).logsumexp(0)
