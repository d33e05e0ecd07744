"""What a calibration error says."""

from __future__ import annotations

import pytest
import torch

from multicolm.learning.reliability import reliability


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error() -> None:
    predicted = torch.tensor([0.25] * 4 + [0.5] * 2 + [1.0])
    observed = torch.tensor([1.0, 0, 0, 0, 1, 0, 1])
    found = reliability(predicted, observed)
    assert found["calibration_error"] == pytest.approx(0)
    assert found["calibration"] == [
        {"predicted": 0.25, "observed": 0.25, "positions": 4},
        {"predicted": 0.5, "observed": 0.5, "positions": 2},
        {"predicted": 1.0, "observed": 1.0, "positions": 1},
    ]


def test_the_error_is_the_mean_distance_with_the_weight_of_the_positions() -> None:
    predicted = torch.tensor([0.2] * 3 + [0.9])
    observed = torch.tensor([1.0, 1, 1, 0])
    found = reliability(predicted, observed, n_bins=4)
    assert found["calibration_error"] == pytest.approx((3 * 0.8 + 0.9) / 4)


def test_bins_hold_about_equally_many_positions() -> None:
    predicted = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    found = reliability(predicted, predicted)
    assert [b["positions"] for b in found["calibration"]] == [100] * 10
    assert found["calibration_error"] == pytest.approx(0)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_positions_are_enough(n: int) -> None:
    found = reliability(torch.full((n,), 0.5), torch.ones(n))
    assert found["calibration_error"] == (0.5 if n else 0)
