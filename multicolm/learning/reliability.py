"""Whether a probability means what it says."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["reliability"]


def reliability(
    predicted: Float[Tensor, "positions"], observed: Float[Tensor, "positions"], n_bins: int = 10
) -> dict[str, Any]:
    """How far probabilities are from what came true, for the report of a training.

    Args:
        predicted: probabilities of something.
        observed: 1 where it came true, 0 where it did not, or the probability that it did.
        n_bins: of about equally many positions each; equal probabilities share one.

    Returns:
        ``calibration_error``, the mean distance of the two over bins, each with the weight of its
        positions; and ``calibration``, per bin the means of both and how many positions it has.

    Source:
        Naeini, Cooper and Hauskrecht, AAAI 2015 (expected calibration error), with bins of equal
        mass as in Nguyen and O'Connor, EMNLP 2015.
    """
    predicted, observed = predicted.double().cpu(), observed.double().cpu()
    ranks = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    # Not torch.quantile, which refuses more than 16 million numbers.
    ordered = predicted.sort().values
    edges = ordered[(ranks * len(ordered)).long()] if len(ordered) else ordered
    number = torch.bucketize(predicted, edges, right=True)
    bins = []
    for which in (number == b for b in sorted(set(number.tolist()))):
        means = {"predicted": predicted[which].mean(), "observed": observed[which].mean()}
        bins.append({**{k: float(v) for k, v in means.items()}, "positions": int(which.sum())})
    error = sum(abs(b["predicted"] - b["observed"]) * b["positions"] for b in bins)
    return {"calibration_error": error / max(1, len(predicted)), "calibration": bins}
