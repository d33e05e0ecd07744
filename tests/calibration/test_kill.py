"""A tuning that is killed at random moments, with no chance to tidy up, comes to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import finish, kill
from score_worlds import contents
from tables import TOKENS, random_table

from multicolm.calibration.tune import tune
from multicolm.ensemble import Ensemble
from multicolm.evaluation.answering import NamedPolicy
from multicolm.evaluation.task import load_task
from multicolm.policy.threshold import ConfidencePolicy

N_KILLS = 24
KILLS_OF_ONE_RUN = 6
TEXT = """
data: {dev: NAME-dev.jsonl}
prompt: "{ask}"
gold: "{answer}"
max_new_tokens: 3
metric: {kind: contains}
"""

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # The child touches nothing that another thread may hold.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


@pytest.fixture
def start(make_task) -> Callable[[Path], int]:
    """Starts tuning on two tasks in a child process."""
    letters = TOKENS[:3]
    records = [{"ask": a + b, "answer": f"d{a}"} for a in letters for b in letters]
    tasks = [
        load_task(make_task(name, some, text=TEXT))
        for name, some in (("one", records[:5]), ("two", records[-1:]))
    ]
    ensemble = Ensemble([random_table("p", 4), random_table("q", 5)])
    policy = NamedPolicy("confidence", ConfidencePolicy())

    def fork(out: Path) -> int:
        child = os.fork()
        if child:
            return child
        try:
            torch.set_num_threads(1)
            tune(ensemble, policy, tasks, out, budget=0.4, batch_size=1)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    return fork


def chunks(out: Path) -> list[str]:
    """What is finished, by the ledgers: of each row and task, which questions."""
    found = []
    for path in sorted(out.glob(".tune/*/ledger.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            key = json.loads(line).get("key", "") if line.endswith(b"\n") else ""
            if key.startswith("chunk "):
                found.append(f"{path.parent.name} {key}")
    return found


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_byte_and_nothing_finished_is_done_again(
    start, tmp_path: Path
) -> None:
    # The first run is slower than those after it, and a kill that comes too late is none.
    seconds = min(finish(start(tmp_path / name)) for name in ("first", "whole"))
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"README.md", "config.json", "policy.yaml", "provenance.json"}
    chance = random.Random(0)
    n_runs = n_kills = n_midway = 0
    while n_kills < N_KILLS:
        n_runs += 1
        out = tmp_path / f"killed {n_runs}"
        before: list[str] = []
        for _ in range(KILLS_OF_ONE_RUN):
            status = kill(start(out), chance.uniform(0, seconds))
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
            n_kills += 1
            if (out / "policy.yaml").exists():  # Killed as it was clearing up.
                continue
            after = chunks(out)
            assert len(after) == len(set(after)), "what was finished was done again"
            assert set(before) <= set(after), "what was finished is gone"
            n_midway += len(after) > len(before)
            before = after
        else:
            finish(start(out))
        assert contents(out) == expected
    # Some of them came between the first answer and the last.
    assert n_midway > 0


def test_two_at_once_in_one_folder_are_refused(start, tmp_path: Path, capfd) -> None:
    from multicolm.files import locked

    with locked(tmp_path / "out"):
        assert os.waitstatus_to_exitcode(os.waitpid(start(tmp_path / "out"), 0)[1]) == 1
    assert "another process is at work here" in capfd.readouterr().err


def test_killed_between_the_checkpoint_and_clearing_up_it_is_cleared_up(
    start, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    out = tmp_path / "out"
    assert os.WIFSIGNALED(os.waitpid(start(out), 0)[1])
    assert (out / "policy.yaml").exists() and (out / ".tune").exists()
    monkeypatch.undo()
    finish(start(out))
    assert not (out / ".tune").exists()
