"""The README's table: three comparisons, with a column for each kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from world import KINDS

from multicolm.evaluation.results import Comparison, RowResult, read_comparison

COMPARISONS: Final = {
    "comparison": {"oracle": "token oracle"},
    "comparison-lora": {"co-llm-lora": "co-llm, base trained too", "single": "trained base alone"},
    "comparison-rival": {"single": "one adapter: all statements"},
    "comparison-rival-chats": {"single": "one adapter: all statements, then the chats"},
}
"""Folders of results, and what rows are called in the table where that is not their name."""
HEADINGS: Final = ("", "right", "95 % interval", *KINDS, "assistants wrote", "passes a token")


def rows_of(folder: Path) -> Iterator[list[str]]:
    """The cells of every row; the oracles last."""
    found = [
        (names.get(name, name), comparison, row)
        for place, names in COMPARISONS.items()
        for comparison in [read_comparison(folder / place)]
        for row in comparison.rows
        for name in [Path(row.name).name]  # a checkpoint's row is called by its path
    ]
    kinds = ("model", "policy", "oracle")
    for name, comparison, row in sorted(found, key=lambda each: kinds.index(each[2].kind)):
        yield [name, *_cells(comparison, row)]


def _cells(comparison: Comparison, row: RowResult) -> list[str]:
    by_kind = []
    for kind in KINDS:
        qualities = [
            quality
            for question, quality in zip(comparison.questions, row.qualities, strict=True)
            if f"-{kind}-" in question
        ]
        by_kind.append(_percent(sum(qualities) / len(qualities)))
    return [
        _percent(row.quality),
        f"{100 * row.low:.0f} to {100 * row.high:.0f}",
        *by_kind,
        *_work(row),
    ]


def _work(row: RowResult) -> tuple[str, str]:
    """Who wrote, and at what cost; every pass of every model costs 1."""
    if row.kind == "oracle":
        return "", ""
    together = row.n_mixed == row.n_tokens
    wrote = "together" if together else _percent(row.assistant_share)
    return "" if row.kind == "model" else wrote, f"{row.cost:.2f}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def write_table(folder: Path, lines: Sequence[str]) -> str:
    """Write `table.md`, with lines under the table that say how it was measured."""
    rule = ["---", *["--:"] * (len(HEADINGS) - 1)]
    rows = [list(HEADINGS), rule, *rows_of(folder)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    text = table + "\n" + "".join(f"{line}\n" for line in lines)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
