"""Every example runs as printed."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

import multicolm
from multicolm.testing import check_policy

ROOT = Path(__file__).parents[2]
TASK = ROOT / "registry/tasks/tiny-world.yaml"
OWN = "examples/own_policy/surer.py:Surer"


def run(*arguments: str) -> str:
    done = forked.command(arguments, ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def short_task(n_tokens: int) -> str:
    """The task of the embedded world, whose answers end after some tokens."""
    text = TASK.read_text(encoding="utf-8")
    short = text.replace("max_new_tokens: 64", f"max_new_tokens: {n_tokens}")
    assert short != text
    return short.replace(": tiny/", f": {TASK.parents[1]}/tiny/")


def test_a_policy_of_ones_own_takes_at_most_thirty_lines() -> None:
    lines = (ROOT / "examples/own_policy/surer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30


def test_a_policy_of_ones_own_runs_from_the_command_line() -> None:
    shown = run(
        *("generate", "tiny", "What is Dulerex made from?", "--trace"),
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
    assert "duo.yaml" in run("validate", file)
    assert run("generate", file, "What is Dulerex made from?", "--trace")


def test_the_demo_shows_every_policy_and_a_table() -> None:
    few = ("--per-kind", "1", "--train", "100", "--max-new-tokens", "12")
    done = forked.program(ROOT / "examples/demo/demo.py", *few)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    from multicolm import catalog

    for name in catalog.names("policies"):
        assert name in shown
    assert "tokens/s" in shown


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every 24th training question, and short answers: figures are measured elsewhere."""
    folder = tmp_path_factory.mktemp("few")
    questions = (ROOT / "registry/tiny/questions/train.jsonl").read_text(encoding="utf-8")
    data = folder / "some.jsonl"
    data.write_text("".join(questions.splitlines(keepends=True)[::24]), encoding="utf-8")
    task = folder / "tiny-world.yaml"
    task.write_text(short_task(16), encoding="utf-8")
    return {"DATA": str(data), "TASK": str(task), "LIMIT": "6"}


@pytest.mark.slow
def test_the_co_llm_example_goes_from_raw_data_to_a_report(
    tmp_path: Path, few: dict[str, str]
) -> None:
    words = ["sh", "examples/co-llm/run.sh", str(tmp_path)]
    done = forked.script(words, ROOT, few)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "comparison" / "report.html").is_file()
    table = (tmp_path / "comparison" / "table.md").read_text(encoding="utf-8")
    for row in ("co-llm", "co-llm-15", "mlp-router", "cosd-tree", "cosd-rule", "oracle"):
        assert row in table


@pytest.mark.slow
def test_the_any_tokenizer_example_compares_models_of_three_vocabularies(
    tmp_path: Path, few: dict[str, str]
) -> None:
    words = ["sh", "examples/any-tokenizer/run.sh", str(tmp_path)]
    done = forked.script(words, ROOT, few)
    assert done.returncode == 0, done.stderr
    assert "bridge generalist - facts: boundary (81 % of the tokens" in done.stdout
    for folder in ("comparison", "exact/comparison"):
        assert "co-llm" in (tmp_path / folder / "table.md").read_text(encoding="utf-8")


def test_the_harness_judges_the_embedded_models_by_the_tasks_of_the_example(tmp_path: Path) -> None:
    shown = run(
        *("eval", "tiny", "--tasks", "tiny_answer,tiny_text", "--limit", "4"),
        *("--include-path", "examples/lm-eval", "--policy", "average", "--out", str(tmp_path)),
    )
    assert "exact_match (last-answer)" in shown
    assert "average           joint" in shown
    assert (tmp_path / "lm_eval.md").is_file()
