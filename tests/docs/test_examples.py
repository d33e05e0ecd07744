"""Every example runs as printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import multicolm
from multicolm.testing import check_policy

ROOT = Path(__file__).parents[2]
OWN = "examples/own_policy/surer.py:Surer"


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_policy_of_ones_own_takes_at_most_thirty_lines() -> None:
    lines = (ROOT / "examples/own_policy/surer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30


def test_a_policy_of_ones_own_runs_from_the_command_line() -> None:
    shown = run(
        *("-m", "multicolm", "generate", "tiny", "What is Dulerex made from?", "--trace"),
        *("--policy", OWN, "--set", "threshold=0.8"),
    )
    assert "[generalist]" in shown
    assert "[facts]" in shown or "[math]" in shown


def test_a_policy_of_ones_own_keeps_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ensemble = multicolm.load("tiny")
    own = ensemble.resolve(OWN, {"threshold": 0.8})
    check_policy(own)
    [answer] = ensemble.generate(["What is Dulerex made from?"], own)
    assert answer.policy == "surer"


def test_the_ensemble_file_validates_and_writes() -> None:
    file = "examples/ensemble_file/duo.yaml"
    assert "duo.yaml" in run("-m", "multicolm", "validate", file)
    assert run("-m", "multicolm", "generate", file, "What is Dulerex made from?", "--trace")


def test_the_demo_shows_every_policy_and_a_table() -> None:
    shown = run("examples/demo/demo.py", "--per-kind", "1")
    from multicolm import catalog

    for name in catalog.names("policies"):
        assert name in shown
    assert "tokens/s" in shown


@pytest.mark.slow
def test_the_co_llm_example_goes_from_raw_data_to_a_report(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "examples/co-llm/run.sh", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "LIMIT": "12", "MULTICOLM": f"{sys.executable} -m multicolm"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "comparison" / "report.html").is_file()
    table = (tmp_path / "comparison" / "table.md").read_text(encoding="utf-8")
    for row in ("co-llm", "co-llm-15", "mlp-router", "cosd-tree", "cosd-rule", "oracle"):
        assert row in table


@pytest.mark.slow
def test_the_any_tokenizer_example_compares_models_of_three_vocabularies(tmp_path: Path) -> None:
    questions = (ROOT / "registry/tiny/questions/train.jsonl").read_text(encoding="utf-8")
    some = tmp_path / "some.jsonl"
    some.write_text("".join(questions.splitlines(keepends=True)[::12]), encoding="utf-8")
    done = subprocess.run(
        ["sh", "examples/any-tokenizer/run.sh", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={
            **os.environ,
            "DATA": str(some),
            "LIMIT": "6",
            "MULTICOLM": f"{sys.executable} -m multicolm",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "bridge generalist - facts: boundary (81 % of the tokens" in done.stdout
    for folder in ("comparison", "exact/comparison"):
        assert "co-llm" in (tmp_path / folder / "table.md").read_text(encoding="utf-8")


def test_the_harness_judges_the_embedded_models_by_the_tasks_of_the_example(tmp_path: Path) -> None:
    shown = run(
        *("-m", "multicolm", "eval", "tiny", "--tasks", "tiny_answer,tiny_text", "--limit", "4"),
        *("--include-path", "examples/lm-eval", "--policy", "average", "--out", str(tmp_path)),
    )
    assert "exact_match (last-answer)" in shown
    assert "average           joint" in shown
    assert (tmp_path / "lm_eval.md").is_file()
