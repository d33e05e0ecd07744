"""Quality against cost, as a figure for print: ``pareto.png`` and ``pareto.svg``.

Every row is a small pie of who wrote its tokens: the base model in ink, the assistants in colours
that colour-blind readers can tell apart, and every mark has its name beside it. matplotlib is
imported when something is drawn; it comes with the extra ``plot``. Names are placed here and not
by adjustText, which takes marks for points and puts names over the pies. The report page draws the
same figure anew for its width, and without matplotlib.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from multicolm.evaluation.findings import routing_verdict
from multicolm.evaluation.results import QUESTION_ORACLE, Comparison, RowResult
from multicolm.evaluation.table import slices
from multicolm.evaluation.wording import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Box", "front", "pareto", "placed", "short_names"]

_INK, _MUTED, _FAINT = "#1b2330", "#6b7686", "#d9dee6"
# After Okabe and Ito, darkened where white paper asks for it; the base model comes first.
_COLOURS = (_INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MIXED = "#b3bac5"
# Drawn in this order: a policy is seen around a baseline's ring, and a ring around a model.
_RADIUS = {"policy": 7.0, "random": 5.2, "sweep": 3.0, "model": 4.6}
_LAYERS = tuple(_RADIUS)
_NAMED = ("policy", "model")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "multicolm",
    "svg.fonttype": "path",
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, in pixels from the lower left.

    Attributes:
        x: left.
        y: bottom.
        width: to the right.
        height: upwards.
    """

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover, in square pixels."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        up = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, across) * max(0.0, up)


def front(rows: Sequence[RowResult]) -> list[RowResult]:
    """The rows that no other row beats in quality at the same cost or less, cheapest first.

    Of rows that are equal in both, the first stands for all. Nobody would use a random baseline,
    and an oracle has no cost: both are left out.
    """
    real = [row for row in rows if row.kind not in ("oracle", "random")]
    kept: list[RowResult] = []
    for row in sorted(real, key=lambda row: (row.cost, -row.quality)):
        if not kept or row.quality > kept[-1].quality:
            kept.append(row)
    return kept


def placed(
    anchor: tuple[float, float, float],
    size: tuple[float, float],
    frame: Box,
    taken: Sequence[Box] = (),
    lines: Sequence[Box] = (),
    *,
    strict: bool = True,
) -> Box | None:
    """Where a label goes beside its mark.

    Args:
        anchor: centre and radius of the mark.
        size: width and height of the label.
        frame: what it has to stay in.
        taken: what it must not cover.
        lines: what it should not cover.
        strict: whether there is no place for it if it would cover something or leave the frame;
            otherwise it is put where that is least.
    """

    def clash(box: Box) -> float:
        outside = box.width * box.height - box.overlap(frame)
        return sum(map(box.overlap, taken)) + 10 * outside

    def badness(choice: tuple[float, Box]) -> tuple[bool, float]:
        effort, box = choice
        covered = clash(box)
        crossed = sum(map(box.overlap, lines))
        return bool(covered > 1.0), float(effort + covered + 0.2 * crossed)

    box = min(_places(anchor, size), key=badness)[1]
    return None if strict and clash(box) > 1.0 else box


