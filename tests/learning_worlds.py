"""Score tables that something can be learned from, and a training that is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import multicolm
from multicolm.files import sha256
from multicolm.score_table import ScoreTable
from multicolm.scoring.store import PER_MODEL, TEXT, Index, ScoredModel, Shard, TableFiles
from multicolm.views import ModelNames


def world(n_models: int = 3, n: int = 300, seed: int = 0, noise: float = 0.3) -> ScoreTable:
    """Positions whose hidden state says which model is right, four to a text."""
    g = torch.Generator().manual_seed(seed)
    right = torch.randint(n_models, (n,), generator=g)
    logprobs = torch.full((n, n_models), -4.0)
    logprobs[range(n), right] = -0.1
    top1 = torch.full((n, n_models), 6)
    top1[range(n), right] = 5
    hidden = torch.randn(n, 6, generator=g) * noise
    hidden[range(n), right] += 1.0
    zeros = torch.zeros(n, n_models)
    return ScoreTable(
        models=ModelNames([f"m{k}" for k in range(n_models)]),
        gold_ids=torch.full((n,), 5),
        gold_logprobs=logprobs,
        known=torch.ones(n, n_models).bool(),
        top1_ids=top1,
        top1_logprobs=zeros,
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) // 4,
        place=torch.arange(n) % 4,
        base={"hidden": hidden},
        identities=tuple(f"id{k}" for k in range(n_models)),
        digest="d",
    )


def hidden(part: ScoreTable) -> torch.Tensor:
    return part.feature("hidden")


class Stop(Exception):
    pass


def stopping(after: int):
    calls = 0

    def stop(done: float, total: float, label: str) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    return stop


def write_table(folder: Path, shards: Iterable[ScoreTable]) -> Path:
    """A finished score table with hidden states on disk, as ``multicolm score`` writes it."""
    firsts: list[Shard] = []
    files: dict[str, str] = {}
    for number, table in enumerate(shards):
        n_examples = len(torch.unique(table.example))
        start = sum(shard.n_examples for shard in firsts)
        firsts.append(Shard(start, n_examples, len(table)))
        models = tuple(
            ScoredModel(name, name, "float32", 1.0, ("hidden",) if k == 0 else ())
            for k, name in enumerate(table.models)
        )
        n = sum(shard.n_positions for shard in firsts)
        index = Index("test", "made", "d", start, 0, n, False, 0, models, tuple(firsts), files)
        stored = TableFiles(folder, index)
        text = {name: getattr(table, name) for name in ("gold_ids", "example", "place")}
        text |= {"prompt_digests": torch.arange(n_examples), "prompt_ids": torch.zeros(0).long()}
        stored.write(TEXT, number, text | {"prompt_lengths": torch.zeros(n_examples).long()})
        for k, name in enumerate(table.models):
            columns = {column: getattr(table, column)[:, k] for column in PER_MODEL}
            stored.write(name, number, columns | (dict(table.base) if k == 0 else {}))
        for part in (TEXT, *table.models):
            path = stored.path(part, number)
            files[f"{part}/{path.name}"] = sha256(path)
    (folder / "index.json").write_text(index.as_json(), encoding="utf-8")
    return folder


PEAKS = """
import resource, sys
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.training.train import train
for folder in sys.argv[2:]:
    train(CoLlmPolicy(), folder + "/table", folder + "/out", options=eval(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peaks(folder: Path, sizes: Sequence[int], options: dict[str, object]) -> list[int]:
    """Bytes that trainings take at most, each after those before it in one process.

    A table of size n has n shards of 4,000 positions, with 512 hidden states each in bfloat16.
    """

    def shards(n_shards: int) -> Iterator[ScoreTable]:
        for number in range(n_shards):
            part = world(n=4000, seed=number)
            part = replace(part, base={"hidden": torch.randn(4000, 512).bfloat16()})
            part.example.add_(1000 * number)
            yield part

    for n in sizes:
        write_table(folder / str(n) / "table", shards(n))
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, repr(options), *(str(folder / str(n)) for n in sizes)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(multicolm.__file__).parents[1])},
        check=True,
    )
    return [int(line) * 1024 for line in done.stdout.split()]
