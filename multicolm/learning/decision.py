"""Who writes, by a router's pi: the same function for decoding and for what a training reports."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["hand_over"]


def hand_over(
    log_pi: Float[Tensor, "positions models"],
    costs: Float[Tensor, "models"],
    cost_weight: float = 0.0,
) -> tuple[Float[Tensor, "positions"], Int[Tensor, "positions"]]:
    """How likely it is that an assistant should write, and which one would.

    The decision is the base model against all assistants together first, then the likeliest
    assistant, so that assistants that can do the same do not share the vote. An assistant writes
    where the score exceeds a threshold eta. With a price on cost, lambda nats per unit,

        assistant = argmax_k (log pi_k - lambda c_k)
        score     = sigmoid( log (1 - pi_0) / pi_0
                             + max_k (log pi_k - lambda c_k) - max_k log pi_k )

    that is: the cost of the assistant that would write counts against it, and so does what is lost
    by taking a cheaper one than the likeliest. At every position the greater lambda, the less the
    chosen writer costs: one router gives a whole frontier.

    Args:
        log_pi: of the router, in nats, the base model first.
        costs: per model; the base model's is not read, as it is run anyway.
        cost_weight: lambda, nats per unit of cost.

    Returns:
        The score, 1 - pi_0 without a price on cost; and the index of the assistant, 1 or more.

    Source:
        Co-LLM, arXiv 2403.03870, section 3.3: 1 - pi_0 > eta, for one assistant and no cost.
    """
    if not cost_weight:
        return -log_pi[:, 0].expm1(), log_pi[:, 1:].argmax(-1) + 1
    assistants = log_pi[:, 1:]
    best, which = (assistants - cost_weight * costs[1:].to(log_pi)).max(-1)
    odds = assistants.logsumexp(-1) - log_pi[:, 0]
    return torch.sigmoid(odds + best - assistants.amax(-1)), which + 1
