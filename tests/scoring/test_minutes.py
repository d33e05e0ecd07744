"""A stop within a shard costs what was read since the last save; progress leaves that out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from children import kill
from score_worlds import HiddenTable, contents, records, table, tables, write

from multicolm import Ensemble
from multicolm.backend.base import ModelOutput
from multicolm.backend.table import TableModel, TableSession
from multicolm.errors import ModelError
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.pieces import Pieces
from multicolm.scoring.score import Progress, score
from multicolm.scoring.store import TableFiles, read_index

N_TOKENS = 6  # of a pass


class Slow(TableModel):
    """A table that writes down what it reads, and takes its time."""

    def __init__(self, model: TableModel, log: Path, seconds: float) -> None:
        self.__dict__.update(model.__dict__)
        self.log, self.seconds = log, seconds

    def open(self, n_rows: int) -> TableSession:
        return _SlowSession(self, n_rows)


class _SlowSession(TableSession):
    def feed(self, rows, tokens, n_last, *, hidden=False) -> ModelOutput:  # type: ignore[no-untyped-def]
        output = super().feed(rows, tokens, n_last, hidden=hidden)
        time.sleep(self._model.seconds)  # type: ignore[attr-defined]
        with self._model.log.open("a") as stream:  # type: ignore[attr-defined]
            stream.write(f"{sum(map(len, tokens))}\n")
        return output


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", records(40))


def run(data: Path, out: Path, ensemble: Ensemble, **settings):
    """One shard, read in many passes."""
    return score(ensemble, open_corpus(data), out, batch_tokens=N_TOKENS, **settings)


def slow(log: Path, seconds: float = 0.0) -> Ensemble:
    return Ensemble([Slow(table("base", 0), log, seconds), table("left", 1)])


def n_read(log: Path) -> int:
    return sum(map(int, log.read_text().split())) if log.exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_killed_within_a_shard_no_more_is_read_again_than_since_the_last_save(
    tmp_path, data
) -> None:
    run(data, tmp_path / "whole", slow(tmp_path / "all"))
    log, out, n_kills = tmp_path / "log", tmp_path / "out", 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            # Every pass is saved, so that at most the one at work is lost.
            run(data, out, slow(log, 0.02), save_every=0.0)
            os._exit(0)
        if not os.WIFSIGNALED(kill(child, 0.25)):
            break
        n_kills += 1
    assert n_kills >= 2
    run(data, out, slow(log))
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob("*.partial"))
    # A batch that was begun is read from its beginning; here each is one or two passes.
    assert n_read(log) <= n_read(tmp_path / "all") + n_kills * 2 * N_TOKENS


def test_a_shard_that_was_interrupted_goes_on_where_it_was(tmp_path, data) -> None:
    log, out, n_passes = tmp_path / "log", tmp_path / "out", 0

    def stop(_):
        nonlocal n_passes
        n_passes += 1
        if n_passes == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, out, slow(log), on_progress=stop)
    assert list(out.rglob("*.partial")), "saved as it was stopped, though no time had passed"
    seen: list[Progress] = []
    run(data, out, slow(log), on_progress=seen.append)
    run(data, tmp_path / "whole", slow(tmp_path / "all"))
    assert contents(out) == contents(tmp_path / "whole")
    assert n_read(log) <= n_read(tmp_path / "all") + 2 * N_TOKENS
    assert seen[-1].before > 0 and seen[-1].done == seen[-1].total


def test_pieces_of_another_reading_are_thrown_away(tmp_path, data) -> None:
    """Other batches round differently; numbers of both in one shard would be of neither."""
    log, out = tmp_path / "log", tmp_path / "out"

    def stop(progress):
        if progress.done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, out, slow(log), on_progress=stop)
    before = n_read(log)
    score(slow(log), open_corpus(data), out, batch_tokens=N_TOKENS + 1)
    run(data, tmp_path / "whole", slow(tmp_path / "all"))
    assert n_read(log) - before == n_read(tmp_path / "all")


def test_a_model_that_fails_keeps_what_it_has_read(tmp_path, data) -> None:
    log, out, n_passes = tmp_path / "log", tmp_path / "out", 0

    def fail(_):
        nonlocal n_passes
        n_passes += 1
        if n_passes == 12:
            raise ModelError("model 'base' is out of memory.")

    with pytest.raises(ModelError):
        run(data, out, slow(log), on_progress=fail)
    assert list(out.rglob("*.partial"))


def test_what_is_read_is_saved_when_the_time_has_come(tmp_path, data) -> None:
    index = run(data, tmp_path / "t", tables("base", "left"))
    now = 0.0
    pieces = Pieces(
        TableFiles(tmp_path / "t", index),
        "base",
        0,
        stage="tokens",
        n_positions=100,
        facts="",
        every=20.0,
        clock=lambda: now,
    )
    saved = []
    for second in range(0, 100, 7):
        now = float(second)
        pieces.add(torch.tensor([second]), {"known": torch.ones(1)})
        saved.append(len(list((tmp_path / "t").rglob("*.partial"))))
    # At 21, 42, 63 and 84 seconds: never is more than 27 seconds' work unsaved.
    assert saved == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    again = Pieces(
        TableFiles(tmp_path / "t", index),
        "base",
        0,
        stage="tokens",
        n_positions=100,
        facts="",
        every=20.0,
    )
    assert again.columns.filled.nonzero()[:, 0].tolist() == list(range(0, 85, 7))
    again.remove()
    assert not list((tmp_path / "t").rglob("*.partial"))


def test_progress_is_told_after_every_pass_and_leaves_out_what_was_there(tmp_path, data) -> None:
    out = tmp_path / "out"
    seen: list[Progress] = []
    index = run(data, out, tables("base", "left"), on_progress=seen.append)
    assert seen[0].done == seen[0].before == 0 and len(seen) > 30
    seen.clear()
    run(data, out, tables("base", "left", "right"), on_progress=seen.append)
    assert {progress.before for progress in seen} == {2 * index.n_positions}
    assert seen[0].done == 2 * index.n_positions and seen[-1].done == 3 * index.n_positions
    assert {progress.model for progress in seen[1:]} == {"right"}


def test_models_whose_scores_are_whole_need_not_be_there(tmp_path, data) -> None:
    """Hidden states are added by the base model alone."""
    out, names = tmp_path / "out", ["base", "left", "right"]
    whole = Ensemble([HiddenTable(table("base", 0)), table("left", 1), table("right", 2)])
    run(data, out, whole)
    alone = Ensemble([HiddenTable(table("base", 0))])
    run(data, out, alone, features=["hidden"], models=names)
    run(data, tmp_path / "whole", whole, features=["hidden"])
    assert contents(out) == contents(tmp_path / "whole")
    assert [model.name for model in read_index(out).models] == names
