"""A score table read block by block is the one that is loaded whole; and roll-outs beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from score_worlds import records, tables, write
from tables import random_table

from multicolm import Ensemble
from multicolm.errors import ArtefactError
from multicolm.score_table import ScoreTable
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import Rollouts, StoredTable, TableFiles, load_table, read_index

NAN = float("nan")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A table of three models in several shards, with hidden states."""
    data = write(tmp_path / "d.jsonl", records(30))
    ensemble = tables("base", "left", "right", hidden=True)
    score(ensemble, open_corpus(data), tmp_path / "t", features=["hidden"], shard_positions=40)
    return tmp_path / "t"


def equal(one: ScoreTable, other: ScoreTable) -> bool:
    pairs = [(one.columns(), other.columns()), (one.base, other.base)]
    return all(
        a.keys() == b.keys()
        and all(torch.equal(a[n].nan_to_num(-7), b[n].nan_to_num(-7)) for n in a)
        for a, b in pairs
    )


def joined(blocks: list[ScoreTable]) -> ScoreTable:
    columns = {n: torch.cat([b.columns()[n] for b in blocks]) for n in blocks[0].columns()}
    base = {n: torch.cat([b.base[n] for b in blocks]) for n in blocks[0].base}
    return replace(blocks[0], **columns, base=base)


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_blocks_one_after_another_are_the_whole_table(folder, size) -> None:
    stored, whole = StoredTable(folder), load_table(folder)
    blocks = list(stored.blocks(size))
    assert max(map(len, blocks)) <= size and len(blocks) == stored.n_blocks(size)
    assert len(stored) == len(whole) == sum(map(len, blocks))
    assert equal(joined(blocks), whole)
    assert stored.models == whole.models and stored.costs == whole.costs
    assert (stored.identities, stored.digest) == (whole.identities, whole.digest)


def test_blocks_in_any_order_are_the_same_blocks(folder) -> None:
    stored = StoredTable(folder, ["base", "right"])
    plain = list(stored.blocks(9))
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(1)).tolist()
    for number, block in zip(order, stored.blocks(9, order), strict=True):
        assert equal(block, plain[number])
        assert block.models == ("base", "right")


def test_a_table_in_memory_has_blocks_too(folder) -> None:
    whole = load_table(folder)
    blocks = list(whole.blocks(13))
    assert len(blocks) == whole.n_blocks(13) and equal(joined(blocks), whole)
    assert equal(next(iter(whole.blocks(13, [2]))), blocks[2])


def test_blocks_of_bridged_models_are_the_merged_spans(tmp_path) -> None:
    words = (("base", 1, ("a", "b", "c", ".")), ("other", 2, ("a", "ab", "b", "c", "bc", ".")))
    data = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "abcab" * n} for n in (1, 4)])
    ensemble = Ensemble([random_table(*word) for word in words])
    score(ensemble, open_corpus(data), tmp_path / "t", shard_positions=1)
    stored, whole = StoredTable(tmp_path / "t"), load_table(tmp_path / "t")
    assert len(stored) == len(whole) < read_index(tmp_path / "t").n_positions
    assert equal(joined(list(stored.blocks(3))), whole)


def test_a_stored_table_refuses_what_has_changed(folder) -> None:
    path = folder / "right" / "00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    assert len(StoredTable(folder, ["base", "left"]))
    with pytest.raises(ArtefactError, match="has changed since it was written"):
        StoredTable(folder)


MEMORY = """
import resource, sys
from multicolm.scoring.store import StoredTable
stored = StoredTable(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(float(block.feature("hidden").sum()) for block in stored.blocks(2048))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, total)
"""


@pytest.mark.slow
def test_reading_blocks_takes_the_memory_of_a_shard_and_not_of_the_table(tmp_path) -> None:
    """A table of 80 MB in shards of 5 MB."""
    data = write(tmp_path / "d.jsonl", records(400))
    ensemble = tables("base", hidden=True)
    index = score(
        ensemble, open_corpus(data), tmp_path / "t", features=["hidden"], shard_positions=90
    )
    files = TableFiles(tmp_path / "t", index)
    digests = dict(index.files)
    from multicolm.files import sha256

    for number, shard in enumerate(index.shards):
        tensors = files.read("base", number)
        tensors["hidden"] = torch.ones(shard.n_positions, 12_000)
        files.write("base", number, tensors)
        digests[f"base/{number:05d}.safetensors"] = sha256(files.path("base", number))
    (tmp_path / "t" / "index.json").write_text(replace(index, files=digests).as_json())
    size = sum(path.stat().st_size for path in (tmp_path / "t").rglob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "t")], capture_output=True, text=True
    )
    grown, total = done.stdout.split()
    assert float(total) == index.n_positions * 12_000, done.stderr
    assert size > 70e6 and int(grown) * 1024 < 20e6


# --- roll-outs -----------------------------------------------------------------------------------


def judged(folder: Path, *rows: tuple[int, int, dict[str, float]]) -> ScoreTable:
    files = TableFiles(folder, read_index(folder))
    names = sorted({name for _, _, quality in rows for name in quality})
    Rollouts(
        torch.tensor([shard for shard, _, _ in rows]),
        torch.tensor([row for _, row, _ in rows]),
        {n: torch.tensor([quality.get(n, NAN) for _, _, quality in rows]) for n in names},
    ).write(files)
    return load_table(folder)


def test_where_texts_were_finished_who_came_out_best_is_right(folder) -> None:
    plain = load_table(folder)
    first = read_index(folder).shards[0].n_positions
    table = judged(
        folder,
        (0, 3, {"base": 1.0, "left": 1.0, "right": 0.0}),
        (1, 2, {"base": 0.0, "left": 0.5, "right": 0.25}),
        (1, 5, {"base": 0.0, "left": 0.0, "right": 0.0}),
    )
    assert table.right[3].tolist() == [True, True, False]
    assert table.right[first + 2].tolist() == [False, True, False]
    others = torch.ones(len(table), dtype=torch.bool)
    others[[3, first + 2]] = False
    assert torch.equal(table.right[others], plain.correct[others]), "also where every text failed"
    assert torch.equal(table.writer_logprobs[others], plain.gold_logprobs[others])
    likely = table.writer_logprobs[first + 2].exp().tolist()
    assert likely == pytest.approx([0.01, 0.5, 0.25])
    assert torch.equal(plain.right, plain.correct)


def test_roll_outs_outlive_an_assistant_that_is_scored_later(folder, tmp_path) -> None:
    judged(folder, (0, 3, {"base": 0.0, "left": 1.0}))
    ensemble = tables("base", "left", "right", "third", hidden=True)
    score(ensemble, open_corpus(tmp_path / "d.jsonl"), folder, shard_positions=40)
    table = load_table(folder)
    assert table.rollouts is not None and table.models[-1] == "third"
    assert table.rollouts[3].nan_to_num(-1).tolist() == [0.0, 1.0, -1.0, -1.0]
    assert table.right[3].tolist() == [False, True, False, False]


def test_roll_outs_of_another_table_or_changed_ones_are_refused(folder) -> None:
    judged(folder, (0, 3, {"base": 0.0, "left": 1.0}))
    path = folder / "rollouts.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"rollouts.safetensors has changed since"):
        load_table(folder)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"rollouts.safetensors is missing or damaged"):
        load_table(folder)
    index = json.loads((folder / "index.json").read_text())
    del index["files"]["rollouts.safetensors"]
    (folder / "index.json").write_text(json.dumps(index))
    assert load_table(folder).rollouts is None
