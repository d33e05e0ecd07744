"""Thresholds from scores: by hand, and the laws that make them the right ones."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multicolm.calibration.thresholds import thresholds_for_shares
from multicolm.policy.base import Deferral

BELOW = Deferral("threshold", above=False, never=0.0, always=2.0)
ABOVE = Deferral("threshold", above=True, never=1.0, always=-1.0)
FEW = st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.75])
SCORES = st.lists(FEW | st.floats(0.0078125, 0.9921875, width=32), min_size=1, max_size=40)


def n_beyond(scores: list[float], threshold: float, deferral: Deferral) -> int:
    if deferral.above:
        return sum(score > threshold for score in scores)
    return sum(score < threshold for score in scores)


def test_four_scores_by_hand() -> None:
    scores = [0.5, 0.9, 0.2, 0.7]
    shares = [0.0, 0.2, 0.25, 0.49, 0.5, 0.75, 0.99, 1.0]
    below = thresholds_for_shares(scores, shares, BELOW)
    assert below == [0.2, 0.2, 0.5, 0.5, 0.7, 0.9, 0.9, 2.0]
    above = thresholds_for_shares(scores, shares, ABOVE)
    assert above == [0.9, 0.9, 0.7, 0.7, 0.5, 0.2, 0.2, -1.0]


def test_equal_scores_are_handed_over_together_or_not_at_all() -> None:
    scores = [0.9, 0.5, 0.5, 0.5, 0.1]
    # Of four fifths, the three equal ones and the one below them; of three fifths, only that one.
    assert thresholds_for_shares(scores, [0.8, 0.6, 0.2], BELOW) == [0.9, 0.5, 0.5]
    assert [n_beyond(scores, t, BELOW) for t in (0.9, 0.5)] == [4, 1]
    assert thresholds_for_shares([0.5] * 7, [0.0, 0.5, 0.99, 1.0], BELOW) == [0.5, 0.5, 0.5, 2.0]


def test_of_one_score_all_or_nothing_is_handed_over() -> None:
    assert thresholds_for_shares([0.3], [0.0, 0.999, 1.0], BELOW) == [0.3, 0.3, 2.0]
    assert thresholds_for_shares([0.3], [0.0, 0.999, 1.0], ABOVE) == [0.3, 0.3, -1.0]


@pytest.mark.parametrize("deferral", [BELOW, ABOVE])
@pytest.mark.parametrize("n", [10, 30, 70, 100, 1000])
def test_tenths_of_round_numbers_are_exact(n: int, deferral: Deferral) -> None:
    scores = [(i + 0.5) / n for i in range(n)]
    for tenth in range(11):
        [threshold] = thresholds_for_shares(scores, [tenth / 10], deferral)
        assert n_beyond(scores, threshold, deferral) == tenth * n // 10


@given(SCORES, st.integers(0, 1000), st.booleans())
def test_a_threshold_keeps_within_the_share_and_no_other_spends_more_of_it(
    scores: list[float], thousandths: int, above: bool
) -> None:
    deferral = ABOVE if above else BELOW
    share = thousandths / 1000
    allowed = Fraction(thousandths, 1000) * len(scores)
    [threshold] = thresholds_for_shares(scores, [share], deferral)
    assert n_beyond(scores, threshold, deferral) <= allowed
    spent = {n_beyond(scores, t, deferral) for t in [*scores, deferral.always]}
    assert n_beyond(scores, threshold, deferral) == max(n for n in spent if n <= allowed)


@given(SCORES, st.integers(0, 1000))
def test_below_mirrors_above(scores: list[float], thousandths: int) -> None:
    share = thousandths / 1000
    mirrored = Deferral("threshold", above=True, never=-BELOW.never, always=-BELOW.always)
    [below] = thresholds_for_shares(scores, [share], BELOW)
    [above] = thresholds_for_shares([-score for score in scores], [share], mirrored)
    assert above == -below


@given(SCORES, st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_a_greater_share_never_hands_over_less(scores: list[float], shares: list[float]) -> None:
    ordered = sorted(shares)
    counts = [n_beyond(scores, t, BELOW) for t in thresholds_for_shares(scores, ordered, BELOW)]
    assert counts == sorted(counts)
    # Each share by itself, whatever else is asked for.
    assert thresholds_for_shares(scores, shares, BELOW) == [
        thresholds_for_shares(scores, [share], BELOW)[0] for share in shares
    ]
