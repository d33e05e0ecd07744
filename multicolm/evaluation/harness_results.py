"""What the lm-evaluation-harness measured: the schema of ``lm_eval.json``, and as a table.

Imports neither torch nor the harness, so that results can be read anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from multicolm.errors import ArtefactError
from multicolm.evaluation.wording import markup, plain

__all__ = ["HarnessFigure", "HarnessResults", "figure_text", "leaders", "read_harness_results"]

FILE = "lm_eval.json"


@dataclass(frozen=True, slots=True)
class HarnessFigure:
    """One figure of one row on one task.

    Attributes:
        row: a model alone, or a policy.
        kind: which of the two.
        policy: ``{"kind": ..., "params": {...}}``.
        likelihood: ``joint`` or ``routed`` (see :mod:`multicolm.scoring.likelihood`); empty where
            the task asks for none, and for a model alone, whose likelihood is its own.
        task: of the harness, or a group of its tasks.
        version: of the task's definition, if it has one.
        n_questions: that were asked; 0 for a group.
        n_shot: examples in front of each.
        metric: as the harness calls it.
        filter: what was done to answers before; ``none`` for nothing.
        value: of the metric; ``None`` if it is no number.
        stderr: its standard error; ``None`` if the harness gives none.
        higher_is_better: ``None`` if that is not said.
        seconds: that the row took for the task, in all sittings together.
        n_cut: requests whose context was longer than a model's and was cut on the left.
        n_impossible: texts of likelihood 0, since the policy rules out one of their tokens.
    """

    row: str
    kind: Literal["model", "policy"]
    policy: Mapping[str, Any]
    likelihood: str
    task: str
    version: str
    n_questions: int
    n_shot: int
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    seconds: float
    n_cut: int
    n_impossible: int = 0

    @property
    def label(self) -> str:
        """The metric, and what was done to answers before."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    @property
    def column(self) -> tuple[str, str, str]:
        """What it can be compared with: figures of other rows with the same."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True, slots=True)
class HarnessResults:
    """All figures of an evaluation: the schema of ``lm_eval.json``.

    Attributes:
        ensemble: as it was given.
        models: the names, the base model first.
        identities: per model what it is, where that is known.
        settings: that all rows shared.
        versions: of multicolm, the harness, torch, transformers and Python.
        machine: processor, threads and accelerator, in words.
        figures: by task, metric and filter, then by row.
        warnings: what a reader has to know before trusting a number.
    """

    ensemble: str
    models: tuple[str, ...]
    identities: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    figures: tuple[HarnessFigure, ...]
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HarnessResults:
        """The reverse of :meth:`as_json`."""
        names = ("models", "identities", "warnings")
        figures = tuple(HarnessFigure(**figure) for figure in data["figures"])
        return cls(**{**data, **{n: tuple(data[n]) for n in names}, "figures": figures})

    def columns(self) -> Iterator[list[HarnessFigure]]:
        """Figures that can be compared with each other, together."""
        columns: dict[tuple[str, str, str], list[HarnessFigure]] = {}
        for figure in self.figures:
            columns.setdefault(figure.column, []).append(figure)
        yield from columns.values()

    @property
    def on_errors(self) -> str:
        """What follows ±, and what it does not say."""
        text = "After ±, the standard error."
        if any(figure.stderr == 0 for figure in self.figures):
            text += (
                " It is 0 where all answers are judged alike, which is no certainty: 24 right "
                "answers to 24 questions leave a 95 % interval of 85.7 to 100 %."
            )
        return text

    def facts(self) -> list[tuple[str, str]]:
        """How it was measured: pairs of a name and a value."""
        return [
            ("Ensemble", self.ensemble),
            ("Settings", ", ".join(f"{k} = {v}" for k, v in self.settings.items())),
            ("Versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())),
            ("Machine", self.machine),
        ]

    def as_markdown(self) -> str:
        """A table per task with how it was measured, as Markdown that ends with a newline."""
        parts = [f"# {markup(self.ensemble)} in the lm-evaluation-harness"]
        by_task: dict[str, list[list[HarnessFigure]]] = {}
        for column in self.columns():
            by_task.setdefault(column[0].task, []).append(column)
        for task, columns in by_task.items():
            parts += [f"## {markup(task)}", _table(columns)]
        parts.append(f"Bold: the best of its column. {self.on_errors}")
        parts += [f"- {markup(text)}" for text in self.warnings]
        parts.append("## How it was measured")
        parts.append("\n".join(f"- {markup(k)}: {markup(v)}" for k, v in self.facts() if v))
        return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[Sequence[HarnessFigure]]) -> str:
    """Rows of a task, its metrics side by side."""
    names = [column[0].label for column in columns]
    rows: dict[tuple[str, str], list[str]] = {}
    for number, column in enumerate(columns):
        best = leaders(column)
        for figure in column:
            cells = rows.setdefault((figure.row, figure.likelihood), [""] * len(columns))
            text = figure_text(figure)
            cells[number] = f"**{text}**" if figure in best else text
    lines = [["", "likelihood", *map(markup, names)], ["---", "---", *["--:"] * len(names)]]
    lines += [[markup(row), likelihood, *cells] for (row, likelihood), cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_text(figure: HarnessFigure) -> str:
    """The figure and its standard error, with four digits."""
    if figure.value is None:
        return "no number"
    text = f"{figure.value:.4f}"
    return text if figure.stderr is None else f"{text} ± {figure.stderr:.4f}"


def leaders(column: Sequence[HarnessFigure]) -> list[HarnessFigure]:
    """The best of figures that can be compared; none if all are equal, or nobody says what is."""
    known = [figure for figure in column if figure.value is not None]
    if len(known) < 2 or known[0].higher_is_better is None:
        return []
    values = [figure.value for figure in known if figure.value is not None]
    best, worst = max(values), min(values)
    if best == worst:
        return []
    best = best if known[0].higher_is_better else worst
    return [figure for figure in known if figure.value == best]


def read_harness_results(folder: Path) -> HarnessResults | None:
    """What ``lm_eval.json`` of a folder holds; ``None`` if there is none.

    Raises:
        ArtefactError: if it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return HarnessResults.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}); delete it, and repeat the same `multicolm eval`: "
            "what was finished is kept."
        ) from error


def as_bytes(results: HarnessResults) -> bytes:
    """The content of ``lm_eval.json``."""
    text = json.dumps(plain(results.as_json()), indent=2, allow_nan=False)
    return (text + "\n").encode("ascii")
