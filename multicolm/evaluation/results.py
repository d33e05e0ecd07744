"""What a comparison found: the schema of ``results.json`` and of the lines of ``traces.jsonl``.

Imports no torch and no plotting library, so that results can be read anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from multicolm.records import text_lines

__all__ = [
    "QUESTION_ORACLE",
    "TOKEN_ORACLE",
    "Comparison",
    "ModelUse",
    "RowKind",
    "RowResult",
    "ShownToken",
    "TracedAnswer",
    "read_comparison",
    "read_traces",
]

RowKind: TypeAlias = Literal["model", "policy", "random", "sweep", "oracle"]
"""What a row of the table is: one model alone; a policy; random routing at a policy's shares; a
policy at another threshold (a point of its curve); the best that a choice of models could do."""

TOKEN_ORACLE = "oracle"
"""Name of the row that lets the right model write every token."""

QUESTION_ORACLE = "per-question oracle"
"""Name of the row that lets the right model alone answer every question."""


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What one model did for all texts of a row together.

    Attributes:
        model: its name.
        tokens_written: by it.
        share: of all written tokens, 0 to 1.
        forwards: forward passes, each counted once however many texts it served.
        tokens_read: tokens fed to it, prompts included.
        seconds: wall-clock time inside its forward passes.
        calls: HTTP requests to its server; 0 for a model in process, ``None`` where they were not
            counted, as in results of earlier versions.
    """

    model: str
    tokens_written: int
    share: float
    forwards: int
    tokens_read: int
    seconds: float
    calls: int | None = None


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row of the table.

    Attributes:
        name: unique within the comparison.
        kind: what the row is.
        policy: ``{"kind": ..., "params": {...}}``; ``None`` for rows that nothing was run for.
        n_questions: how many questions it answered.
        quality: mean of the metric, 0 to 1.
        low: lower end of the 95 % interval of ``quality``.
        high: its upper end.
        gain: quality minus that of the best model alone on the same questions; ``None`` for that
            model's own row.
        gain_low: lower end of its 95 % interval, of paired questions.
        gain_high: its upper end.
        p_value: of a paired two-sided test against the best model alone, as if it were the only
            one; ``None`` for that model's own row and for oracles, which are never worse.
        p_holm: the same, corrected by Holm's method for all policies of the comparison; ``None``
            for rows of other kinds.
        p_question_oracle: of such a test of a policy against the per-question oracle, uncorrected;
            ``None`` for rows of other kinds, and without that oracle.
        n_cut_off: answers that ended at ``max_new_tokens``; ``None`` for an oracle.
        n_shared: answers that more than one model wrote at; 0 for a policy that routes whole
            questions, ``None`` where these were not counted.
        uses: per model, the base model first; empty for the oracle.
        n_tokens: written in all; 0 for the oracle.
        n_mixed: of these, written by several models together.
        seconds: wall-clock time of the answers; 0 for the oracle.
        tokens_per_second: written tokens by those seconds.
        cost: per written token, in the ensemble's unit: every model's forward passes for a text
            times its ``cost``.
        calls_per_token: HTTP requests to servers of models, per written token; ``None`` where they
            were not counted.
        of: for ``random`` and ``sweep``, the name of the row that it belongs to.
        point: for ``sweep``, the params that differ from that row's.
        note: one sentence that a reader of the row has to know; empty if there is none.
        qualities: of each answer, in the order of ``Comparison.questions``; empty in results of
            earlier versions.
    """

    name: str
    kind: RowKind
    policy: Mapping[str, Any] | None
    n_questions: int
    quality: float
    low: float
    high: float
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    p_question_oracle: float | None = None
    n_cut_off: int | None = None
    n_shared: int | None = None
    uses: tuple[ModelUse, ...] = ()
    n_tokens: int = 0
    n_mixed: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    cost: float = 0.0
    calls_per_token: float | None = None
    of: str = ""
    point: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    qualities: tuple[float, ...] = ()

    @property
    def assistant_share(self) -> float:
        """The part of the tokens that assistants wrote, 0 to 1."""
        return sum(use.share for use in self.uses[1:])


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole comparison: the schema of ``results.json``.

    Attributes:
        ensemble: as it was given.
        models: the names, the base model first.
        identities: per model what it is, where that is known.
        costs: per model, of one forward pass for one text.
        task: the task's name.
        metric: the metric's name.
        split: which split of the task's data was used.
        digest: of that data.
        seed: of everything random.
        settings: generation settings that all rows shared, such as ``max_new_tokens``.
        versions: of multicolm, torch, transformers and Python.
        machine: processor, threads and accelerator, in words.
        rows: of the table.
        warnings: sentences that a reader has to know before trusting a number.
        findings: what was found, in sentences; the headline first.
        binary: whether every answer is right or wrong, and nothing between; ``None`` if unknown.
        intervals: how intervals and p-values were made, in words.
        timing: what tokens per second leave out, in words.
        questions: their ids; empty in results of earlier versions.
    """

    ensemble: str
    models: tuple[str, ...]
    identities: tuple[str, ...]
    costs: tuple[float, ...]
    task: str
    metric: str
    split: str
    digest: str
    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: str
    rows: tuple[RowResult, ...]
    warnings: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    binary: bool | None = None
    intervals: str = ""
    timing: str = ""
    questions: tuple[str, ...] = ()

    @property
    def has_calls(self) -> bool:
        """Whether any model was asked over HTTP, so that it matters how often."""
        return any(use.calls for row in self.rows for use in row.uses)

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """The reverse of :meth:`as_json`."""
        rows = tuple(
            RowResult(
                **{
                    **row,
                    "uses": tuple(ModelUse(**use) for use in row["uses"]),
                    "qualities": tuple(row.get("qualities", ())),
                }
            )
            for row in data["rows"]
        )
        names = ("models", "identities", "costs", "warnings", "findings", "questions")
        lists = {name: tuple(data[name]) for name in names if name in data}
        return cls(**{**data, **lists, "rows": rows})


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One written token, and what every model and the policy made of its place.

    Attributes:
        text: as it is shown.
        model: who wrote it, or ``"mixture"``.
        logprob: in nats, under the writer's distribution; ``None`` if it is not finite.
        score: the number that the policy decided on, if it gives one.
        models: per model name, ``{"logprob": nats or None, "top": [[token text, probability],
            ...]}``, most likely first; only models that ran afterwards.
        policy: per model name, the probability with which the policy lets it write; empty for
            policies without such probabilities.
    """

    text: str
    model: str
    logprob: float | None
    score: float | None = None
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TracedAnswer:
    """One answer of one row: a line of ``traces.jsonl``.

    Attributes:
        row: name of the row in the table.
        question: the question's id.
        prompt: what was asked, as text.
        gold: the right answer, as the task has it.
        text: what was written.
        quality: of this answer, 0 to 1.
        finish_reason: why the text ended.
        tokens: the trace.
    """

    row: str
    question: str
    prompt: str
    gold: str
    text: str
    quality: float
    finish_reason: str
    tokens: tuple[ShownToken, ...]

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TracedAnswer:
        """The reverse of :meth:`as_json`."""
        return cls(**{**data, "tokens": tuple(ShownToken(**token) for token in data["tokens"])})


def read_comparison(folder: Path) -> Comparison:
    """What ``results.json`` of a folder holds."""
    return Comparison.from_json(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def read_traces(folder: Path) -> list[TracedAnswer]:
    """What ``traces.jsonl`` of a folder holds."""
    lines = text_lines((folder / "traces.jsonl").read_text(encoding="utf-8"))
    return [TracedAnswer.from_json(json.loads(line)) for line in lines]
