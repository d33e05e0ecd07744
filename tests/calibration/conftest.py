"""A world of two tables in which every threshold can be worked out by hand.

What the base writes alone, with the probability of its choice at every place (``.`` ends a text):

    one     x .9   . .9      two    x .6   . .9
    three   x .9   . .6      four   x 1.0  . .9

and what comes of ``confidence`` at the only thresholds that differ (capitals: the helper):

    threshold   texts               share   cost    right
    .6          x.  x.  x.  x.      0       1       one
    .9          x.  Y.  xY. x.      2/9     11/9    one, two, three
    1.0         Y.  Y.  Y.  x.      4/8     12/8    two        (the helper ends four)
    2           Y.  Y.  Y.  X.      1       2       two
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from multicolm.backend.table import TableModel
from multicolm.ensemble import Ensemble
from multicolm.evaluation.task import Task, load_task

TOKENS = ["1", "2", "3", "4", "x", "y", "<end>"]
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
QUESTIONS = [
    {"id": "one", "ask": "1", "answer": "x"},
    {"id": "two", "ask": "2", "answer": "y"},
    {"id": "three", "ask": "3", "answer": "xy"},
    {"id": "four", "ask": "4", "answer": "yy"},
]
TESTED = [{"id": "other", "ask": "41", "answer": "x"}]
TASK = """
data: {test: NAME-test.jsonl, dev: NAME-dev.jsonl}
prompt: "{ask}"
gold: "{answer}"
max_new_tokens: 5
metric: {kind: exact-match}
"""

MakeTask = Callable[..., Path]


def lines(records: Sequence[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def duo() -> Ensemble:
    tables = {"base_": BASE, "helper": HELPER}
    return Ensemble([TableModel(name, TOKENS, table, ["<end>"]) for name, table in tables.items()])


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """Makes a task file, its name the task's."""

    def make(
        name: str = "task",
        dev: Sequence[Any] = QUESTIONS,
        test: Sequence[Any] = TESTED,
        text: str = TASK,
    ) -> Path:
        (tmp_path / f"{name}-dev.jsonl").write_text(lines(dev), encoding="utf-8")
        (tmp_path / f"{name}-test.jsonl").write_text(lines(test), encoding="utf-8")
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("NAME", name), encoding="utf-8")
        return path

    return make


@pytest.fixture
def task(make_task: MakeTask) -> Task:
    return load_task(make_task())
