"""How sure a comparison can be: intervals, and paired tests of two rows.

Values are qualities of answers, 0 to 1, one per question. Where all of them are 0 or 1, intervals
and tests are exact or built from exact ones; other values are resampled with a seed, and equal
arguments give equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["holm", "mean_interval", "paired_interval", "paired_test"]

_N_RESAMPLES = 9_999
_DRAWN_AT_A_TIME = 1 << 20
_NOISE = 1e-12  # between values that are equal but for rounding

# Both, since a checked annotation takes no whole number for a float.
Values: TypeAlias = Sequence[float | int]
Interval: TypeAlias = tuple[float, float]


def mean_interval(*groups: Values, seed: int, level: float = 0.95) -> Interval:
    """A confidence interval of the mean; of several groups, of the mean of their means.

    Of zeros and ones it is Clopper and Pearson's, whose coverage is never below ``level``; of other
    values the BCa bootstrap's. Where all values are equal there is nothing to resample: then
    Clopper and Pearson bound the part of the questions that has this value, and the rest may be
    anything from 0 to 1. The intervals of groups are combined by square-and-add.

    Args:
        groups: of values, 0 to 1, at least one in each.
        seed: of the resamples.
        level: of confidence, between 0 and 1.

    Raises:
        ValueError: if there is no group or no value in one, or ``level`` is out of range.

    Source:
        Clopper and Pearson 1934; Efron 1987; Zou and Donner 2008 (groups).
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or not all(array.ndim == 1 and len(array) for array in arrays):
        raise ValueError("an interval needs values, one or more")
    if not 0 < level < 1:
        raise ValueError(f"a level must be between 0 and 1, got {level}")
    each = np.array([_interval(array, 0.0, seed, level) for array in arrays])
    means = np.array([array.mean() for array in arrays])
    if len(arrays) == 1:
        return float(each[0, 0]), float(each[0, 1])
    low, high = np.sqrt(((each - means[:, None]) ** 2).sum(0)) / len(arrays)
    return float(means.mean() - low), float(means.mean() + high)


def paired_interval(a: Values, b: Values, seed: int, level: float = 0.95) -> Interval:
    """A confidence interval of the mean of ``a - b``, question by question.

    Of zeros and ones it is Newcombe's square-and-add interval for paired proportions, around
    Clopper and Pearson's of both; of other values that of :func:`mean_interval` for differences.

    Args:
        a: values, 0 to 1, one per question.
        b: as many, for the same questions.
        seed: of the resamples.
        level: of confidence, between 0 and 1.

    Raises:
        ValueError: if the lengths differ, there is no value, or ``level`` is out of range.

    Source:
        Newcombe 1998, method 10.
    """
    differences = _differences(a, b)
    if not 0 < level < 1:
        raise ValueError(f"a level must be between 0 and 1, got {level}")
    if not _are_binary(a) or not _are_binary(b):
        return _interval(differences, -1.0, seed, level)
    n, n_a, n_b = len(a), int(sum(a)), int(sum(b))
    low_a, high_a = _clopper_pearson(n_a, n, level)
    low_b, high_b = _clopper_pearson(n_b, n, level)
    n_both = int(np.dot(a, b))
    agreement = _correlation(n_both, n_a - n_both, n_b - n_both, n)
    p_a, p_b = n_a / n, n_b / n

    def reach(x: float, y: float) -> float:
        """Half a width, of distances from the means of ``a`` and ``b``."""
        return math.sqrt(max(0.0, x * x - 2 * agreement * x * y + y * y))

    low = p_a - p_b - reach(p_a - low_a, high_b - p_b)
    high = p_a - p_b + reach(high_a - p_a, p_b - low_b)
    return max(-1.0, low), min(1.0, high)


def paired_test(a: Values, b: Values, seed: int) -> float:
    """The two-sided p-value of "no difference on average", question by question.

    Of zeros and ones, McNemar's exact test: a binomial test of the questions that only one side
    has right. Of other values a permutation test that flips the signs of differences: all flips
    where these are fewer than 10,000, else random ones.

    Args:
        a: values, 0 to 1, one per question.
        b: as many, for the same questions.
        seed: of the random flips.

    Raises:
        ValueError: if the lengths differ, or there is no value.

    Source:
        McNemar 1947; Fisher 1935; Phipson and Smyth 2010.
    """
    differences = _differences(a, b)
    differing = differences[differences != 0]
    if len(differing) < 2:
        return 1.0  # one difference is as large whichever way it is flipped
    if _are_binary(a) and _are_binary(b):
        return float(stats.binomtest(int((differing > 0).sum()), len(differing)).pvalue)
    found = stats.permutation_test(
        (differing,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        **_resampling(len(differing), seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, in the given order.

    The chance that any of the true hypotheses is rejected at a level is at most that level.

    Source:
        Holm 1979.
    """
    n = len(p_values)
    corrected, least = [0.0] * n, 0.0
    for rank, i in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (n - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def _are_binary(values: Values) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _differences(a: Values, b: Values) -> NDArray[np.float64]:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs need as many values on both sides, got {len(a)} and {len(b)}")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def _interval(values: NDArray[np.float64], least: float, seed: int, level: float) -> Interval:
    """Of the mean of values between ``least`` and 1."""
    n = len(values)
    if least == 0 and np.isin(values, (0, 1)).all():
        return _clopper_pearson(int(values.sum()), n, level)
    if np.ptp(values) <= _NOISE:
        part, value = _clopper_pearson(n, n, level)[0], float(values[0])
        return part * value + (1 - part) * least, part * value + (1 - part)
    found = stats.bootstrap(
        (values,), np.mean, vectorized=True, confidence_level=level, **_resampling(n, seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _resampling(n: int, seed: int) -> dict[str, Any]:
    """How often ``n`` values are resampled; memory does not grow with that."""
    return {
        "n_resamples": _N_RESAMPLES,
        "batch": max(1, _DRAWN_AT_A_TIME // n),
        "rng": np.random.default_rng(seed % 2**64),  # NumPy takes no negative seed
    }


def _clopper_pearson(n_right: int, n: int, level: float) -> Interval:
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, n_right, n - n_right + 1) if n_right else 0.0
    high = stats.beta.ppf(1 - tail, n_right + 1, n - n_right) if n_right < n else 1.0
    return float(low), float(high)


def _correlation(both: int, only_a: int, only_b: int, n: int) -> float:
    """Phi of two sides' zeros and ones, corrected for continuity where it is positive; -1 to 1."""
    neither = n - both - only_a - only_b
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if not product:
        return 0.0
    excess = float(both * neither - only_a * only_b)
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    return excess / math.sqrt(product)
