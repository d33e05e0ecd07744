"""SAFE: mix models only where their tokens meet and they do not agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.policy.base import Support, register_policy
from multicolm.policy.mixture import AveragePolicy
from multicolm.types import Tensor
from multicolm.views import ModelNames, Views

__all__ = ["SafePolicy"]

_SMOOTH = 0.5  # a mixture whose likeliest token has less is sharpened


@register_policy("safe")
class SafePolicy(AveragePolicy):
    """The base model writes, and all are mixed only where that is safe and worth it.

    Safe: every other model could continue there, since no token of its own lies across the place.
    Worth it: another model would write another token, and the mean of all models' probabilities of
    the base model's token, by their weights, is below ``threshold``. With 0.5, no other place
    would get another token by mixing. Elsewhere the base model is named as the writer, so the
    share of mixed tokens can be read off a trace.

    A mixture without a token of 0.5 or more is sharpened: the probability of all tokens that begin
    with a token of the base model goes to that one, if it has more than ``sharpen``. With the
    geometric mean, the paper's other way to sharpen, this is left out.

    Attributes:
        threshold: probability; 0 is the base model alone.
        sharpen: probability (the paper's lambda); 1 never sharpens.

    Source:
        SAFE, arXiv 2510.15346 (ICLR 2026), sections 3.2 and 3.3, with the published 0.5 and 0.1.
        There all models weigh the same, decoding is greedy, and the best model is the base model.
        Where two tokens that attract probability begin alike, here the shorter one gets all of it,
        so that a distribution is left to sample from; the likeliest token is the same. A token of
        white space alone attracts nothing here: words that begin with a space have nothing else
        in common.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    sharpen: Annotated[float, Field(gt=0, le=1)] = 0.1

    support: ClassVar[Support] = "union"
    reads_boundaries: ClassVar[bool] = True
    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": (0.1, 0.3, 0.5, 0.7, 0.9)}

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model, and every model that weighs something."""
        return super().uses(models) | {0}

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Mean probability of the base model's likeliest token, by the weights."""
        weights = views.models.weights(self.weights)
        token = views.base.top1_ids
        probs = [weights[k] * views[k].logprob_of(token).exp() for k in views]
        return sum(probs[1:], probs[0])

    def writers(self, views: Views) -> Int[Tensor, "positions"]:
        """The mixture where that is safe and worth it, else the base model."""
        return self._is_mixed(views).long() * len(views.models)

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """The mixture where that is safe and worth it, else what the base model says."""
        import torch

        is_mixed = self._is_mixed(views)
        if not bool(is_mixed.any()):
            return views.base.logprobs
        mixed = super().mix(views)
        smooth = is_mixed & (mixed.max(-1).values.exp() < _SMOOTH)
        if self.mean != "geometric" and bool(smooth.any()):
            rows = smooth.nonzero()[:, 0]
            mixed = mixed.index_copy(0, rows, self._sharpened(views, mixed[rows], rows))
        return torch.where(is_mixed[:, None], mixed, views.base.logprobs)

    def _is_mixed(self, views: Views) -> Bool[Tensor, "positions"]:
        import torch

        token = views.base.top1_ids
        is_mixed = torch.zeros_like(token, dtype=torch.bool)
        for k in views.assistants:
            is_mixed |= views[k].top1_ids != token
        is_mixed &= self.score(views) < self.threshold
        for k in views.assistants:
            is_mixed &= views.is_open(k).to(token.device)
        return is_mixed

    def _sharpened(
        self, views: Views, mixed: Float[Tensor, "rows vocab"], rows: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows vocab"]:
        """The mixture at some positions, its probability gathered in few tokens."""
        import torch

        probs = mixed.exp()
        # No more tokens than that can have so much.
        top, ids = probs.topk(int(min(1 / self.sharpen, probs.shape[-1])))
        attracts = top > self.sharpen
        attracts &= views.base.logprobs[rows[:, None], ids] > float("-inf")
        n = int(attracts.long().cumsum(-1).argmax(-1).max()) + 1  # after these none attracts
        ids, attracts = ids[:, :n], attracts[:, :n]
        extends = [views.extends(ids[:, i]) for i in range(n)]
        within = torch.stack([longer.gather(-1, ids) for longer in extends], dim=1)
        # Of two that spell the same, the likelier one counts as the shorter.
        shorter = within & ~(within.mT & torch.ones(n, n, dtype=torch.bool).tril().to(ids.device))
        attracts &= ~(shorter & attracts[:, :, None]).any(1)
        sharp = probs
        for i, longer in enumerate(extends):
            gathered = longer & attracts[:, i, None]
            total = (probs * gathered).sum(-1, keepdim=True)
            moved = sharp.masked_fill(gathered, 0.0).scatter(-1, ids[:, i, None], total)
            sharp = torch.where(attracts[:, i, None], moved, sharp)
        return sharp.log()
