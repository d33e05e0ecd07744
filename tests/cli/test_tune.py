"""``multicolm tune``: from questions to thresholds, with the sentences that users read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import multicolm
from multicolm.backend.table import TableModel
from multicolm.ensemble import Ensemble

TOKENS = ["1", "2", "3", "x", "y", "<end>"]
BASE: dict[Any, dict[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"x": 0.9, "y": 0.1},
    "2": {"x": 0.6, "y": 0.4},
    "3": {"x": 0.8, "y": 0.2},
}
HELPER: dict[Any, dict[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"y": 1.0},
    "2": {"y": 1.0},
    "3": {"y": 1.0},
}
# The base model is right where it is sure.
RECORDS = [
    {"prompt": "1", "completion": "x"},
    {"prompt": "2", "completion": "y"},
    {"prompt": "3", "completion": "x"},
]
TASK = """
data: {dev: data.jsonl}
prompt: "{prompt}"
gold: "{completion}"
max_new_tokens: 4
metric: {kind: exact-match}
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tables = {"ann": BASE, "bob": HELPER}
    duo = Ensemble([TableModel(name, TOKENS, table, ["<end>"]) for name, table in tables.items()])
    monkeypatch.setattr(multicolm, "load", lambda source: duo)
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    Path("task.yaml").write_text(TASK)
    return "data.jsonl"


def tuned(run, *arguments: str) -> Any:
    result = run("tune", "tiny", "--policy", "confidence", *arguments, "--out", "out", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.parametrize("asked", [["--data", "data.jsonl"], ["--task", "task.yaml"]])
def test_the_threshold_of_the_best_answers_is_found(run, data: str, asked: list[str]) -> None:
    found = tuned(run, *asked, "--metric", "exact-match")
    assert found["measured"]["quality"] == 1.0
    # Above the base model's doubt about `2`, and not above its others.
    assert 0.6 < found["chosen"]["threshold"] < 0.801
    assert yaml.safe_load(Path("out/policy.yaml").read_text())["params"] == found["chosen"]
    result = run("generate", "tiny", "2", "--policy", "./out", "--json")
    assert json.loads(result.out)["text"] == "y"


def test_a_budget_is_kept(run, data: str) -> None:
    assert tuned(run, "--data", data, "--budget", "0.2")["measured"]["share"] <= 0.2


def test_a_metric_of_another_name_judges_in_the_tasks_place(run, data: str) -> None:
    arguments = ("--task", "task.yaml", "--grid", "threshold=0.1,2")
    by_letter = tuned(run, *arguments, "--metric", "exact-match")
    result = run(
        *("tune", "tiny", "--policy", "confidence", *arguments),
        *("--metric", "numeric", "--out", "numbers", "--json"),
    )
    assert "the right answer 'x' holds no number to compare with" in result.err
    assert [point["quality"] for point in by_letter["curve"]] == pytest.approx([2 / 3, 1 / 3])


def test_the_table_marks_what_was_chosen(run, data: str) -> None:
    result = run("tune", "tiny", "--policy", "confidence", "--data", data, "--out", "out")
    [line] = [line for line in result.out.splitlines() if "<- chosen" in line]
    assert "confidence with threshold=" in result.out and "--policy ./out" in result.out
    assert line.split()[3] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tuned on what? Give --task with a task, or --data with a file of JSON lines"),
        (["--data", "nothing.jsonl"], "there is no file"),
        (["--data", "./data.csv"], "'./data.csv' is no data set; allowed are a .jsonl"),
        (["--data", "data.jsonl", "--metric", "exact"], "unknown metric 'exact'. Did you"),
        (["--data", "data.jsonl", "--grid", "threshold"], "write it as name=values"),
        (["--data", "data.jsonl", "--grid", "threshold=a"], "write finite numbers"),
        (["--data", "data.jsonl", "--grid", "treshold=1"], "treshold"),
        (["--data", "data.jsonl", "--budget", "2"], "0 to 1, got 2"),
        (["--task", "task.yaml", "--split", "test"], "test"),
    ],
)
def test_what_cannot_be_tuned_is_told_in_a_sentence(
    run, data: str, arguments: list[str], said: str
) -> None:
    result = run("tune", "tiny", "--policy", "confidence", *arguments, "--out", "out")
    assert result.code in (1, 2) and said in result.err, result.err
    assert "Traceback" not in result.err
    assert not Path("out", "policy.yaml").exists()


def test_a_policy_is_needed(run, data: str) -> None:
    result = run("tune", "tiny", "--data", data, "--out", "out")
    assert "which policy? Give one with --policy" in result.err
