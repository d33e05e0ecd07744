"""``multicolm tune``: from questions to thresholds, with the sentences that users read."""

from __future__ import annotations

import json
import re
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


def test_the_table_has_the_best_eight_and_what_was_chosen_first(run, data: str) -> None:
    values = ",".join(f"0.{number}" for number in range(10, 30))
    arguments = ("--data", data, "--grid", f"threshold=0.7,2,{values}", "--out", "out")
    lines = run("tune", "tiny", "--policy", "confidence", *arguments).out.splitlines()
    assert lines[0] == "exact-match on data (dev), 3 questions"
    heads = ["threshold", "exact-match", "95", "%", "interval", "assistants", "cost"]
    assert lines[2].split() == heads
    rows = [line.split() for line in lines if "%" in line and " to " in line][:8]
    assert rows[0] == [
        "0.7",
        "100.0",
        "%",
        "29.2",
        "to",
        "100.0",
        "16.7",
        "%",
        "1.167",
        "<-",
        "chosen",
    ]
    assert [row[1] for row in rows] == ["100.0", *["66.7"] * 7]
    assert "14 more were tried: multicolm show ./out --json" in lines
    assert "100.0 % is optimistic: the best of 22 on the questions that chose it." in "\n".join(
        lines
    )
    assert lines[-1] == "out: confidence with threshold=0.7; use it with --policy ./out"


def test_what_is_beyond_the_budget_is_marked(run, data: str) -> None:
    arguments = ("--data", data, "--grid", "threshold=0.1,0.7", "--out", "out", "--budget", "0.1")
    result = run("tune", "tiny", "--policy", "confidence", *arguments)
    [first, second] = [line.strip() for line in result.out.splitlines() if " to " in line][:2]
    assert first.startswith("0.1 ") and first.endswith("<- chosen")
    assert second.startswith("0.7 ") and second.endswith("beyond the budget")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tuned on what? Give --task with a task, or --data with a file of JSON lines"),
        (["--data", "nothing.jsonl"], "there is no file"),
        (["--data", "./data.txt"], "'./data.txt' is no data set; allowed are a .jsonl"),
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


def test_a_dry_run_of_tune_says_what_the_values_take_and_writes_nothing(run, data: str) -> None:
    result = run(
        "tune", "tiny", "--policy", "confidence", "--data", data, "--out", "o", "--dry-run"
    )
    assert (result.code, result.out) == (0, "") and not Path("o").exists()
    assert re.fullmatch(r"Ahead: 12 rows, \d+ answers: at most .*\n", result.err)


def test_values_and_splits_of_tune_are_checked_before_a_model_is_loaded(
    run, data: str, monkeypatch
) -> None:
    monkeypatch.setattr(multicolm, "load", lambda source: pytest.fail("it was loaded"))
    asked = ("tune", "tiny", "--policy", "confidence", "--task", "task.yaml", "--out", "o")
    assert "unknown key 'treshold'" in run(*asked, "--grid", "treshold=0.1").err
    assert "unknown split 'nix'" in run(*asked, "--split", "nix").err
    assert "budget" in run(*asked, "--budget", "7").err
