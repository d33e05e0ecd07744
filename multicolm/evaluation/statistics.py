"""How sure a comparison may be: bootstrap intervals, and paired tests of two rows.

All that is random hangs on a seed; equal arguments give equal numbers. Memory does not grow with
the number of resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_interval", "paired_interval", "paired_test"]

_DRAWN_AT_A_TIME = 1 << 20
_NOISE = 1e-12  # of a sum of differences, relative to the largest that there can be

# Both, since a checked annotation takes no whole number for a float.
Values: TypeAlias = Sequence[float | int]


def bootstrap_interval(
    values: Values, seed: int, n: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean.

    Args:
        values: one number per question, at least one.
        seed: of the resamples.
        n: how many resamples.
        level: the part of the resampled means that lies inside, 0 to 1.

    Raises:
        ValueError: if there is no value, ``n`` is below 1, or ``level`` is not between 0 and 1.

    Source:
        Efron 1979; Efron and Tibshirani 1993, chapter 13.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or n < 1 or not 0 < level < 1:
        raise ValueError("a bootstrap needs values, a resample or more, and a level in (0, 1)")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (count, len(array)))].mean(axis=1)
            for count in _portions(n, len(array))
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    a: Values, b: Values, seed: int, n: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """The bootstrap interval of the mean of ``a - b``, question by question.

    Args:
        a: one number per question.
        b: one number for each of the same questions.
        seed: see :func:`bootstrap_interval`.
        n: see there.
        level: see there.

    Raises:
        ValueError: if the lengths differ; see :func:`bootstrap_interval`.
    """
    return bootstrap_interval(_differences(a, b).tolist(), seed, n, level)


def paired_test(a: Values, b: Values, seed: int, n: int = 10_000) -> float:
    """The two-sided p-value of "no difference on average", question by question.

    If all values are 0 or 1, McNemar's exact test: a binomial test of the questions that only one
    side has right. Otherwise a sign-flip permutation test of the mean difference, exact where all
    flips are no more than ``n``, else of ``n`` random ones, the observed one counted in.

    Args:
        a: one number per question.
        b: one number for each of the same questions.
        seed: of the random flips.
        n: how many there are of them.

    Raises:
        ValueError: if the lengths differ, or there is no value.

    Source:
        McNemar 1947; Fisher 1935; Phipson and Smyth 2010 (counting the observed flip in).
    """
    differences = _differences(a, b)
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        return _mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    return _sign_flips(differences[differences != 0], seed, n)


def _differences(a: Values, b: Values) -> NDArray[np.float64]:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs need as many values on both sides, got {len(a)} and {len(b)}")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def _mcnemar(n_only_a: int, n_only_b: int) -> float:
    """Twice the smaller tail of a fair coin, in whole numbers up to the last division."""
    n = n_only_a + n_only_b
    ways, tail = 1, 0
    for k in range(min(n_only_a, n_only_b) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, float(2 * tail / 2**n))


def _sign_flips(differences: NDArray[np.float64], seed: int, n: int) -> float:
    observed = abs(differences.sum()) - _NOISE * np.abs(differences).sum()
    m = len(differences)
    if 2**m <= n:
        bits = np.arange(2**m)[:, None] >> np.arange(m) & 1
        return float((np.abs((1 - 2 * bits) @ differences) >= observed).mean())
    generator = np.random.default_rng(seed)
    n_as_large = sum(
        int(
            (np.abs((1 - 2 * generator.integers(0, 2, (count, m))) @ differences) >= observed).sum()
        )
        for count in _portions(n, m)
    )
    return (1 + n_as_large) / (1 + n)


def _portions(n: int, width: int) -> Iterator[int]:
    """``n`` cut into portions whose numbers, ``width`` each, fit into flat memory."""
    most = max(1, _DRAWN_AT_A_TIME // width)
    for start in range(0, n, most):
        yield min(most, n - start)
