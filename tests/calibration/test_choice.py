"""The rule that chooses among points, and what a choice is worth on other questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from multicolm.calibration.choice import Point, Rule, cross_validated


def point(number: float, values: Sequence[float], share: float = 0.0) -> Point:
    return Point({"x": number}, share, 1 + share, 0.0, 1.0, {"task": tuple(values)})


def test_the_better_answers_within_the_budget_win_and_the_cheaper_of_equals() -> None:
    points = [point(0, [0], 0.1), point(1, [1], 0.3), point(2, [1], 0.2), point(3, [1], 0.9)]
    assert Rule().choose(points).params == {"x": 2}
    assert Rule(0.15).choose(points).params == {"x": 0}
    assert Rule(0.4, spend=True).choose(points).params == {"x": 1}
    assert Rule(1.25, "cost", spend=True).choose(points).params == {"x": 2}


def test_points_that_are_equally_good_look_better_than_they_are_and_cross_validation_does_not() -> (
    None
):
    """Coins: the best of 30 is far above one half on its own questions, and not on others."""
    generator = np.random.default_rng(0)
    best, elsewhere = [], []
    for seed in range(40):
        points = [point(i, generator.integers(0, 2, 40).tolist()) for i in range(30)]
        best.append(Rule().choose(points).quality)
        found = cross_validated(points, Rule(), seed)
        assert found is not None and found["low"] <= found["quality"] <= found["high"]
        elsewhere.append(found["quality"])
    assert np.mean(best) > 0.64
    assert np.mean(elsewhere) == pytest.approx(0.5, abs=0.03)


def test_a_point_that_is_best_everywhere_keeps_its_quality() -> None:
    points = [point(0, [0.0] * 20), point(1, [1.0, 1.0, 0.5, 1.0] * 5)]
    found = cross_validated(points, Rule(), 0)
    assert found is not None and found["quality"] == points[1].quality == 0.875


def test_a_single_question_leaves_none_to_judge_by() -> None:
    assert cross_validated([point(0, [1.0]), point(1, [0.0])], Rule(), 0) is None


def test_several_tasks_count_equally() -> None:
    qualities = {"small": (1.0, 1.0), "large": (0.0,) * 8}
    points = [Point({}, 0, 1, 0, 1, qualities)] * 2
    found = cross_validated(points, Rule(), 0)
    assert found is not None and found["quality"] == points[0].quality == 0.5
