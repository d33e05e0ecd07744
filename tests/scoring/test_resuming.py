"""Scoring that is stopped, goes on, is shared, or meets damage ends with the same bytes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from score_worlds import contents, inodes, records, table, tables, write

from multicolm import Ensemble
from multicolm.errors import ArtefactError, InputError, ModelError
from multicolm.files import locked, write_whole
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_prompt_digests, load_table, read_index

SHARD = 12


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", records(40))


def run(data: Path, out: Path, ensemble: Ensemble | None = None, **settings):
    chosen = ensemble or tables("base", "left", "right")
    return score(chosen, open_corpus(data), out, shard_positions=SHARD, **settings)


def in_child(work) -> int:
    """Call ``work`` in a forked process; returns its id at once."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- stops ---------------------------------------------------------------------------------------


def test_a_table_that_was_killed_again_and_again_is_that_of_an_undisturbed_run(
    tmp_path, data
) -> None:
    started = time.perf_counter()
    run(data, tmp_path / "whole")
    usual = time.perf_counter() - started
    out, chance, kills, finished = tmp_path / "killed", random.Random(0), 0, {}
    for _ in range(200):
        child = in_child(lambda: run(data, out))
        time.sleep(chance.uniform(0.0, usual / 4))
        os.kill(child, signal.SIGKILL)
        if exit_code(child) == 0:
            break  # too late: it is done
        kills += 1
        now = inodes(out) if out.exists() else {}
        assert finished.items() <= now.items(), "what was finished is not written again"
        finished = now
        if kills == 25:
            break
    assert kills >= 20
    run(data, out)
    assert finished.items() <= inodes(out).items()
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_that_is_stopped_again_and_again_comes_to_the_same_end(tmp_path, data) -> None:
    whole = run(data, tmp_path / "whole")
    out, calls = tmp_path / "out", 0

    def stop_after(n):
        def stop(_):
            nonlocal calls
            calls += 1
            if calls == n:
                raise KeyboardInterrupt

        return stop

    n_stops, done = 0, False
    while not done:
        calls = 0
        try:
            # The first call tells what is there already.
            run(data, out, on_progress=stop_after(2 + n_stops % 3))
            done = True
        except KeyboardInterrupt:
            assert read_index(out).files == {}, "an unfinished table does not claim to be one"
            n_stops += 1
    assert n_stops >= 10
    assert read_index(out) == whole
    assert contents(out) == contents(tmp_path / "whole")


def test_an_unfinished_table_is_not_read(tmp_path, data) -> None:
    def stop(progress):
        if progress.done == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", on_progress=stop)
    assert len(inodes(tmp_path / "out")) == 4 * len(read_index(tmp_path / "out").shards)
    with pytest.raises(
        ArtefactError, match=r"is not finished.*[Rr]epeat the same `multicolm score`"
    ):
        load_table(tmp_path / "out")
    with pytest.raises(ArtefactError, match="is not finished"):
        load_prompt_digests(tmp_path / "out")


@pytest.mark.parametrize("nth", [1, 2, 7, 20])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, data, monkeypatch, call, nth) -> None:
    run(data, tmp_path / "whole")
    out, real, calls = tmp_path / "out", getattr(os, call), 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            run(data, out)
    half = contents(out)
    whole = contents(tmp_path / "whole")
    assert len(half) == nth - 1
    assert {n: c for n, c in half.items() if n != "index.json"}.items() <= whole.items()
    before = inodes(out)
    run(data, out)
    assert contents(out) == whole
    assert before.items() <= inodes(out).items()


