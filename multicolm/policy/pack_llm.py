"""PackLLM: models weighed by how well they know the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from pydantic import PositiveFloat

from multicolm.policy.base import MixPolicy, Support, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import Views

__all__ = ["PackLlmPolicy"]

_NEVER = float("-inf")


@register_policy("pack-llm")
class PackLlmPolicy(MixPolicy):
    """The models' logits are added up, weighed by how likely each one finds the prompt.

    Weights are the softmax of minus the prompt's nats per token, over ``tau``; they stay as they
    are for the whole text. Across vocabularies the tokens are those of the model with the
    greatest weight, and another model's logit for one that it does not have is that of the first
    token with which it spells the same text. Nats are counted per token of the base model, so
    that they can be compared.

    Attributes:
        tau: small means that the best model writes alone, great that all weigh the same.

    Source:
        PackLLM-sim, arXiv 2404.11531, section 3. Its PackLLM-opt, a grid search of the weights on
        the prompt, is not here; nor is its alignment of vocabularies by edit distance, since the
        first token is what the model would really write.
    """

    tau: PositiveFloat = 1.0

    base_signals: ClassVar[set[Signal]] = {"logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"logprobs"}
    support: ClassVar[Support] = "union"
    prompts: ClassVar[bool] = True
    tunable: ClassVar[dict[str, Sequence[float]]] = {"tau": (0.1, 0.3, 1.0, 3.0)}

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Weighted sum of log-probabilities; -inf for tokens that the best model does not have."""
        import torch

        logprobs = views.stack(lambda view: view.logprobs)
        known = -views.prompt_mean_nll[:, list(views)] / self.tau
        # A prompt that all of them rule out says nothing about them: all weigh the same.
        known = known.clamp_min(torch.finfo(known.dtype).min)
        weights = known.softmax(-1).to(logprobs.device)
        best = weights.argmax(-1)
        own = logprobs[best, torch.arange(len(best), device=best.device)]
        # Weights of next to nothing would turn 0 * -inf into NaN.
        weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
        fused = torch.zeros_like(own)
        for line, k in enumerate(views):
            first = views.first_tokens(k)
            shown = logprobs[line]
            spelled = shown if first is None else shown[:, first.to(shown.device)]
            fused = fused + weights[:, line, None] * spelled
        fused = fused.masked_fill(own == _NEVER, _NEVER)
        # Where the models rule out each other's tokens altogether, the best one is left.
        nothing = (fused == _NEVER).all(-1, keepdim=True)
        return torch.where(nothing, own, fused)
