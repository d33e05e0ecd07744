"""Several processes at one comparison come to the same as one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from duo_world import BASE, HELPER, QUESTIONS, TOKENS, duo_ensemble

from multicolm.errors import InputError
from multicolm.evaluation.answering import Answering
from multicolm.evaluation.compare import compare
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.results import Comparison

POLICIES = ["max-confidence", "cosd-rule", "average"]
TIMES = ("seconds", "tokens_per_second", "machine")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of nothing but results."""

    def write_report(comparison: Comparison, traces: Any, folder: Path) -> list[Path]:
        (folder / "results.json").write_text(json.dumps(comparison.as_json()))
        (folder / "traces.json").write_text(json.dumps([answer.as_json() for answer in traces]))
        return []

    monkeypatch.setattr("multicolm.evaluation.report.write_report", write_report)


@pytest.fixture
def task(make_task: Callable[..., Path]) -> Path:
    """Twelve questions, asked two at a time and kept by eight."""
    records = [{**q, "id": f"{q['id']}-{i}"} for i in range(5) for q in QUESTIONS]
    return make_task(records=records)


SETTINGS: dict[str, Any] = {"batch_size": 1, "seed": 3, "sweep": 2, "traces": 3}


def together(n_ranks: int, task: Path, out: Path) -> list[Comparison]:
    """A comparison by several threads, as processes would do it."""
    barrier = threading.Barrier(n_ranks, timeout=60)
    found: dict[int, Comparison] = {}
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = compare(
                duo_ensemble(),
                POLICIES,
                task,
                out=out,
                rank=rank,
                n_ranks=n_ranks,
                wait=lambda: barrier.wait() and None,
                **SETTINGS,
            )
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if failed:
        raise next(e for e in failed if not isinstance(e, threading.BrokenBarrierError))
    return [found[rank] for rank in range(n_ranks)]


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_several_come_to_the_same_as_one(n_ranks: int, task: Path, tmp_path: Path) -> None:
    alone = compare(duo_ensemble(), POLICIES, task, out=tmp_path / "one", **SETTINGS)
    shared = together(n_ranks, task, tmp_path / "many")
    for comparison in shared:
        assert without_times(comparison.as_json()) == without_times(alone.as_json())
        assert comparison.machine == f"{alone.machine}, {n_ranks} processes"
    traces = [(tmp_path / name / "traces.json").read_text() for name in ("one", "many")]
    assert traces[0] == traces[1]
    assert {row.kind for row in alone.rows} == {"model", "policy", "random", "sweep", "oracle"}
    assert not (tmp_path / "many/processes").exists()


@pytest.mark.usefixtures("written")
def test_each_answers_a_part_and_nothing_is_answered_twice(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[tuple[str, str]] = []
    real = Answering._answer

    def answer(self: Answering, plan: Any, key: str, *rest: Any) -> None:
        answered.append((threading.current_thread().name, key))
        real(self, plan, key, *rest)

    monkeypatch.setattr(Answering, "_answer", answer)
    together(2, task, tmp_path)
    keys = [key for _, key in answered]
    assert len(keys) == len(set(keys))
    by_thread = [sum(name == n for name, _ in answered) for n in {name for name, _ in answered}]
    assert len(by_thread) == 2 and max(by_thread) - min(by_thread) <= 2
    n_before = len(answered)
    together(3, task, tmp_path)
    assert len(answered) == n_before, "in another number, they find all that is done"


@pytest.mark.usefixtures("written")
def test_what_the_others_answered_is_kept_when_the_first_is_stopped(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[str] = []
    real = Answering._answer

    def answer(self: Answering, plan: Any, key: str, *rest: Any) -> None:
        if self.ledger.path == tmp_path / "ledger.jsonl" and len(answered) >= 2:
            raise KeyboardInterrupt
        real(self, plan, key, *rest)
        answered.append(key)

    monkeypatch.setattr(Answering, "_answer", answer)
    with pytest.raises(KeyboardInterrupt):
        together(2, task, tmp_path)
    assert len(answered) > 2
    assert (tmp_path / "processes/1/ledger.jsonl").is_file()
    before = list(answered)
    monkeypatch.setattr(Answering, "_answer", lambda *a: answered.append(a[2]) or real(*a))
    found = compare(duo_ensemble(), POLICIES, task, out=tmp_path, **SETTINGS)
    assert not set(before) & set(answered[len(before) :])
    monkeypatch.undo()
    alone = compare(duo_ensemble(), POLICIES, task, out=tmp_path / "one", **SETTINGS)
    assert without_times(found.as_json()) == without_times(alone.as_json())


def test_a_ledger_that_is_read_sees_what_is_written_only_when_it_is_read_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, {"run": 1}) as mine:
        mine.append("a", 1)
        with Ledger.open_to_read(path, {"run": 1}) as theirs:
            assert list(theirs) == ["a"]
            mine.append("b", 2)
            assert "b" not in theirs
            theirs.read_again()
            assert theirs.get("b") == 2
        with pytest.raises(InputError, match="holds another run"):
            Ledger.open_to_read(path, {"run": 2})
        before = path.read_bytes()
    path.write_bytes(before + b'{"key": "half')
    with Ledger.open_to_read(path, {"run": 1}) as theirs:
        assert list(theirs) == ["a", "b"]
    assert path.read_bytes().endswith(b'"half'), "who reads cuts nothing off"


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(task: Path, tmp_path: Path) -> None:
    for name, table in (("base_", BASE), ("helper", HELPER)):
        plain = {" ".join(k) if isinstance(k, tuple) else k: dict(v) for k, v in table.items()}
        data = {"tokens": TOKENS, "ends": ["<end>"], "table": plain}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    models = {n: {"backend": "table", "model": f"./{n}.yaml"} for n in ("base_", "helper")}
    file = tmp_path / "duo.yaml"
    file.write_text(yaml.safe_dump({"base_model": "base_", "models": models}, sort_keys=False))
    arguments = ["compare", str(file), "--policies", "cosd-rule", "--task", str(task), "--json"]
    arguments += ["--batch-size", "1", "--sweep", "1", "--traces", "2"]
    two, second = forked.job(2, [*arguments, "--out", str(tmp_path / "two")], Path.cwd())
    assert second.returncode == 0 and not second.stdout
    one = forked.command([*arguments, "--out", str(tmp_path / "one")], Path.cwd())
    found = []
    for name, done in (("two", two), ("one", one)):
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1, "one of them speaks"
        found.append(json.loads(lines[0]))
        assert (tmp_path / name / "report.html").is_file()
    assert found[0]["machine"].endswith(", 2 processes")
    assert without_times(found[0]) == without_times(found[1])
