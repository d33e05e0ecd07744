"""How often the servers of models were asked, as a comparison tells it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from duo_world import duo_ensemble
from fake_results import fake_comparison
from fake_vllm import FakeVllm
from remote_worlds import PROMPTS, ensemble, local, remote

import multicolm
from multicolm import Ensemble
from multicolm.cli import main
from multicolm.evaluation.answering import Answering
from multicolm.evaluation.compare import compare
from multicolm.evaluation.page import as_page
from multicolm.evaluation.results import Comparison, RowResult
from multicolm.evaluation.table import as_markdown

TASK = """
data: {test: test.jsonl, dev: dev.jsonl}
prompt: "{ask}"
gold: "{answer}"
max_new_tokens: 6
metric: {kind: contains}
"""
RECORDS = [{"ask": prompt, "answer": "x"} for prompt in PROMPTS]
SETTINGS: dict[str, Any] = {"batch_size": 2, "sweep": 0, "traces": 0, "random": False}


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm(local("facts"), "facts") as fake:
        yield fake


@pytest.fixture
def served(fake: FakeVllm) -> Ensemble:
    """The generalist in this process, the facts behind a server that has been looked at."""
    found = ensemble(remote(fake))
    found.generate("1", max_new_tokens=1)
    fake.requests.clear()
    return found


def heads(comparison: Comparison) -> list[str]:
    lines = as_markdown(comparison).splitlines()
    return next(line for line in lines if line.startswith("| ")).strip("| ").split(" | ")


def behind_servers() -> Comparison:
    """The comparison of the other tests, as if two of its models were behind servers."""
    comparison = fake_comparison()

    def called(row: RowResult) -> RowResult:
        counts = [0, *(use.forwards // 3 for use in row.uses[1:])]
        uses = tuple(replace(u, calls=n) for u, n in zip(row.uses, counts, strict=False))
        each = sum(counts) / row.n_tokens if row.uses else None
        return replace(row, uses=uses, calls_per_token=each)

    return replace(comparison, rows=tuple(called(row) for row in comparison.rows))


def test_calls_are_those_that_the_server_was_sent(
    served: Ensemble,
    fake: FakeVllm,
    make_task: Any,
    tmp_path: Path,
    reported: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The warm-up's requests are in no row.
    monkeypatch.setattr(Answering, "_first_use", lambda *_: None)
    names = ["cosd-rule", "max-confidence"]
    task = make_task(TASK, RECORDS)
    comparison = compare(served, names, task, out=tmp_path / "out", **SETTINGS)
    rows = {row.name: row for row in comparison.rows}
    assert [use.calls for use in rows["generalist alone"].uses] == [0, 0]
    assert rows["generalist alone"].calls_per_token == 0
    for name in ("facts alone", *names):
        base, facts = rows[name].uses
        assert base.calls == 0 and facts.calls is not None and facts.calls > 0
        assert rows[name].calls_per_token == facts.calls / rows[name].n_tokens
        assert rows[name].calls_per_token < 1  # a request is about several tokens
    total = sum(use.calls or 0 for row in comparison.rows for use in row.uses)
    assert total == len(fake.requests)
    assert heads(comparison)[-1] == "HTTP calls per token (of generalist / facts)"
    both = rows["max-confidence"].calls_per_token
    shown = f"{both:.2f} (0.00 / {both:.2f})"
    [line] = [x for x in as_markdown(comparison).splitlines() if "max-confidence |" in x]
    assert line.endswith(f"| {shown} |")
    # What was answered before is not asked again, and its calls are known.
    fake.requests.clear()
    again = compare(served, names, task, out=tmp_path / "out", **SETTINGS)
    assert (again.rows, fake.requests) == (comparison.rows, [])


def test_answers_of_before_calls_were_counted_leave_them_unknown(
    make_task: Any, tmp_path: Path, reported: Any
) -> None:
    duo, task, out = duo_ensemble(), make_task(), tmp_path / "out"
    settings = {**SETTINGS, "batch_size": 1}
    compare(duo, ["cosd-rule"], task, out=out, limit=2, **settings)
    ledger = out / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(', "calls": 0', ""))
    found = compare(duo, ["cosd-rule"], task, out=out, limit=2, **settings)
    for row in found.rows:
        assert {use.calls for use in row.uses} <= {None}
        assert row.calls_per_token is None
    whole = compare(duo, ["cosd-rule"], task, out=tmp_path / "new", limit=2, **settings)
    assert {row.calls_per_token for row in whole.rows if row.uses} == {0.0}


def test_the_table_of_models_in_this_process_has_no_calls() -> None:
    comparison = fake_comparison()
    counted = replace(
        comparison,
        rows=tuple(
            replace(
                row,
                uses=tuple(replace(use, calls=0) for use in row.uses),
                calls_per_token=0.0 if row.uses else None,
            )
            for row in comparison.rows
        ),
    )
    assert heads(counted) == [
        "exact match, % (95 %)",
        "gain over facts alone, points (95 %)",
        "p",
        "p (Holm)",
        "written by generalist / facts / sums / together, %",
        "tokens/s",
        "cost per token",
        "forwards of generalist / facts / sums",
    ]
    assert "HTTP" not in as_markdown(counted) + as_page(counted, [])
    assert as_markdown(counted) == as_markdown(comparison)
    assert as_page(counted, []) == as_page(comparison, [])


def test_table_and_page_show_the_calls_of_every_server() -> None:
    comparison = behind_servers()
    assert comparison.has_calls
    text, page = as_markdown(comparison), as_page(comparison, [])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count(" | ") for line in rows[: len(comparison.rows) + 2]}
    assert len(widths) == 1, "the oracle's row is as long as the others"
    for row in comparison.rows:
        if row.uses:
            assert row.calls_per_token is not None
            each = [(use.calls or 0) / row.n_tokens for use in row.uses]
            assert sum(each) == pytest.approx(row.calls_per_token)
            joined = " / ".join(f"{value:.2f}" for value in each)
            assert f"| {row.calls_per_token:.2f} ({joined}) |" in text
            assert f'<td data-value="{row.calls_per_token!r}">{row.calls_per_token:.2f}' in page
    assert "A forward pass or an HTTP call counts once" in text
    assert page.count('scope="col"><button') == 8
    start, end = page.index("<tbody>"), page.index("</tbody>")
    assert {line.count("<td") for line in page[start:end].split("<tr")[1:]} == {7}


def test_results_of_before_calls_were_counted_are_read() -> None:
    data = json.loads(json.dumps(behind_servers().as_json()))
    assert Comparison.from_json(data) == behind_servers()
    for row in data["rows"]:
        del row["calls_per_token"]
        for use in row["uses"]:
            del use["calls"]
    found = Comparison.from_json(data)
    assert found == fake_comparison()
    assert not found.has_calls


def test_the_command_prints_the_calls_where_there_are_some(
    served: Ensemble, make_task: Any, tmp_path: Path, reported: Any, capfd: Any, monkeypatch: Any
) -> None:
    task, out = str(make_task(TASK, RECORDS)), str(tmp_path / "out")
    monkeypatch.setattr(multicolm, "load", lambda source: served)
    arguments = ["compare", "tiny", "--policies", "max-confidence", "--task", task, "--out", out]
    more = ["--limit", "2", "--sweep", "0", "--traces", "0", "--no-random"]
    assert main([*arguments, *more]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[2].split()[-3:] == ["cost", "HTTP", "calls/token"]
    each = {row.name: row.calls_per_token for row in reported[-1][0].rows}
    for name, value in each.items():
        [line] = [line for line in shown if line.startswith(f"{name}  ")]
        assert value is None or line.split()[-1] == f"{value:.2f}"
