from __future__ import annotations

import itertools
import tracemalloc
from math import comb

import numpy as np
import pytest

from multicolm.evaluation.statistics import bootstrap_interval, paired_interval, paired_test


def test_equal_values_leave_nothing_open() -> None:
    assert bootstrap_interval([0.25] * 7, seed=0) == (0.25, 0.25)
    assert bootstrap_interval([1], seed=3) == (1.0, 1.0)


def test_two_values_give_the_quantiles_of_their_three_means() -> None:
    # Of 0 and 1 the resampled means are 0, 0.5 and 1 with chances 1/4, 1/2 and 1/4.
    assert bootstrap_interval([0, 1], seed=0) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], seed=0, level=0.4) == (0.5, 0.5)


def test_the_interval_is_that_of_the_exact_bootstrap_distribution() -> None:
    # The resampled sum of 40 zeros and ones is binomial, so its quantiles are known.
    n, right = 40, 15
    chances = [comb(n, k) * (right / n) ** k * (1 - right / n) ** (n - k) for k in range(n + 1)]
    below = list(itertools.accumulate(chances))
    expected = [next(k for k in range(n + 1) if below[k] >= q) / n for q in (0.025, 0.975)]
    assert min(abs(p - q) for p in below for q in (0.025, 0.975)) > 0.005  # clear of the seed
    found = bootstrap_interval([1] * right + [0] * (n - right), seed=1)
    assert found == pytest.approx(expected, abs=1e-9)


def test_equal_seeds_give_equal_intervals_and_others_hardly_differ() -> None:
    values = np.random.default_rng(0).random(200).tolist()
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(values, seed=1)
    other = bootstrap_interval(values, seed=2)
    assert other != first
    assert other == pytest.approx(first, abs=0.01)


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    n_held = 0
    for trial in range(400):
        low, high = bootstrap_interval(generator.normal(0.3, 1.0, 100).tolist(), trial, n=1000)
        n_held += low <= 0.3 <= high
    # Three standard errors of a share of 0.95 in 400 trials are 0.033.
    assert 0.91 <= n_held / 400 <= 0.985


def test_memory_does_not_grow_with_the_number_of_resamples() -> None:
    values = [0.0, 1.0] * 5000
    tracemalloc.start()
    bootstrap_interval(values, seed=0, n=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all at once would be 160 MB


def test_a_paired_interval_sees_what_an_unpaired_one_cannot() -> None:
    a = [i / 100 + 0.01 for i in range(100)]
    b = [i / 100 for i in range(100)]
    assert paired_interval(a, b, seed=0) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 0.5), (5, 0, 2 / 32), (6, 1, 2 * 8 / 128), (3, 3, 1.0)],
)
def test_mcnemar_counts_only_questions_that_differ(
    only_a: int, only_b: int, p_value: float
) -> None:
    a = [1] * only_a + [0] * only_b + [1, 0, 0]
    b = [0] * only_a + [1] * only_b + [1, 0, 0]
    assert paired_test(a, b, seed=0) == p_value
    assert paired_test(b, a, seed=0) == p_value


def test_mcnemar_agrees_with_scipy_where_numbers_are_large() -> None:
    from scipy.stats import binomtest

    a, b = [1] * 1100 + [0] * 1000, [0] * 1100 + [1] * 1000
    assert paired_test(a, b, 0) == pytest.approx(binomtest(1000, 2100).pvalue, rel=1e-9)


def test_few_differences_are_flipped_in_every_way() -> None:
    # 1 of 4 flips of (0.5, 0.25) reaches the sum 0.75, and 1 reaches -0.75.
    assert paired_test([0.5, 0.25, 1], [0, 0, 1], seed=0) == 0.5
    assert paired_test([0.5, 0.5, 0.5], [0, 0, 0], seed=0) == 0.25
    assert paired_test([0.5], [0.5], seed=0) == 1.0


def test_random_flips_come_near_all_of_them() -> None:
    differences = np.random.default_rng(5).normal(0.3, 1, 12)
    a, b = differences.tolist(), [0.0] * 12
    exact = paired_test(a, b, seed=0, n=4096)
    drawn = paired_test(a, b, seed=0, n=4000)
    assert exact != drawn
    assert drawn == pytest.approx(exact, abs=0.03)


def test_without_a_difference_small_p_values_are_as_rare_as_they_say() -> None:
    generator = np.random.default_rng(1)
    found = []
    for trial in range(300):
        a, b = generator.random(40).tolist(), generator.random(40).tolist()
        found.append(paired_test(a, b, trial, n=500))
    # Three standard errors of a share of 0.1 in 300 trials are 0.052.
    assert 0.04 <= float(np.mean(np.array(found) <= 0.1)) <= 0.16


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 0])])
def test_pairs_need_two_sides_of_one_length(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs need"):
        paired_test(a, b, seed=0)
