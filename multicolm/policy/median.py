"""The geometric median of distributions: an average that few wrong models cannot move far."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["median_shares"]

_STEPS = 50
_ROUNDING = 1e-6


def median_shares(
    probs: Float[Tensor, "models positions vocab"], weights: Float[Tensor, "models"]
) -> Float[Tensor, "positions models"]:
    """The shares of the models in their geometric median; they sum to 1.

    The geometric median is the point with the least weighted sum of Euclidean distances to the
    given ones. It is an average of them, so that all it takes is the distances between them. A
    model's distribution is the median itself if the others do not pull it away (Kuhn 1973); with
    more than half of the weight it always is. Elsewhere the shares are found by Weiszfeld's
    iteration, a fixed number of steps, so that positions do not depend on each other.

    Source:
        Weiszfeld 1937; Kuhn, "A note on Fermat's problem" (1973); as a robust aggregate of models
        in RFA, arXiv 1912.13445.
    """
    points = probs.transpose(0, 1)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    squared = distances.double().cpu() ** 2
    weights = weights.double().cpu()
    at_model = _is_median(squared, weights) * weights
    found = at_model.sum(-1, keepdim=True)
    shares = torch.where(found > 0, at_model / found, weights / weights.sum())
    rows = (found[:, 0] == 0).nonzero()[:, 0]
    if len(rows):
        shares = shares.index_copy(0, rows, _weiszfeld(squared[rows], weights, shares[rows]))
    return shares.to(probs)


def _is_median(
    squared: Float[Tensor, "positions models models"], weights: Float[Tensor, "models"]
) -> Tensor:
    """Whether the pull of all others towards themselves is at most a model's own weight."""
    apart = squared > 0
    pull = torch.where(apart, weights / squared.clamp_min(1e-300).sqrt(), 0.0)
    # Of two differences to model k, to i and to j, the inner product is (d_ki + d_kj - d_ij) / 2.
    inner = (squared[:, :, :, None] + squared[:, :, None, :] - squared[:, None, :, :]) / 2
    force = (pull[:, :, :, None] * pull[:, :, None, :] * inner).sum((-2, -1)).clamp_min(0).sqrt()
    own = torch.where(apart, 0.0, weights).sum(-1)  # of all models at the same place
    return force <= own + _ROUNDING


def _weiszfeld(
    squared: Float[Tensor, "positions models models"],
    weights: Float[Tensor, "models"],
    shares: Float[Tensor, "positions models"],
) -> Float[Tensor, "positions models"]:
    for _ in range(_STEPS):
        towards = (shares[:, :, None] * squared).sum(1)
        spread = (shares * towards).sum(-1, keepdim=True) / 2
        distance = (towards - spread).clamp_min(1e-300).sqrt()
        shares = weights / distance
        shares = shares / shares.sum(-1, keepdim=True)
    return shares
