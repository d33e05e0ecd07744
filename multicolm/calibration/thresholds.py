"""Thresholds for a wanted share of tokens, from the numbers that a policy decides on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from multicolm.policy.base import Deferral

__all__ = ["thresholds_for_shares"]


def thresholds_for_shares(
    scores: Sequence[float], shares: Sequence[float], deferral: Deferral
) -> list[float]:
    """Per share the threshold that hands over as many of these positions, and never more.

    Args:
        scores: the policy's score at positions of a text; at least one, none of them NaN.
        shares: wanted parts of the positions, 0 to 1.
        deferral: on which side of a threshold the policy hands over, strictly.

    Returns:
        For ``above`` the smallest observed score with a part of at most ``share`` above it, and
        mirrored otherwise; ``always`` where all may be handed over.

    Source:
        Co-LLM, arXiv 2403.03870, and its code: the quantiles of its threshold search.
    """
    ordered = sorted(scores, reverse=deferral.above)
    n = len(ordered)
    found = []
    for share in shares:
        # A share such as 0.3 of 10 positions is 3, whatever 0.3 * 10 is in floating point.
        n_allowed = math.floor(share * n + 1e-9)
        found.append(deferral.always if n_allowed >= n else ordered[n_allowed])
    return found
