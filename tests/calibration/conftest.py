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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from duo_world import QUESTIONS, duo_ensemble

from multicolm.ensemble import Ensemble
from multicolm.evaluation.task import Task, load_task

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
    return duo_ensemble()


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
