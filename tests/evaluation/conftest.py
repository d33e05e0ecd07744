"""A task and an ensemble that are small enough to work out what every row must say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from multicolm.backend.table import TableModel
from multicolm.ensemble import Ensemble
from multicolm.evaluation.results import Comparison, TracedAnswer

TOKENS = ["1", "2", "3", "4", "x", "y", "<end>"]
TASK = """
data: {test: test.jsonl, dev: dev.jsonl}
prompt: "{ask}"
gold: "{answer}"
completion: "{answer}"
max_new_tokens: 5
metric: {kind: exact-match}
"""
# Question 1 is the base's, 2 the helper's, 3 takes both in turn, 4 nobody can answer.
QUESTIONS = [
    {"id": "one", "ask": "1", "answer": "x"},
    {"id": "two", "ask": "2", "answer": "y"},
    {"id": "three", "ask": "3", "answer": "xy"},
    {"id": "four", "ask": "4", "answer": "yy"},
]
BASE: Mapping[Any, Mapping[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"x": 0.9, "y": 0.1},
    "2": {"x": 0.6, "y": 0.4},
    "3": {"x": 0.9, "y": 0.1},
    "4": {"x": 1.0},
    "x": {"<end>": 0.9, "y": 0.1},
    ("3", "x"): {"<end>": 0.6, "y": 0.4},
}
HELPER: Mapping[Any, Mapping[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"y": 1.0},
    "2": {"y": 0.9, "x": 0.1},
    "3": {"y": 0.8, "x": 0.2},
    "4": {"x": 1.0},
    ("3", "x"): {"y": 1.0},
}


@pytest.fixture
def duo() -> Ensemble:
    tables = {"base_": BASE, "helper": HELPER}
    return Ensemble([TableModel(name, TOKENS, table, ["<end>"]) for name, table in tables.items()])


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """Makes a task file whose splits hold some records (``dev`` and ``test`` the same)."""

    def make(text: str = TASK, records: Sequence[Any] = QUESTIONS) -> Path:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        for split in ("dev", "test"):
            (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        path = tmp_path / "task.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Comparison, list[TracedAnswer]]]:
    """What comparisons hand over to the report, which is not written: it has its own tests."""
    calls: list[tuple[Comparison, list[TracedAnswer]]] = []

    def write_report(
        comparison: Comparison, traces: Sequence[TracedAnswer], folder: Path
    ) -> list[Path]:
        calls.append((comparison, list(traces)))
        return []

    monkeypatch.setattr("multicolm.evaluation.report.write_report", write_report)
    return calls
