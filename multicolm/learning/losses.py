"""What a router is trained to do: the marginal likelihood, and weak labels to begin with."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multicolm.score_table import ScoreTable

__all__ = [
    "class_weights",
    "cross_entropy",
    "marginal_loss",
    "responsibilities",
    "usable",
    "weak_labels",
]


def marginal_loss(
    scores: Float[Tensor, "positions models"],
    logprobs: Float[Tensor, "positions models"],
    known: Bool[Tensor, "positions models"],
) -> Float[Tensor, "positions"]:
    """Negative log-likelihood of each token under the joint model, in nats.

    With pi = softmax(scores) it is -log sum_k pi_k p_k(token). A model whose log-probability is
    unknown is left out, and the others' pi are renormalised. Its gradient by the scores is pi - r,
    with r of :func:`responsibilities`.

    Args:
        scores: of the router, the base model's first; one column may be fixed, for a softmax does
            not see a constant.
        logprobs: of the token under each model, in nats; -inf where it cannot write it.
        known: whether that is known; of every position at least one model must be, and must be
            able to write the token (see :func:`usable`).

    Source:
        Co-LLM, arXiv 2403.03870, section 3.1, for any number of models.
    """
    scores = scores.masked_fill(~known, float("-inf"))
    joint = scores + logprobs.masked_fill(~known, 0.0)
    return scores.logsumexp(-1) - joint.logsumexp(-1)


def responsibilities(
    scores: Float[Tensor, "positions models"],
    logprobs: Float[Tensor, "positions models"],
    known: Bool[Tensor, "positions models"],
) -> Float[Tensor, "positions models"]:
    """The posterior probability of each model as the writer of the next token of the text."""
    joint = (scores + logprobs.masked_fill(~known, 0.0)).masked_fill(~known, float("-inf"))
    return joint.softmax(-1)


def usable(table: ScoreTable) -> Bool[Tensor, "positions"]:
    """Positions that the base model and an assistant know, and that some model can write.

    Where the base model's context ends there is no hidden state; where it alone knows a token, or
    nobody can write it, no choice of a writer makes a difference.
    """
    known = table.known[:, 0] & (table.known.sum(-1) > 1)
    possible = (table.writer_logprobs > float("-inf")) & table.known
    return known & possible.any(-1)


def weak_labels(table: ScoreTable) -> Float[Tensor, "positions models"]:
    """Who should write, judged by who is right (:attr:`multicolm.score_table.ScoreTable.right`).

    The base model wherever it is right; else the assistants that are, in equal parts; the base
    model where nobody is.

    Source:
        Co-LLM, arXiv 2403.03870, section 3.2, labels of kind (a), for any number of models.
    """
    correct = table.right.float()
    assistants = correct.clone()
    assistants[:, 0] = 0
    handed = (correct[:, 0] == 0) & (assistants.sum(-1) > 0)
    labels = torch.zeros_like(correct)
    labels[:, 0] = 1
    return torch.where(handed[:, None], assistants / assistants.sum(-1, keepdim=True), labels)


def cross_entropy(
    scores: Float[Tensor, "positions models"],
    labels: Float[Tensor, "positions models"],
    weights: Float[Tensor, "models"],
) -> Float[Tensor, "positions"]:
    """Weighted cross-entropy of each position against soft labels, in nats."""
    return -(labels * weights * scores.log_softmax(-1)).sum(-1)


def class_weights(counts: Float[Tensor, "models"], cap: float) -> Float[Tensor, "models"]:
    """Weights that make rare classes count as much as common ones, at most ``cap`` times.

    The most common class weighs 1; a class that never comes weighs ``cap``, to no effect.

    Args:
        counts: sum of the labels of each class.
        cap: 1 or more.
    """
    return (counts.max() / counts.clamp_min(1e-9)).clamp(1.0, max(1.0, cap))