def test_a_file_that_could_not_be_replaced_is_as_it_was(tmp_path, monkeypatch) -> None:
    write_whole(tmp_path / "a", "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "a", "after")
    assert contents(tmp_path) == {"a": b"before"}


def test_scoring_again_writes_nothing_again(tmp_path, data) -> None:
    index = run(data, tmp_path / "out")
    before, bytes_before = inodes(tmp_path / "out"), contents(tmp_path / "out")
    seen = []
    assert run(data, tmp_path / "out", on_progress=seen.append) == index
    assert inodes(tmp_path / "out") == before and contents(tmp_path / "out") == bytes_before
    assert seen[-1].done == seen[-1].total == 3 * index.n_positions


def test_progress_grows_to_its_total_and_names_every_model(tmp_path, data) -> None:
    seen = []
    index = run(data, tmp_path / "out", on_progress=seen.append)
    assert [p.done for p in seen] == sorted({p.done for p in seen})
    assert {p.model for p in seen} == {"base", "left", "right"}
    assert {p.total for p in seen} == {3 * index.n_positions} == {seen[-1].done}


# --- other models and other data -----------------------------------------------------------------


def test_an_assistant_that_is_added_is_the_only_one_scored(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out, tables("base", "left"))
    before = inodes(out)
    run(data, out)
    after = inodes(out)
    assert before.items() <= after.items()
    new = after.keys() - before.keys()
    assert new and all(name.startswith("right/") for name in new)
    run(data, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_assistant_that_comes_back_is_not_scored_again(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    before = inodes(out)
    run(data, out, tables("base", "left"))
    assert load_table(out).models == ("base", "left")
    run(data, out)
    assert inodes(out) == before and load_table(out).models == ("base", "left", "right")


def test_another_order_of_assistants_is_the_same_scores_in_another_order(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    before, one = inodes(out), load_table(out)
    run(data, out, tables("base", "right", "left", seeds=(0, 2, 1)))
    assert inodes(out) == before
    other = load_table(out)
    assert other.models == ("base", "right", "left")
    assert torch.equal(other.gold_logprobs, one.gold_logprobs[:, [0, 2, 1]])
    assert other.identities == ("table:0", "table:2", "table:1")
    chosen = load_table(out, ["base", "left"])
    assert torch.equal(chosen.top1_ids, one.top1_ids[:, :2])


def test_another_base_model_is_refused(tmp_path, data) -> None:
    """Its shards would look the same, and every score would have been written over."""
    out = tmp_path / "out"
    run(data, out, tables("first", "left", "right"))
    before = contents(out)
    with pytest.raises(ArtefactError, match=r"the base model 'first'.* this ensemble's is 'left'"):
        run(data, out, tables("left", "first", "right", seeds=(1, 0, 2)))
    assert contents(out) == before
    with pytest.raises(ArtefactError, match=r"holds scores of first, left, right .*left, first"):
        load_table(out, ["left", "first"])


def test_a_base_model_under_a_new_name_is_the_only_one_scored(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    before = inodes(out)
    run(data, out, tables("renamed", "left", "right"))
    assert before.items() <= inodes(out).items()
    assert {name.split("/")[0] for name in inodes(out).keys() - before.keys()} == {"renamed"}


def test_other_data_is_refused_with_both_digests(tmp_path, data) -> None:
    out = tmp_path / "out"
    index = run(data, out)
    other = write(tmp_path / "other.jsonl", records(40, seed=1))
    before = contents(out)
    with pytest.raises(ArtefactError) as caught:
        run(other, out)
    digests = (index.digest[:12], open_corpus(other).digest()[:12])
    assert all(digest in str(caught.value) for digest in digests)
    assert "data.jsonl" in str(caught.value) and "choose another folder" in str(caught.value)
    with pytest.raises(ArtefactError, match=r"end of text counted.*end of text left off"):
        run(data, out, end_of_text=False)
    with pytest.raises(ArtefactError, match="shards of other sizes"):
        score(tables("base", "left", "right"), open_corpus(data), out, shard_positions=SHARD + 9)
    assert contents(out) == before


def test_a_model_with_other_weights_under_the_same_name_is_scored_anew(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    before = inodes(out)
    changed = Ensemble([table("base", 0), table("left", 9), table("right", 2)])
    run(data, out, changed)
    rewritten = {n.split("/")[0] for n, i in inodes(out).items() if before[n] != i}
    assert rewritten == {"left"}
    run(data, tmp_path / "whole", changed)
    assert contents(out) == contents(tmp_path / "whole")


def test_another_precision_is_scored_anew(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    before = inodes(out)
    other = tables("base", "left", "right")
    other.backends[1].precision = "bfloat16"
    run(data, out, other)
    assert {n.split("/")[0] for n, i in inodes(out).items() if before[n] != i} == {"left"}
    assert read_index(out).models[1].precision == "bfloat16"


def test_features_that_are_asked_for_later_are_added_to_those_that_are_there(
    tmp_path, data
) -> None:
    out = tmp_path / "out"

    def ensemble():
        return tables("base", "left", hidden=True)

    run(data, out, ensemble(), features=["hidden"])
    before = inodes(out)
    run(data, out, ensemble())
    assert inodes(out) == before and set(load_table(out).base) == {"hidden"}
    run(data, out, ensemble(), features=["topk"], top_k=3)
    assert set(load_table(out).base) == {"hidden", "topk"}
    changed = {n.split("/")[0] for n, i in inodes(out).items() if before[n] != i}
    assert changed == {"base"}
    before = inodes(out)
    run(data, out, ensemble(), features=["topk"], top_k=2)
    assert inodes(out) == before and load_table(out).feature("topk").shape[1] == 3
    run(data, out, ensemble(), features=["topk"], top_k=5)
    assert load_table(out).feature("topk").shape[1] == 5


# --- several processes ---------------------------------------------------------------------------


def test_two_processes_in_one_folder_are_kept_apart(tmp_path, data) -> None:
    out = tmp_path / "out"
    with locked(out), pytest.raises(InputError, match="another process is at work here"):
        run(data, out)

    def refused():
        with pytest.raises(InputError, match="another process is at work here"):
            run(data, out)

    with locked(out):
        assert exit_code(in_child(refused)) == 0
    run(data, out)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_several_ranks_give_the_bytes_of_one(tmp_path, data, n_ranks) -> None:
    run(data, tmp_path / "whole")
    out = tmp_path / "out"
    barrier = multiprocessing.get_context("fork").Barrier(n_ranks, timeout=60)

    def work(rank):
        return lambda: run(data, out, rank=rank, n_ranks=n_ranks, wait=barrier.wait)

    children = [in_child(work(rank)) for rank in range(1, n_ranks)]
    index = run(data, out, rank=0, n_ranks=n_ranks, wait=barrier.wait)
    assert [exit_code(child) for child in children] == [0] * (n_ranks - 1)
    assert contents(out) == contents(tmp_path / "whole")
    assert index == read_index(out) and len(index.shards) > 2 * n_ranks
    # Once more, with a damaged file that belongs to the last one.
    broken = out / "left" / f"{n_ranks - 1:05d}.safetensors"
    flip(broken)
    children = [in_child(work(rank)) for rank in range(1, n_ranks)]
    run(data, out, rank=0, n_ranks=n_ranks, wait=barrier.wait)
    assert [exit_code(child) for child in children] == [0] * (n_ranks - 1)
    assert contents(out) == contents(tmp_path / "whole")


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_table(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"key": "0" * 32})


def with_nan(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["entropies"][2] = float("nan")
    save_file(tensors, path, metadata)


DAMAGE = {
    flip: "has changed since it was written",
    truncate: "is damaged",
    empty: "is damaged",
    of_another_table: "is of other data or another model",
    with_nan: "has changed since it was written",
    Path.unlink: "is missing",
}


@pytest.mark.parametrize(
    ("damage", "part"),
    # Texts hold no numbers that could be NaN.
    [(d, p) for d in DAMAGE for p in ("text", "right") if (d, p) != (with_nan, "text")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_file_is_refused_in_one_sentence_and_scoring_again_mends_it_alone(
    tmp_path, data, damage, part
) -> None:
    out = tmp_path / "out"
    run(data, out)
    whole, before = contents(out), inodes(out)
    name = f"{part}/00002.safetensors"
    damage(out / name)
    with pytest.raises(ArtefactError) as caught:
        load_table(out)
    message = str(caught.value)
    assert str(out / name) in message and DAMAGE[damage] in message and "\n" not in message
    assert "epeat the same `multicolm score`" in message
    run(data, out)
    assert contents(out) == whole
    assert {n for n, i in inodes(out).items() if before[n] != i} == {name}


def test_nan_in_a_file_that_the_index_does_not_know_better_is_refused(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    name = "left/00001.safetensors"
    with_nan(out / name)
    index = json.loads((out / "index.json").read_text())
    from multicolm.files import sha256

    index["files"][name] = sha256(out / name)
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtefactError, match=r"left/00001\.safetensors: 'entropies' holds NaN"):
        load_table(out)


def test_damage_is_not_taken_for_the_truth_when_an_assistant_is_added(tmp_path, data) -> None:
    """The index of the larger table used to be written over the damaged file's new digest."""
    out = tmp_path / "out"
    run(data, out, tables("base", "left"))
    flip(out / "base/00001.safetensors")
    run(data, out)
    run(data, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\x01",
        '{"format": 1}',
        "[" * 100_000,
        lambda d: {**d, "shards": 3},
        lambda d: {**d, "models": []},
        lambda d: {**d, "shards": []},
        lambda d: {**d, "models": [{"name": "base"}]},
        lambda d: {**d, "shards": [{"first": "x", "n_examples": 1, "n_positions": 2}]},
        lambda d: {k: v for k, v in d.items() if k != "digest"},
        lambda d: {**d, "files": ["a"]},
        lambda d: {**d, "end_of_text": "maybe"},
    ],
)
def test_a_damaged_index_is_one_sentence_and_without_it_nothing_is_scored_again(
    tmp_path, data, content
) -> None:
    out = tmp_path / "out"
    run(data, out)
    whole, before = contents(out), inodes(out)
    path = out / "index.json"
    good = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(content(good)))
    for again in (lambda: load_table(out), lambda: run(data, out)):
        with pytest.raises(ArtefactError) as caught:
            again()
        message = str(caught.value)
        assert message.startswith(f"{path} is damaged (") or "has format" in message
        assert "\n" not in message and len(message) < 400
    path.unlink()
    run(data, out)
    assert contents(out) == whole and inodes(out) == before


def test_an_index_of_another_format_is_refused_by_name(tmp_path, data) -> None:
    out = tmp_path / "out"
    run(data, out)
    path = out / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    for again in (lambda: load_table(out), lambda: run(data, out)):
        with pytest.raises(ArtefactError, match="has format 7, and this version reads 1"):
            again()


def test_a_folder_without_an_index_is_no_score_table(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtefactError, match=r"is no score table.*multicolm score ENSEMBLE"):
            load_table(folder)


def test_a_model_that_fails_midway_costs_only_its_shard(tmp_path, data, monkeypatch) -> None:
    ensemble, calls = tables("base", "left", "right"), 0
    right = ensemble.backends[2]
    plain = right.open

    def failing(n_rows):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ModelError("model 'right' is out of memory.")
        return plain(n_rows)

    with monkeypatch.context() as patch:
        patch.setattr(right, "open", failing)
        with pytest.raises(ModelError, match="out of memory"):
            run(data, tmp_path / "out", ensemble)
    before = inodes(tmp_path / "out")
    assert len(before) > 6
    run(data, tmp_path / "out")
    run(data, tmp_path / "whole")
    assert before.items() <= inodes(tmp_path / "out").items()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