def _places(
    anchor: tuple[float, float, float], size: tuple[float, float]
) -> Iterator[tuple[float, Box]]:
    """Places around a mark with the effort of looking there: right and near first."""
    (x, y, radius), (width, height) = anchor, size
    sides = (
        (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0),
        (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8),
    )  # fmt: skip
    for far, (side, (dx, dy)) in itertools.product((3, 9, 18, 30, 48), enumerate(sides)):
        reach = radius + far
        centre_x = x + dx * reach + _sign(dx) * width / 2
        centre_y = y + dy * reach + _sign(dy) * height / 2
        yield far + side / 4, Box(centre_x - width / 2, centre_y - height / 2, width, height)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def pareto(comparison: Comparison, kind: Literal["png", "svg"]) -> bytes:
    """The figure as a file's content; equal comparisons give equal bytes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(7.2, 4.9), dpi=200)
        figure.subplots_adjust(left=0.085, right=0.985, top=0.84, bottom=0.22)
        _draw(figure, comparison)
        out = io.BytesIO()
        plain: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, metadata=plain)
    return out.getvalue()


def _draw(figure: Figure, comparison: Comparison) -> None:
    axes = figure.add_subplot()
    rows = [row for row in comparison.rows if row.kind != "oracle"]
    _frame(axes, comparison)
    _legend(axes, comparison)
    for oracle in (row for row in comparison.rows if row.kind == "oracle"):
        ends = axes.get_xlim()
        axes.plot(ends, [100 * oracle.quality] * 2, color=_MUTED, lw=1, ls=(0, (5, 4)), zorder=1)
    _front(axes, rows)
    _curves(axes, rows)
    for row in rows:
        # The bootstrap intervals of earlier versions need not hold the mean; error bars have to.
        low, high = min(row.low, row.quality), max(row.high, row.quality)
        ends = (100 * low, 100 * high)
        axes.plot([row.cost] * 2, ends, color=_MUTED, lw=0.9, alpha=0.55, zorder=3)
    for row in sorted(rows, key=lambda row: _LAYERS.index(row.kind)):
        _mark(axes, row)
    _labels(axes, comparison, rows)


def _frame(axes: Axes, comparison: Comparison) -> None:
    rows = [row for row in comparison.rows if row.kind != "oracle"]
    costs = [row.cost for row in rows] or [0.0, 1.0]
    ends = [100 * end for row in comparison.rows for end in (row.low, row.high, row.quality)]
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.3, max(costs) * 1.5)
    else:
        span = (max(costs) - min(costs)) or max(costs) or 1.0
        axes.set_xlim(max(0.0, min(costs) - 0.1 * span), max(costs) + 0.16 * span)
    axes.set_autoscale_on(False)
    axes.set_ylim(max(-2.0, min(ends, default=0.0) - 5), min(104.0, max(ends, default=100.0) + 5))
    axes.set_xlabel("cost per written token, in the ensemble's unit", color=_MUTED)
    axes.set_ylabel(f"{visible(comparison.metric)}, %", color=_MUTED)
    n = max((row.n_questions for row in comparison.rows), default=0)
    title = f"{visible(comparison.ensemble)} on {visible(comparison.task)}"
    axes.set_title(
        title, loc="left", color=_INK, fontsize=11.5, fontweight="bold", pad=36, x=-0.055
    )
    axes.annotate(
        f"{n} questions; bars: 95 % intervals; pies: who wrote; small: other thresholds; "
        f"hollow: random, matched shares\n{routing_verdict(comparison)}",
        (-0.055, 1), (0, 9), xycoords="axes fraction", textcoords="offset points",
        color=_MUTED, fontsize=8,
    )  # fmt: skip
    axes.grid(axis="y", color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)


def _front(axes: Axes, rows: Sequence[RowResult]) -> None:
    best = front(rows)
    if not best:
        return
    costs = [row.cost for row in best] + [axes.get_xlim()[1]]
    heights = [100 * row.quality for row in best]
    # A staircase: at a cost between two rows one gets what the cheaper one gives.
    x = [costs[0], *(cost for cost in costs[1:-1] for _ in range(2)), costs[-1]]
    y = [height for height in heights for _ in range(2)]
    axes.fill_between(x, y, axes.get_ylim()[0], color="#f3f6fa", zorder=0, lw=0)
    axes.plot(x, y, color="#aebccd", lw=2.4, zorder=2, solid_joinstyle="round")


def _curves(axes: Axes, rows: Sequence[RowResult]) -> None:
    """Join every policy with its sweep's points."""
    for head in (row for row in rows if row.kind == "policy"):
        sweep = [row for row in rows if row.kind == "sweep" and row.of == head.name]
        if sweep:
            curve = sorted([head, *sweep], key=lambda row: (row.cost, row.quality))
            ys = [100 * row.quality for row in curve]
            axes.plot([row.cost for row in curve], ys, color=_INK, lw=0.9, alpha=0.55, zorder=3.5)


def _mark(axes: Axes, row: RowResult) -> None:
    """A pie of who wrote the tokens; models alone are squares, random rows have a hollow core."""
    from matplotlib.offsetbox import AnnotationBbox, DrawingArea
    from matplotlib.patches import Circle, Rectangle, Wedge

    radius = _RADIUS[row.kind]
    colours = [*(_COLOURS[i % len(_COLOURS)] for i in range(len(row.uses))), _MIXED]
    area = DrawingArea(2 * radius, 2 * radius)
    centre = (radius, radius)
    if row.kind == "model":
        colour = colours[max(range(len(row.uses)), key=lambda i: row.uses[i].share, default=0)]
        side = 1.8 * radius
        corner = (radius - side / 2, radius - side / 2)
        area.add_artist(Rectangle(corner, side, side, fc=colour, ec="white", lw=1.2))
    else:
        area.add_artist(Circle(centre, radius, fc=_FAINT, ec="white", lw=1.6))
        start = 90.0
        for share, colour in zip(slices(row), colours, strict=True):
            if share > 0:
                end = start - 360 * share
                area.add_artist(Wedge(centre, radius, end, start, fc=colour, lw=0))
                start = end
        if row.kind == "random":
            area.add_artist(Circle(centre, 0.65 * radius, fc="white", lw=0))
    axes.add_artist(
        AnnotationBbox(area, (row.cost, 100 * row.quality), frameon=False, pad=0, zorder=6)
    )


