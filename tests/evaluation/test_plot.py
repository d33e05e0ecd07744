"""The figure: what nothing beats, and labels that can be read."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fake_results import fake_comparison

from multicolm.evaluation.plot import Box, front, pareto, placed, short_names

FRAME = Box(0.0, 0.0, 400.0, 300.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_row_beats_at_its_cost_or_less(seed: int) -> None:
    chance = random.Random(seed)
    rows = [
        replace(row, cost=chance.randrange(1, 9) / 2, quality=chance.randrange(10) / 10)
        for row in fake_comparison().rows * 3
    ]
    real = [row for row in rows if row.kind not in ("oracle", "random")]
    best = front(rows)
    points = [(row.cost, row.quality) for row in best]
    assert points == sorted(set(points))
    for row in real:
        beaten = any(o.quality > row.quality and o.cost <= row.cost for o in real) or any(
            o.quality == row.quality and o.cost < row.cost for o in real
        )
        assert ((row.cost, row.quality) in points) == (not beaten)


def test_of_marks_of_one_place_the_models_are_on_top_and_policies_are_larger() -> None:
    from multicolm.evaluation import plot

    rows = [replace(row, cost=1.0, quality=0.5) for row in fake_comparison().rows]
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_mark", lambda axes, row: drawn.append(row.kind))
        pareto(replace(fake_comparison(), rows=tuple(rows)), "png")
    assert list(dict.fromkeys(drawn)) == ["policy", "random", "sweep", "model"]
    assert plot._RADIUS["policy"] > plot._RADIUS["random"] > plot._RADIUS["model"]


@pytest.mark.parametrize("seed", range(10))
def test_labels_cover_neither_marks_nor_each_other_and_stay_in_the_frame(seed: int) -> None:
    chance = random.Random(seed)
    anchors = [(chance.uniform(20, 380), chance.uniform(20, 280), 6.0) for _ in range(12)]
    taken = [Box(x - r, y - r, 2 * r, 2 * r) for x, y, r in anchors]
    n_placed = 0
    for anchor in anchors:
        box = placed(anchor, (60.0, 12.0), FRAME, taken)
        if box is not None:
            n_placed += 1
            assert sum(map(box.overlap, taken)) <= 1.0
            assert box.overlap(FRAME) == pytest.approx(60 * 12)
            taken.append(box)
    assert n_placed > 6


def test_where_there_is_no_room_there_is_no_label_unless_it_has_to_be() -> None:
    full = [FRAME]
    assert placed((200.0, 150.0, 5.0), (60.0, 12.0), FRAME, full) is None
    assert placed((200.0, 150.0, 5.0), (60.0, 12.0), FRAME, full, strict=False) is not None


def test_a_label_avoids_lines_where_it_can() -> None:
    line = [Box(float(x), 147.5, 5.0, 5.0) for x in range(0, 400, 5)]
    box = placed((200.0, 150.0, 5.0), (60.0, 12.0), FRAME, [], line)
    assert box is not None and not any(box.overlap(square) for square in line)


def test_names_are_the_last_parts_of_paths_where_these_tell_them_apart() -> None:
    assert short_names(["runs/co-llm/", "cosd-rule"]) == ["co-llm", "cosd-rule"]
    assert short_names(["a/x", "b/x", "/"]) == ["a/x", "b/x", "/"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_figure_of_one_row_or_of_none_is_drawn_too(kind) -> None:
    comparison = fake_comparison()
    for rows in ((), comparison.rows[:1], comparison.rows[-1:]):
        assert len(pareto(replace(comparison, rows=rows), kind)) > 1000


def test_every_policy_and_model_is_named_in_the_figure() -> None:
    # Text as paths cannot be read back, so it is drawn as text here.
    from multicolm.evaluation import plot

    style = {**plot._STYLE, "svg.fonttype": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_STYLE", style)
        drawn = pareto(fake_comparison(), "svg").decode()
    for row in fake_comparison().rows:
        assert (f">{row.name}<" in drawn or f"  {row.name}" in drawn) == (
            row.kind in ("policy", "model")
        ), row.name
