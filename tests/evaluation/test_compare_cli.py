"""``multicolm compare`` and ``multicolm ls tasks``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import multicolm
from multicolm.cli import main
from multicolm.evaluation.answering import Answering
from multicolm.evaluation.results import Comparison, read_comparison, read_traces


@pytest.fixture
def loaded(duo, monkeypatch):
    """The duo under the name of the embedded ensemble."""
    monkeypatch.setattr(multicolm, "load", lambda source: duo)
    return duo


@pytest.fixture
def arguments(make_task, tmp_path: Path) -> list[str]:
    task, out = str(make_task()), str(tmp_path / "out")
    return ["compare", "tiny", "--policies", "cosd-rule", "--task", task, "--out", out]


def test_a_table_and_the_page_s_path_come_on_stdout_and_progress_on_stderr(
    loaded, arguments, reported, capfd, tmp_path
) -> None:
    assert main([*arguments, "--policies", "confidence,max-confidence", "--no-random"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[:2] == ["exact-match on task, test split, 4 questions", ""]
    assert " ".join(lines[2].split()) == (
        "row exact-match 95 % interval gain over base_ alone p p (Holm) assistants tokens/s cost"
    )
    names = ["base_ alone", "helper alone", "cosd-rule", "confidence", "max-confidence"]
    assert [line.split("  ")[0] for line in lines[3:8]] == names
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    measured, ahead, *rows = err.splitlines()
    assert measured == "measuring how long it will take ..."
    assert ahead.startswith("Ahead: ") and "4 questions" not in ahead
    assert [line.partition(":")[0] for line in rows][:5] == names
    assert rows[-2:] == ["reading traces for the report ...", "writing the report ..."]
    assert "base_ alone: 25.0 % of 4 questions" in err
    [line] = [line for line in lines if line.startswith("helper alone")]
    assert line.split()[2:7] == ["25.0", "%", "0.6", "to", "80.6"]
    findings = reported[0][0].findings
    assert [line for line in lines if line in findings] == list(findings)
    assert findings[0].endswith(" 4 questions.")
    assert reported[0][0].ensemble == "tiny"


def test_what_all_models_write_together_is_no_assistant_s_share(
    loaded, make_task, reported, capfd, tmp_path
) -> None:
    arguments = ["compare", "tiny", "--policies", "average", "--task", str(make_task())]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    lines = capfd.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("average  ")]
    assert "  together  " in line and line.count("%") == 1


def test_json_is_the_comparison_alone(loaded, arguments, reported, capfd) -> None:
    assert main([*arguments, "--json", "--limit", "2", "--no-oracle", "--no-alone"]) == 0
    comparison = Comparison.from_json(json.loads(capfd.readouterr().out))
    assert comparison == reported[0][0]
    assert {row.kind for row in comparison.rows} <= {"policy", "random", "sweep"}
    assert {row.n_questions for row in comparison.rows} == {2}


def test_every_option_reaches_the_comparison(loaded, arguments, reported, capfd) -> None:
    more = ["--split", "dev", "--seed", "3", "--batch-size", "2", "--max-new-tokens", "4"]
    assert main([*arguments, *more, "--traces", "1", "--sweep", "0"]) == 0
    comparison, traces = reported[0]
    assert (comparison.split, comparison.seed) == ("dev", 3)
    assert comparison.settings["batch_size"] == 2
    assert comparison.settings["max_new_tokens"] == 4
    assert {answer.question for answer in traces} == {"one"}
    assert "sweep" not in {row.kind for row in comparison.rows}


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    loaded, arguments, reported, capfd, monkeypatch, tmp_path
) -> None:
    real, calls = Answering._chunk, []

    def third_time(self, plan, *rest):
        calls.append(plan.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, plan, *rest)

    monkeypatch.setattr(Answering, "_chunk", third_time)
    assert main(arguments) == 130
    err = capfd.readouterr().err
    assert f"What was finished is kept in {tmp_path / 'out'}; repeat the command to resume" in err
    assert main(arguments) == 0
    assert calls[:4] == ["base_ alone", "helper alone", "cosd-rule", "cosd-rule"]
    assert "base_ alone" not in calls[3:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policies", "cosd-rul"], "unknown policy 'cosd-rul'. Did you mean 'cosd-rule'?"),
        (["--policies", "single,,random"], "--policies: a name is missing beside a comma."),
        (["--task", "tiny-word"], "unknown task 'tiny-word'. Did you mean 'tiny-world'?"),
        (["--split", "tset"], "unknown split 'tset'. Did you mean 'test'?"),
        (["--limit", "0"], "limit must be 1 or more, got 0."),
        (["--policies", "cosd-rule"], "two rows of the table are called 'cosd-rule'"),
    ],
)
def test_a_mistake_is_one_sentence(loaded, arguments, capfd, more, message) -> None:
    assert main([*arguments, *more]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_tasks_are_listed(capfd) -> None:
    assert main(["ls", "tasks", "--json"]) == 0
    [task] = json.loads(capfd.readouterr().out)
    assert task["name"] == "tiny-world"
    assert task["splits"] == ["train", "dev", "test"]
    assert main(["ls", "tasks"]) == 0
    assert "exact-match" in capfd.readouterr().out


@pytest.mark.slow
def test_the_embedded_ensemble_is_compared_and_reported(tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "tiny", "--policies", "cosd-rule,average", "--task", "tiny-world"]
    assert main([*arguments, "--out", str(out), "--limit", "8", "--traces", "4"]) == 0
    capfd.readouterr()
    comparison = read_comparison(out)
    assert comparison.models == ("generalist", "facts", "math")
    assert all(identity.startswith("weights:") for identity in comparison.identities)
    names = [row.name for row in comparison.rows]
    assert names[:5] == ["generalist alone", "facts alone", "math alone", "cosd-rule", "average"]
    assert {"random as cosd-rule", "oracle"} <= set(names)
    traces = read_traces(out)
    assert len(traces) == 5 * 4
    for answer in traces:
        assert answer.text in "".join(token.text for token in answer.tokens)
        for token in answer.tokens:
            assert set(token.models) == set(comparison.models)
            if token.model in comparison.models:
                again = token.models[token.model]["logprob"]
                assert again == pytest.approx(token.logprob, abs=1e-3)
    assert (out / "report.html").is_file()
    assert (out / "table.md").is_file()


def test_a_dry_run_says_what_a_comparison_takes_and_writes_nothing(
    loaded, arguments, capfd, tmp_path
) -> None:
    assert main([*arguments, "--dry-run", "--sweep", "0"]) == 0
    out, err = capfd.readouterr()
    assert out == "" and not (tmp_path / "out").exists()
    # Two models, the policy, and the random baseline of the policy, on four questions.
    assert "Ahead: 4 rows, 16 answers: at most 80 new tokens, " in err
    assert " forward passes, " in err and err.endswith(" GiB of memory.\n")


@pytest.mark.parametrize("wrong", [["--split", "nix"], ["--policies", "cosd-rule"]])
def test_a_slip_in_split_or_names_is_found_before_a_model_is_loaded(
    monkeypatch, arguments, wrong: list[str], capfd
) -> None:
    monkeypatch.setattr(multicolm, "load", lambda source: pytest.fail("it was loaded"))
    assert main([*arguments, *wrong]) == 2
    assert capfd.readouterr().err.startswith(("Error: task", "Error: two rows"))