def _labels(axes: Axes, comparison: Comparison, rows: Sequence[RowResult]) -> None:
    """Name policies and models; where there is no room, by a number that is explained below."""
    figure = axes.figure
    pixel = figure.dpi / 72
    window = axes.get_window_extent()
    frame = Box(window.x0, window.y0, window.width, window.height)
    named = [row for row in rows if row.kind in _NAMED]
    labelled = list(zip(named, short_names([row.name for row in named]), strict=True))
    # The best ones choose their places first.
    labelled.sort(key=lambda pair: -pair[0].quality)
    taken = [*_marks(axes, rows, pixel), *_oracles(axes, comparison)]
    lines = _lines(axes)
    key: list[str] = []
    for row, name in labelled:
        x, y = map(float, axes.transData.transform((row.cost, 100 * row.quality)))
        anchor = (x, y, _RADIUS[row.kind] * pixel)
        text = _text(axes, name, row)
        box = placed(anchor, _size(text), frame, taken, lines)
        if box is None:
            text.remove()
            key.append(name)
            text = _text(axes, str(len(key)), row)
            box = placed(anchor, _size(text), frame, taken, lines, strict=False)
            assert box is not None
        taken.append(box)
        text.xy = (box.x, box.y)
        text.set_position((box.x, box.y))
        near_x, near_y = _nearest(box, x, y)
        if math.hypot(near_x - x, near_y - y) > 14 * pixel:
            ends = axes.transData.inverted().transform([(x, y), (near_x, near_y)])
            axes.plot(ends[:, 0], ends[:, 1], color=_MUTED, lw=0.5, zorder=3.5)
    if key:
        explained = "    ".join(f"{number}  {name}" for number, name in enumerate(key, start=1))
        axes.annotate(
            "\n".join(textwrap.wrap(explained, 110)), (-0.065, -0.245), xycoords="axes fraction",
            va="top", color=_MUTED, fontsize=8, annotation_clip=False,
        )  # fmt: skip


def _text(axes: Axes, words: str, row: RowResult) -> Any:
    return axes.annotate(
        words, (0, 0), xycoords="figure pixels", va="bottom", annotation_clip=False, color=_INK,
        zorder=7, fontsize=8.5, fontweight="bold" if row.kind == "policy" else "normal",
    )  # fmt: skip


def _size(text: Any) -> tuple[float, float]:
    extent = text.get_window_extent()
    return float(extent.width), float(extent.height)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of every path, where that is unique.

    >>> short_names(["runs/co-llm", "cosd-rule", "a/x", "b/x"])
    ['co-llm', 'cosd-rule', 'a/x', 'b/x']
    """
    last = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    return [
        visible(short if last.count(short) == 1 else name)
        for name, short in zip(names, last, strict=True)
    ]


def _marks(axes: Axes, rows: Sequence[RowResult], pixel: float) -> list[Box]:
    boxes = []
    for row in rows:
        x, y = map(float, axes.transData.transform((row.cost, 100 * row.quality)))
        r = _RADIUS[row.kind] * pixel
        boxes.append(Box(x - r, y - r, 2 * r, 2 * r))
    return boxes


def _nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to a place."""
    return (
        min(max(x, box.x), box.x + box.width),
        min(max(y, box.y), box.y + box.height),
    )


def _lines(axes: Axes) -> list[Box]:
    """Where error bars, curves and the front run, as small squares along them."""
    paths = [line.get_xydata() for line in axes.get_lines() if line.get_xydata() is not None]
    squares = []
    for path in paths:
        pixels = axes.transData.transform(path)
        for (x0, y0), (x1, y1) in itertools.pairwise(pixels):
            n = max(1, int(math.hypot(x1 - x0, y1 - y0) / 5))
            places = ((x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(n + 1))
            squares += [Box(float(x) - 2.5, float(y) - 2.5, 5.0, 5.0) for x, y in places]
    return squares


def _oracles(axes: Axes, comparison: Comparison) -> list[Box]:
    """Name the oracles' lines at their right ends; where these names are."""
    boxes: list[Box] = []
    for row in (row for row in comparison.rows if row.kind == "oracle"):
        unit = "question" if row.name == QUESTION_ORACLE else "token"
        for offset in (3, -10):  # below the line where another's name is above it
            text = axes.annotate(
                f"{visible(row.name)}: the best model for every {unit}", (1, 100 * row.quality),
                (-4, offset), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", color=_MUTED, fontsize=7.5,
            )  # fmt: skip
            extent = text.get_window_extent()
            box = Box(extent.x0, extent.y0, extent.width, extent.height)
            if offset < 0 or not any(map(box.overlap, boxes)):
                break
            text.remove()
        boxes.append(box)
    return boxes


def _legend(axes: Axes, comparison: Comparison) -> None:
    """Which colour is which model, below the axes."""
    from matplotlib.patches import Patch

    handles = [
        Patch(fc=_COLOURS[i % len(_COLOURS)], label=visible(name))
        for i, name in enumerate(comparison.models)
    ]
    if any(row.n_mixed for row in comparison.rows):
        handles.append(Patch(fc=_MIXED, label="together"))
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.075, -0.135), ncols=len(handles),
        frameon=False, handlelength=0.9, handleheight=0.9, fontsize=8.5, labelcolor=_INK,
        columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
