"""A comparison as files: whole, equal for equal inputs, and readable again."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_results import fake_comparison, fake_traces

from multicolm.errors import ArtefactError
from multicolm.evaluation.harness_results import HarnessFigure, HarnessResults
from multicolm.evaluation.page import as_page
from multicolm.evaluation.report import MissingPlotWarning, write_report
from multicolm.evaluation.results import Comparison, read_comparison, read_traces
from multicolm.evaluation.table import as_markdown, best
from multicolm.evaluation.wording import markup

FILES = ("results.json", "traces.jsonl", "table.md", "report.html", "pareto.png", "pareto.svg")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_file_is_written_and_nothing_else(tmp_path: Path) -> None:
    written = write_report(fake_comparison(), fake_traces(), tmp_path / "out")
    assert {path.name for path in written} == set(FILES)
    assert set(digests(tmp_path / "out")) == set(FILES)
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_equal_inputs_give_equal_bytes_in_another_process_too(tmp_path: Path) -> None:
    write_report(fake_comparison(), fake_traces(), tmp_path / "here")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from fake_results import fake_comparison, fake_traces\n"
        "from multicolm.evaluation.report import write_report\n"
        "write_report(fake_comparison(), fake_traces(), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "there")],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    comparison = fake_comparison()
    # Two halves of one character come back as the character.
    traces = [answer for answer in fake_traces() if answer.question != "odd-surrogate"]
    traces[0] = replace(traces[0], question="a line\u2028that no line feed\x85ends")
    write_report(comparison, traces, tmp_path)
    assert read_comparison(tmp_path) == comparison
    assert list(read_traces(tmp_path)) == traces


def test_without_matplotlib_all_but_the_figure_is_written(tmp_path: Path, monkeypatch) -> None:
    write_report(fake_comparison(), [], tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(MissingPlotWarning, match=r"pip install 'multicolm\[plot\]'"):
        written = write_report(fake_comparison(), fake_traces(), tmp_path)
    # A figure of an earlier comparison would speak of other numbers.
    assert {path.name for path in written} == set(digests(tmp_path)) == set(FILES[:4])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c, t: (replace(c, rows=(*c.rows, c.rows[0])), t),
            "two rows are named 'generalist'",
        ),
        (lambda c, t: (c, [replace(t[0], row="genralist")]), "Did you mean 'generalist'"),
        (
            lambda c, t: (c, [replace(t[0], tokens=(replace(t[0].tokens[0], model="fact"),))]),
            "unknown model 'fact'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    change, said: str, tmp_path: Path
) -> None:
    comparison, traces = change(fake_comparison(), fake_traces())
    with pytest.raises(ArtefactError, match=said):
        write_report(comparison, traces, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="the report cannot be written"):
        write_report(fake_comparison(), [], tmp_path / "file" / "out")


def test_the_table_has_every_row_with_its_interval_and_says_how_it_was_measured() -> None:
    comparison = fake_comparison()
    text = as_markdown(comparison)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for row in comparison.rows:
        line = next(line for line in rows if row.name == line.split("|")[1].strip(" ↳"))
        assert f"{100 * row.quality:.1f}" in line and f"{100 * row.low:.1f}" in line, row.name
    for fact in ("tiny-word-problems", comparison.digest, "temperature = 0.0", "torch 2.13.0"):
        assert fact in text
    for warning in comparison.warnings:
        assert warning.split(";")[0] in text
    for sentence in comparison.findings:
        assert markup(sentence) in text
    assert "gain over facts alone" in text and "p (Holm)" in text


def test_results_of_0_1_are_read_and_reported_again(tmp_path: Path) -> None:
    data = fake_comparison().as_json()
    for name in ("findings", "binary", "intervals", "timing"):
        del data[name]
    data["rows"] = [row for row in data["rows"] if row["name"] != "per-question oracle"]
    for row in data["rows"]:
        for name in ("p_holm", "p_question_oracle", "n_cut_off", "n_shared"):
            del row[name]
    old = Comparison.from_json(json.loads(json.dumps(data)))
    write_report(old, fake_traces(), tmp_path)
    assert read_comparison(tmp_path) == old
    text = (tmp_path / "table.md").read_text()
    assert "Best of 3 policies: cosd-rule, 80 %, 38.3 points more than facts alone" in text
    assert "0.001, both uncorrected: cosd-rule was picked as the highest of 3" in text
    for new in ("Holm", "Clopper", "One model per question"):
        assert new not in text


@pytest.mark.parametrize("kind", ["oracle", "random", "sweep"])
def test_only_models_alone_and_policies_can_be_the_best_of_a_column(kind) -> None:
    rows = [
        replace(row, quality=0.99, gain=0.5, cost=0.1, tokens_per_second=1e6)
        if row.kind == kind
        else row
        for row in fake_comparison().rows
    ]
    kinds = {row.name: row.kind for row in rows}
    for column, names in best(rows).items():
        assert names and {kinds[name] for name in names} <= {"model", "policy"}, column


def test_where_all_are_equal_nobody_is_best() -> None:
    same = {"quality": 0.4, "gain": 0.0, "cost": 1.0, "tokens_per_second": 10.0}
    rows = [replace(row, **same) for row in fake_comparison().rows]
    assert best(rows) == {"quality": set(), "gain": set(), "speed": set(), "cost": set()}
    # A gain that shows as +0.0 is none.
    one = [replace(row, gain=0.0004) if row.name == "cosd-rule" else row for row in rows]
    assert best(one)["gain"] == set()


def test_the_best_value_of_a_column_is_bold_and_the_oracle_is_not_in_the_running() -> None:
    comparison = fake_comparison()
    text = as_markdown(comparison)
    real = [row for row in comparison.rows if row.kind in ("model", "policy")]
    top = max(real, key=lambda row: row.quality)
    assert top.name in best(comparison.rows)["quality"]
    [line] = [line for line in text.splitlines() if f"| {top.name} |" in line]
    assert f"**{100 * top.quality:.1f}**" in line
    for oracle in ("oracle", "per-question oracle"):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {oracle}")]
        assert "**" not in line


def test_a_standard_error_of_zero_is_not_left_for_certainty() -> None:
    figure = HarnessFigure(
        *("facts", "model", {}, "", "arc", "1", 24, 0, "acc", "none", 1.0, 0.0, True, 1.0, 0),
    )
    results = HarnessResults("tiny", ("facts",), ("",), {}, {}, "", (figure,))
    page = as_page(fake_comparison(), [], results)
    for text in (results.as_markdown(), page):
        assert "is 0 where all answers are judged alike, which is no certainty" in text
    usual = replace(results, figures=(replace(figure, value=0.5, stderr=0.1),))
    assert usual.on_errors == "After ±, the standard error."
