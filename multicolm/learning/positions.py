"""The positions that a training uses, read block by block, from memory or from disk alike.

What is held at once does not grow with the table: a byte per position, and a few blocks of features
in the type that they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from multicolm.errors import TrainingError
from multicolm.score_table import ScoreBlocks, ScoreTable, held_out_texts

__all__ = ["Parts", "Positions", "device_named", "divide", "scores_in_memory"]

_BLOCK = 2048
"""Positions that are read in one go: a few texts."""

_SHUFFLED = 4
"""Blocks that are in memory at once and shuffled together."""


@dataclass(frozen=True)
class Positions:
    """Some positions of a table.

    Attributes:
        source: the table, in memory or on disk.
        chosen: per block of the table a mask, which of its positions they are.
        device: where what is read is put.
    """

    source: ScoreBlocks
    chosen: Sequence[Tensor]
    device: torch.device

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.chosen)

    @property
    def _numbers(self) -> list[int]:
        """Of the blocks that hold some of them."""
        return [number for number, mask in enumerate(self.chosen) if bool(mask.any())]

    def in_order(self, at_once: int = _BLOCK, *, features: bool = True) -> Iterator[ScoreTable]:
        """All of them as they are, some at a time; each table is a copy that may be changed.

        Args:
            at_once: how many positions a table has at most; a block's at most.
            features: whether the base model's features are wanted.
        """
        numbers = self._numbers
        for number, block in zip(numbers, self.source.blocks(_BLOCK, numbers), strict=True):
            seen = block if features else replace(block, base={})
            for rows in torch.split(self.chosen[number].nonzero()[:, 0], at_once):
                yield _on(self.device, seen.rows(rows))

    def shuffled(self, seed: int, first: int = 0) -> Iterator[tuple[ScoreTable, Tensor]]:
        """All of them once, some blocks at a time: :attr:`n_shuffles` tables, and an order of each.

        Blocks come in random order, and the positions of the blocks that are in memory together
        are shuffled: of a small table that is a shuffle of all positions.

        Args:
            seed: of the order.
            first: number of the table to begin with, from 0; the others are those they always are.
        """
        numbers = self._numbers
        order = torch.randperm(len(numbers), generator=_seeded(seed, 0)).tolist()
        groups = [order[at : at + _SHUFFLED] for at in range(0, len(order), _SHUFFLED)]
        for number, group in enumerate(groups[first:], first):
            # Those of one file follow each other, so that it is opened once.
            wanted = sorted(numbers[i] for i in group)
            blocks = zip(wanted, self.source.blocks(_BLOCK, wanted), strict=True)
            table = _joined([block.rows(self.chosen[n].nonzero()[:, 0]) for n, block in blocks])
            rows = torch.randperm(len(table), generator=_seeded(seed, number + 1))
            yield _on(self.device, table), rows.to(self.device)

    @property
    def n_shuffles(self) -> int:
        """How many tables :meth:`shuffled` gives."""
        return -(-len(self._numbers) // _SHUFFLED)

    def scores_only(self) -> ScoreTable:
        """All of them in the memory of the CPU, without the base model's features."""
        here = replace(self, device=torch.device("cpu"))
        return _joined(list(here.in_order(features=False)))


@dataclass(frozen=True)
class Parts:
    """Positions to learn from, and those of texts that are held out.

    Attributes:
        learnt: to learn from.
        judged: may be none.
    """

    learnt: Positions
    judged: Positions

    @property
    def measured(self) -> Positions:
        """Positions to measure on: those held out, the others if there are none."""
        return self.judged if len(self.judged) else self.learnt


def divide(
    table: ScoreBlocks,
    wanted: Callable[[ScoreTable], Bool[Tensor, "positions"]],
    held_out: float,
    device: torch.device | None = None,
) -> Parts:
    """Part a table as :meth:`multicolm.score_table.ScoreTable.split` does, without loading it.

    Args:
        table: in memory or on disk.
        wanted: the positions that count.
        held_out: part of the texts, 0 up to (not including) 1.
        device: where what is read is put; the CPU if not given.

    """
    counts, examples, texts = [], [], torch.zeros(0, dtype=torch.long)
    for block in table.blocks(_BLOCK):
        mask = wanted(block)
        counts.append(mask)
        examples.append(torch.unique_consecutive(block.example, return_counts=True))
        texts = torch.unique(torch.cat([texts, block.example[mask]]))
    held = held_out_texts(texts, held_out, seed=0) if len(texts) else texts
    learnt, judged = [], []
    for mask, (numbers, lengths) in zip(counts, examples, strict=True):
        away = torch.isin(numbers, held).repeat_interleave(lengths)
        learnt.append(mask & ~away)
        judged.append(mask & away)
    place = device or torch.device("cpu")
    return Parts(Positions(table, learnt, place), Positions(table, judged, place))


def scores_in_memory(table: ScoreBlocks) -> ScoreTable:
    """All of a table but the base model's features."""
    return _joined([replace(block, base={}) for block in table.blocks(_BLOCK)])


def device_named(name: str | None) -> torch.device:
    """The device of a name; a CUDA device if there is one, else the CPU, if not given.

    Raises:
        TrainingError: if there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"device '{name}' cannot be used ({reason}); leave the option `device` out, or set it "
            "to cpu, cuda or cuda:1."
        ) from error
    return device


def _seeded(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + part) & 0x7FFFFFFF)


def _on(device: torch.device, table: ScoreTable) -> ScoreTable:
    if device.type == "cpu":
        return table
    moved: dict[str, Any] = {name: column.to(device) for name, column in table.columns().items()}
    base = {name: feature.to(device) for name, feature in table.base.items()}
    return replace(table, **moved, base=base)


def _joined(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Tables of the same models as one."""
    if len(tables) == 1:
        return tables[0]
    columns = [table.columns() for table in tables]
    joined: dict[str, Any] = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    base = {name: torch.cat([t.base[name] for t in tables]) for name in tables[0].base}
    return replace(tables[0], **joined, base=base)
