"""``multicolm rollout``: what it says before it begins, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from score_worlds import write

import multicolm
from multicolm.scoring.store import load_table

BASE = {
    "": {"c": 1.0},
    "q": {"b": 0.9, "a": 0.1},
    "a": {"c": 0.8, "x": 0.2},
    "b": {"x": 1.0},
    "c": {".": 1.0},
    "x": {".": 1.0},
}
EXPERT = {**BASE, "q": {"a": 1.0}, "a": {"x": 1.0}}
TASK = {
    "data": {"train": "train.jsonl"},
    "prompt": "{prompt}",
    "gold": "{answer}",
    "max_new_tokens": 4,
    "metric": {"kind": "contains"},
}


@pytest.fixture
def world(run, tmp_path) -> dict[str, str]:
    """An ensemble file, a task, and scores of one text."""
    models = {}
    for name, rows in (("first", BASE), ("expert", EXPERT)):
        data = {"tokens": ["q", "a", "b", "c", "x", "."], "ends": ["."], "table": rows}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
        models[name] = {"backend": "table", "model": f"./{name}.yaml"}
    file = {"base_model": "first", "models": models}
    (tmp_path / "duo.yaml").write_text(yaml.safe_dump(file))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    write(tmp_path / "train.jsonl", [{"prompt": "q", "answer": "x", "completion": "ax"}])
    places = {
        "ensemble": str(tmp_path / "duo.yaml"),
        "task": str(tmp_path / "task.yaml"),
        "scores": str(tmp_path / "scores"),
    }
    data = str(tmp_path / "train.jsonl")
    result = run("score", places["ensemble"], data, "--out", places["scores"])
    assert result.code == 0, result.err
    return places


def test_places_are_judged_and_what_was_found_is_one_line(run, world) -> None:
    arguments = ("rollout", world["ensemble"], world["scores"], "--task", world["task"])
    result = run(*arguments)
    assert result.code == 0, result.err
    assert result.err == (
        "2 of the 2 places at which the base model leaves the corpus (of 3); 4 texts to finish.\n"
    )
    assert result.out == (
        f"{world['scores']}: 2 places judged by 4 texts (50.0 % right). The token decides at "
        "100.0 % of them; no token is better than the base model's at 50.0 %; others are right "
        "than in the corpus at 50.0 %.\n"
    )
    table = load_table(world["scores"])
    assert table.right.tolist() == [[True, False], [False, True], [True, True]]
    again = run(*arguments, "--json")
    assert json.loads(again.out)["unlike_corpus"] == 1


def test_a_dry_run_says_what_would_be_finished_and_loads_nothing(run, world, monkeypatch) -> None:
    monkeypatch.setattr(multicolm, "load", lambda *_: pytest.fail("a model was loaded"))
    result = run(
        "rollout", world["ensemble"], world["scores"], "--task", world["task"], "--dry-run"
    )
    assert result.code == 0 and "4 texts to finish" in result.err and result.out == ""
    assert load_table(world["scores"]).rollouts is None


def test_a_checkpoint_says_that_it_learned_from_labels(run, world, tmp_path) -> None:
    train = ("train", world["ensemble"], world["scores"], "--policy", "cosd-tree")
    first = run(*train, "--out", str(tmp_path / "one"))
    assert first.code == 0 and "rollouts" not in first.out
    assert run("rollout", world["ensemble"], world["scores"], "--task", world["task"]).code == 0
    again = run(*train, "--out", str(tmp_path / "one"))
    assert again.code == 1 and "holds another checkpoint" in again.err
    second = run(*train, "--out", str(tmp_path / "two"))
    assert "positions judged by rollouts" in second.out and second.code == 0
    assert "judged" in (tmp_path / "two/README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--split", "test"], "nothing is learned or tuned on the test split"),
        (["--policy", "nobody"], "'nobody'"),
        (["--limit", "0"], "0"),
        (["--samples", "3"], "are equal where nothing is drawn"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, world, more, said) -> None:
    result = run("rollout", world["ensemble"], world["scores"], "--task", world["task"], *more)
    assert result.code != 0 and said in result.err and "Traceback" not in result.err


def test_a_folder_that_is_no_table_is_refused(run, world, tmp_path: Path) -> None:
    result = run("rollout", world["ensemble"], str(tmp_path), "--task", world["task"])
    assert result.code == 1 and "is no score table" in result.err
