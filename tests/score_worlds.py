"""Small worlds to score and to learn from: exact tables, corpora of them, folders compared."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tables import TOKENS, random_table

from multicolm import Ensemble
from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.table import TableModel, TableSession
from multicolm.types import Signal

WORDS = TOKENS[:-1]


class HiddenTable(TableModel):
    """A table whose hidden state says which token came last: one-hot, and a constant."""

    signals: ClassVar[frozenset[Signal]] = frozenset({"top1", "topk", "logprobs", "hidden"})

    def __init__(self, table: TableModel) -> None:
        self.__dict__.update(table.__dict__)
        self.hidden_size = table.tokenizer.n_tokens + 1

    def open(self, n_rows: int) -> Session:  # type: ignore[override]
        return _HiddenSession(self, n_rows)

    def hidden_after(self, ids: Sequence[int]) -> torch.Tensor:
        hidden = torch.zeros(self.hidden_size)
        hidden[ids[-1]] = hidden[-1] = 1.0
        return hidden


class _HiddenSession(TableSession):
    def feed(self, rows, tokens, n_last, *, hidden=False) -> ModelOutput:  # type: ignore[no-untyped-def]
        output = super().feed(rows, tokens, n_last)
        if not hidden:
            return output
        states = []
        for row, count in zip(rows, n_last, strict=True):
            ids = self._ids[row]
            states += [
                self._model.hidden_after(ids[: len(ids) - back])  # type: ignore[attr-defined]
                for back in range(count - 1, -1, -1)
            ]
        return ModelOutput(output.logits, torch.stack(states))


def table(name: str, seed: int, *, context_length: int | None = None) -> TableModel:
    """A random table that knows what it is."""
    model = random_table(name, seed)
    model.identity = f"table:{seed}"
    model.context_length = context_length
    return model


def tables(*names: str, seeds: Sequence[int] = (0, 1, 2, 3), hidden: bool = False) -> Ensemble:
    """An ensemble of random tables."""
    models = [table(name, seed) for name, seed in zip(names, seeds, strict=False)]
    return Ensemble([HiddenTable(models[0]), *models[1:]] if hidden else models)


def records(n: int, seed: int = 0, longest: int = 6) -> list[dict[str, str]]:
    """Prompts and completions in the words of the tables."""
    chance = random.Random(seed)

    def text(least: int) -> str:
        return "".join(chance.choice(WORDS) for _ in range(chance.randint(least, longest)))

    return [{"prompt": text(1), "completion": text(1)} for _ in range(n)]


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file is which: a file that is written again changes both numbers."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*.safetensors"))
    }
