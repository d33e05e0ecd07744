"""A comparison that is killed at random moments, with no chance to tidy up, comes to the same."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish, kill
from tables import TOKENS, random_table

from multicolm.ensemble import Ensemble
from multicolm.evaluation.compare import compare
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.task import load_task
from multicolm.files import write_whole

TASK = """
data: {test: test.jsonl}
prompt: "{ask}"
gold: "{answer}"
completion: "{answer}"
max_new_tokens: 6
metric: {kind: contains}
"""
N_KILLS = 24
KILLS_OF_ONE_RUN = 6
TIMES = ("seconds", "tokens_per_second")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # The child touches nothing that another thread may hold.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def start(make_task, monkeypatch) -> Callable[[Path], int]:
    """Starts a comparison in a child process, which leaves its results in ``results.json``."""
    records = [{"ask": a + b, "answer": f"d{a}"} for a in TOKENS[:3] for b in TOKENS[:3]]
    task = load_task(make_task(TASK, records))
    ensemble = Ensemble([random_table(name, seed) for seed, name in enumerate(("p", "q", "r"))])

    def write_report(comparison: Any, traces: Any, folder: Path) -> list[Path]:
        found = [comparison.as_json(), [answer.as_json() for answer in traces]]
        write_whole(folder / "results.json", json.dumps(found))
        return []

    monkeypatch.setattr("multicolm.evaluation.report.write_report", write_report)

    def fork(out: Path) -> int:
        child = os.fork()
        if child:
            return child
        try:
            torch.set_num_threads(1)
            compare(ensemble, ["cosd-rule"], task, out=out, seed=5, batch_size=1, sweep=1, traces=2)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    return fork


def read(out: Path) -> Any:
    return without_times(json.loads((out / "results.json").read_text()))


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing_but_times(start, tmp_path: Path) -> None:
    # The first run is slower than those after it, and a kill that comes too late is none.
    seconds = min(finish(start(tmp_path / name)) for name in ("first", "whole"))
    expected = read(tmp_path / "whole")
    chance = random.Random(0)
    n_runs = n_kills = n_midway = 0
    while n_kills < N_KILLS:
        n_runs += 1
        out = tmp_path / f"killed {n_runs}"
        n_lines = 0
        for _ in range(KILLS_OF_ONE_RUN):
            status = kill(start(out), chance.uniform(0, seconds))
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
            n_kills += 1
            ledger = out / "ledger.jsonl"
            before, n_lines = n_lines, ledger.read_bytes().count(b"\n") if ledger.exists() else 0
            assert n_lines >= before, "a line that was there is gone"
            n_midway += n_lines > before
        else:
            finish(start(out))
        assert read(out) == expected
    # Some of them came between the first answer and the last.
    assert n_midway > 0


def test_two_at_once_in_one_folder_are_refused(start, tmp_path: Path, capfd) -> None:
    with Ledger.open(tmp_path / "out" / "ledger.jsonl", {}):
        assert os.waitstatus_to_exitcode(os.waitpid(start(tmp_path / "out"), 0)[1]) == 1
    assert "another process is at work here" in capfd.readouterr().err
