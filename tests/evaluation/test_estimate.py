"""An estimate is what the answers take if all are as long as they may be."""

from __future__ import annotations

from multicolm.evaluation.compare import compare
from multicolm.evaluation.estimate import Estimate


def test_no_comparison_takes_more_than_was_said_before(duo, make_task, reported, tmp_path) -> None:
    said: list[Estimate] = []
    comparison = compare(
        duo,
        ["cosd-rule", "average"],
        make_task(),
        out=tmp_path / "out",
        sweep=2,
        on_estimate=said.append,
    )
    [estimate] = said
    rows = [row for row in comparison.rows if row.n_tokens]
    assert len(rows) <= estimate.rows and estimate.answers == 4 * estimate.rows
    assert estimate.tokens == 5 * estimate.answers
    assert sum(row.n_tokens for row in rows) <= estimate.tokens
    passes = sum(use.forwards for row in rows for use in row.uses)
    assert passes <= estimate.passes and estimate.cost == estimate.passes
    assert estimate.seconds > 0 and estimate.memory_bytes > 1 << 20


def test_an_estimate_is_said_in_units_that_fit() -> None:
    short = Estimate(2, 8, 512, 600.0, 600.0, 89.0, 3 << 29)
    assert str(short) == (
        "2 rows, 8 answers: at most 512 new tokens, 600 forward passes, 89 s and, as measured, "
        "1.5 GiB of memory."
    )
    long = str(Estimate(2, 8, 5_120_000, 6e6, 9e6, 20_000.0, 3 << 30))
    assert "5,120,000 new tokens, 6,000,000 forward passes of cost 9,000,000, 5.6 h" in long
