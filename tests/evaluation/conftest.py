"""A task and an ensemble that are small enough to work out what every row must say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from duo_world import QUESTIONS, duo_ensemble

from multicolm.ensemble import Ensemble
from multicolm.evaluation.results import Comparison, TracedAnswer

TASK = """
data: {test: test.jsonl, dev: dev.jsonl}
prompt: "{ask}"
gold: "{answer}"
completion: "{answer}"
max_new_tokens: 5
metric: {kind: exact-match}
"""


@pytest.fixture
def duo() -> Ensemble:
    return duo_ensemble()


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
