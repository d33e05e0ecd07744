"""A comparison as files: its data, a Markdown table, a figure for print, and one HTML page.

    results.json, traces.jsonl    all there is to know; ``read_comparison`` and ``read_traces``
    table.md                      the table with how it was measured
    pareto.png, pareto.svg        quality against cost (with the extra ``plot``)
    report.html                   all of it, to read and to click; one file without a network.
                                  Figures of ``multicolm eval`` in the same folder are on it too

Equal inputs give equal bytes. A file is there whole or not at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multicolm.errors import ArtefactError, unknown
from multicolm.evaluation.harness_results import read_harness_results
from multicolm.evaluation.page import as_page
from multicolm.evaluation.plot import pareto
from multicolm.evaluation.results import Comparison, TracedAnswer
from multicolm.evaluation.table import as_markdown
from multicolm.evaluation.wording import plain
from multicolm.files import write_whole
from multicolm.types import MIXTURE

__all__ = ["MissingPlotWarning", "write_report"]


class MissingPlotWarning(UserWarning):
    """matplotlib is not installed: all files but the figure were written."""


def write_report(
    comparison: Comparison, traces: Sequence[TracedAnswer], folder: Path
) -> list[Path]:
    """Write all files of a report, and return their paths.

    Args:
        comparison: what the table says.
        traces: the answers to show token by token; may be empty.
        folder: where to; made if it is missing. Files of these names are replaced; a figure of an
            earlier report that cannot be drawn again is removed.

    Raises:
        ArtefactError: if the parts do not fit together (a row named twice, an answer of an unknown
            row, a token of an unknown model), or if the folder cannot be written.

    Warns:
        MissingPlotWarning: if matplotlib is not installed; all other files are written.
    """
    _check(comparison, traces)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, data in _files(comparison, traces, folder):
            write_whole(folder / name, data)
            paths.append(folder / name)
        return paths
    except OSError as error:
        raise ArtefactError(
            f"{folder}: the report cannot be written ({error}); give a folder that can be."
        ) from error


def _files(
    comparison: Comparison, traces: Sequence[TracedAnswer], folder: Path
) -> Iterator[tuple[str, bytes]]:
    """Names and contents; the data first, so that they are safe whatever befalls the rest."""
    yield "results.json", _json(comparison.as_json(), indent=2)
    yield "traces.jsonl", b"".join(_json(answer.as_json()) for answer in traces)
    yield "table.md", as_markdown(comparison).encode("utf-8")
    page = as_page(comparison, traces, read_harness_results(folder))
    yield "report.html", page.encode("utf-8")
    try:
        yield "pareto.png", pareto(comparison, "png")
        yield "pareto.svg", pareto(comparison, "svg")
    except ImportError:
        for name in ("pareto.png", "pareto.svg"):
            (folder / name).unlink(missing_ok=True)
        warnings.warn(
            f"{folder}: pareto.png and pareto.svg were not drawn, since matplotlib is not "
            "installed; run pip install 'multicolm[plot]' to have them.",
            MissingPlotWarning,
            stacklevel=4,
        )


def _json(value: Any, indent: int | None = None) -> bytes:
    """One line, or an indented text, of ASCII.

    Escapes keep a text's line separators from ending a line of JSONL, and hold half a surrogate
    pair, which UTF-8 cannot.
    """
    return (json.dumps(plain(value), indent=indent, allow_nan=False) + "\n").encode("ascii")


def _check(comparison: Comparison, traces: Sequence[TracedAnswer]) -> None:
    rows: set[str] = set()
    for row in comparison.rows:
        if row.name in rows:
            raise ArtefactError(f"two rows are named '{row.name}'; every row needs its own name.")
        rows.add(row.name)
    writers = {*comparison.models, MIXTURE}
    for answer in traces:
        where = f"the answer to question '{answer.question}'"
        if answer.row not in rows:
            raise ArtefactError(f"{where}: {unknown('row', answer.row, rows)}")
        for strange in {token.model for token in answer.tokens} - writers:
            raise ArtefactError(f"{where}: {unknown('model', strange, writers)}")
