"""Intervals that hold the truth as often as they say, and tests against exact distributions."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from multicolm.evaluation import statistics
from multicolm.evaluation.statistics import holm, mean_interval, paired_interval, paired_test


def zeros_and_ones(n_right: int, n: int) -> list[int]:
    return [1] * n_right + [0] * (n - n_right)


# --- zeros and ones ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    [
        (24, 24, 0.8575, 1.0),
        (0, 24, 0.0, 0.1425),
        (1, 1, 0.025, 1.0),
        (600, 600, 0.994, 1.0),
        (8, 10, 0.444, 0.975),  # Clopper and Pearson's, as textbooks have it
    ],
)
def test_all_right_of_a_few_questions_leaves_much_open(
    n_right: int, n: int, low: float, high: float
) -> None:
    found = mean_interval(zeros_and_ones(n_right, n), seed=0)
    assert found == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize("n", [1, 2, 6, 24])
def test_intervals_of_zeros_and_ones_never_hold_the_truth_less_often_than_they_say(n: int) -> None:
    # Every outcome with its chance, so that coverage is exact; p = 0.95 at n = 24 was 0.69 before.
    intervals = [mean_interval(zeros_and_ones(k, n), seed=0) for k in range(n + 1)]
    for p in (0.01, 0.3, 0.5, 0.8, 0.95, 0.99):
        held = [low <= p <= high for low, high in intervals]
        assert np.dot(held, binom.pmf(range(n + 1), n, p)) >= 0.95, p


@pytest.mark.parametrize(("n", "least"), [(5, 0.92), (9, 0.93)])
def test_intervals_of_paired_zeros_and_ones_hold_the_truth_at_small_n(n: int, least: float) -> None:
    # Every outcome: questions that both, only one, only the other, or neither has right.
    outcomes = [o for o in itertools.product(range(n + 1), repeat=4) if sum(o) == n]
    intervals = []
    for both, only_a, only_b, neither in outcomes:
        a = [1] * (both + only_a) + [0] * (only_b + neither)
        b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
        intervals.append(paired_interval(a, b, seed=0))
    lows, highs = np.array(intervals).T
    chances = np.random.default_rng(0).dirichlet([0.5] * 4, 100)
    coverages = []
    for chance in chances:
        truth = chance[1] - chance[2]
        held = (lows <= truth + 1e-12) & (truth - 1e-12 <= highs)
        coverages.append(np.dot(held, multinomial.pmf(outcomes, n, chance)))
    assert min(coverages) >= least
    assert np.mean(coverages) >= 0.97


def test_a_paired_interval_is_newcombe_s() -> None:
    # Newcombe 1998, table II: 36, 12, 2, 0 of 50, a difference of 0.20. By Wilson's limits of both
    # proportions its method 10 gives 0.0569 to 0.3404; by Clopper and Pearson's it is a bit wider.
    a, b = [1] * 48 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    low, high = paired_interval(a, b, seed=0)
    assert 0.02 < low < 0.0569 and 0.3404 < high < 0.38
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_clopper_pearson", wilson)
        assert paired_interval(a, b, seed=0) == pytest.approx((0.0569, 0.3404), abs=2e-4)


def wilson(n_right: int, n: int, level: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(n_right, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


@pytest.mark.parametrize("values", [[1] * 24, [0] * 24, [1] * 12 + [0] * 12])
def test_equal_answers_to_a_few_questions_leave_a_difference_open(values: list[int]) -> None:
    low, high = paired_interval(values, values, seed=0)
    assert low == pytest.approx(-high)
    assert high > 0.05


def test_the_interval_of_the_other_way_round_is_the_mirrored_one() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.integers(0, 2, 30).tolist(), (generator.random(30) < 0.8).astype(int).tolist()
    low, high = paired_interval(a, b, seed=0)
    assert paired_interval(b, a, seed=0) == pytest.approx((-high, -low))
    assert -1 <= low <= np.mean(a) - np.mean(b) <= high <= 1


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 0.5), (5, 0, 2 / 32), (6, 1, 2 * 8 / 128), (3, 3, 1.0)],
)
def test_mcnemar_counts_only_questions_that_differ(
    only_a: int, only_b: int, p_value: float
) -> None:
    a = [1] * only_a + [0] * only_b + [1, 0, 0]
    b = [0] * only_a + [1] * only_b + [1, 0, 0]
    assert paired_test(a, b, seed=0) == pytest.approx(p_value)
    assert paired_test(b, a, seed=0) == pytest.approx(p_value)


# --- other values --------------------------------------------------------------------------------


def test_bca_intervals_hold_the_truth_about_95_times_in_100(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Most answers right, some wrong, the rest in between: as F1 of short answers has it.
    monkeypatch.setattr(statistics, "_N_RESAMPLES", 999)
    generator = np.random.default_rng(0)
    n_held = 0
    for trial in range(300):
        kinds, between = generator.random(24), generator.random(24)
        values = np.where(kinds < 0.6, 1.0, np.where(kinds < 0.7, 0.0, between))
        low, high = mean_interval(values.tolist(), seed=trial)
        n_held += low <= 0.75 <= high
    # Three standard errors of a share of 0.95 in 300 trials are 0.038.
    assert 0.91 <= n_held / 300 <= 0.99


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_equal_values_leave_open_what_unseen_questions_could_change(value: float) -> None:
    # Ones and zeros are the two ends of one rule: 0.8575 of 24 equal values is sure, no more.
    low, high = mean_interval([value] * 24, seed=0)
    part = mean_interval([1] * 24, seed=0)[0]
    assert (low, high) == pytest.approx((part * value, part * value + 1 - part))


def test_equal_differences_are_not_taken_for_certain() -> None:
    a = [i / 100 + 0.01 for i in range(99)]
    b = [i / 100 for i in range(99)]
    low, high = paired_interval(a, b, seed=0)
    assert -0.05 < low < 0.01 < high < 0.06


def test_a_paired_interval_sees_what_an_unpaired_one_cannot() -> None:
    generator = np.random.default_rng(0)
    b = generator.uniform(0, 0.9, 100)
    a = b + generator.uniform(0.01, 0.03, 100)
    low, high = paired_interval(a.tolist(), b.tolist(), seed=0)
    assert 0.017 < low < 0.02 < high < 0.023


@pytest.mark.parametrize("values", [[0.0, 0.5], [0.5] * 23 + [0.75], [1.0] * 23 + [0.5]])
def test_hardly_any_variation_still_gives_an_interval_around_the_mean(values: list[float]) -> None:
    low, high = mean_interval(values, seed=0)
    assert 0 <= low < np.mean(values) < high <= 1


def test_equal_seeds_give_equal_intervals_and_others_hardly_differ() -> None:
    values = np.random.default_rng(0).random(200).tolist()
    first = mean_interval(values, seed=1)
    assert first == mean_interval(values, seed=1)
    other = mean_interval(values, seed=2)
    assert other != first
    assert other == pytest.approx(first, abs=0.01)


def test_memory_does_not_grow_with_the_number_of_resamples() -> None:
    values = np.random.default_rng(0).random(3_000).tolist()
    tracemalloc.start()
    mean_interval(values, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all at once would be 480 MB


def test_few_differences_are_flipped_in_every_way() -> None:
    # 1 of 4 flips of (0.5, 0.25) reaches the sum 0.75, and 1 reaches -0.75.
    assert paired_test([0.5, 0.25, 1], [0, 0, 1], seed=0) == 0.5
    assert paired_test([0.5, 0.5, 0.5], [0, 0, 0], seed=0) == 0.25
    assert paired_test([0.5], [0.5], seed=0) == 1.0
    assert paired_test([0.5, 1], [0.25, 1], seed=0) == 1.0


def test_random_flips_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(5).uniform(-0.4, 0.9, 12)
    a, b = differences.tolist(), [0.0] * 12
    exact = paired_test(a, b, seed=0)
    assert exact * 2**12 == pytest.approx(round(exact * 2**12))
    monkeypatch.setattr(statistics, "_N_RESAMPLES", 4000)
    drawn = paired_test(a, b, seed=0)
    assert exact != drawn
    assert drawn == pytest.approx(exact, abs=0.03)


def test_without_a_difference_small_p_values_are_as_rare_as_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "_N_RESAMPLES", 499)
    generator = np.random.default_rng(1)
    found = []
    for trial in range(300):
        a, b = generator.random(40).tolist(), generator.random(40).tolist()
        found.append(paired_test(a, b, trial))
    # Three standard errors of a share of 0.1 in 300 trials are 0.052.
    assert 0.04 <= float(np.mean(np.array(found) <= 0.1)) <= 0.16


# --- several -------------------------------------------------------------------------------------


def test_the_interval_of_several_tasks_together_holds_the_truth() -> None:
    # Two tasks of 4 and 7 questions; every pair of outcomes with its chance.
    n, m = 4, 7
    outcomes = list(itertools.product(range(n + 1), range(m + 1)))
    both = [(zeros_and_ones(i, n), zeros_and_ones(j, m)) for i, j in outcomes]
    intervals = [mean_interval(*groups, seed=0) for groups in both]
    for p, q in ((0.5, 0.5), (0.95, 0.9), (0.99, 0.1)):
        held = [low <= (p + q) / 2 <= high for low, high in intervals]
        chances = [binom.pmf(i, n, p) * binom.pmf(j, m, q) for i, j in outcomes]
        assert np.dot(held, chances) >= 0.95, (p, q)
    assert mean_interval([1] * 24, [1] * 24, seed=0)[0] < 0.95


def test_holm_corrects_the_smallest_most_and_keeps_the_order() -> None:
    # Worked by hand: 4 x .005, 3 x .01, 2 x .03 and 1 x .04, never less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 0])])
def test_pairs_need_two_sides_of_one_length(a: list[float], b: list[float]) -> None:
    for function in (paired_interval, paired_test):
        with pytest.raises(ValueError, match="pairs need"):
            function(a, b, seed=0)


def test_an_interval_needs_values_and_a_level() -> None:
    for groups in ((), ([],), ([1], [])):
        with pytest.raises(ValueError, match="needs values"):
            mean_interval(*groups, seed=0)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="a level"):
            mean_interval([1], seed=0, level=level)
        with pytest.raises(ValueError, match="a level"):
            paired_interval([1], [0], seed=0, level=level)


def test_a_negative_seed_is_a_seed_like_any_other() -> None:
    values = [0.1, 0.7, 0.4, 0.9, 0.3]
    for seed in (-1, -(2**63), 2**63 - 1):
        low, high = mean_interval(values, seed=seed)
        assert 0 <= low < high <= 1
        assert (low, high) == mean_interval(values, seed=seed)
    assert mean_interval(values, seed=-1) != mean_interval(values, seed=1)
