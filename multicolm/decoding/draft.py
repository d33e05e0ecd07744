"""Positions that are about to be decided, and what the models show there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from multicolm.backend.base import Look
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise, Sampling

__all__ = ["Draft", "Positions", "Shown"]


@dataclass(frozen=True)
class Positions:
    """Some places of some rows, flat; and the random numbers that belong to them.

    Attributes:
        rows: per position, its row.
        places: per position, its place in the row's written text (0 is the first new token).
    """

    rows: Sequence[Row]
    places: Sequence[int]
    noise: Noise
    sampling: Sampling

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> list[int]:
        """Per position, what its row's randomness hangs on."""
        return [row.key for row in self.rows]

    def draw(self, logits: Tensor, which: Sequence[int] | None = None) -> Int[Tensor, "drawn"]:
        """Draw a token at every position, or at those numbered ``which``.

        Whoever writes, a position has the same noise. So two models that agree draw the same
        token, and a schedule that asks in another order gets the same text.
        """
        if self.sampling.greedy:
            return self.sampling.draw(logits, None)
        chosen = range(len(self)) if which is None else which
        keys, places = [self.rows[i].key for i in chosen], [self.places[i] for i in chosen]
        return self.sampling.draw(logits, self.noise.gumbel(keys, places, logits.shape[-1]))

    def at(self, which: Sequence[int]) -> Positions:
        """Some of these positions."""
        return Positions(
            [self.rows[i] for i in which],
            [self.places[i] for i in which],
            self.noise,
            self.sampling,
        )

    def context(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """How policies are told about what came before each position.

        Behind the first place the base model has written, since a draft is its own; where that
        does not come true, the position is thrown away.
        """

        def previous() -> Tensor:
            known = [
                row.previous if place == len(row.written) else 0
                for row, place in zip(self.rows, self.places, strict=True)
            ]
            return torch.tensor(known, device=device)

        def base_run() -> Tensor:
            runs = [
                row.base_run + place - len(row.written)
                for row, place in zip(self.rows, self.places, strict=True)
            ]
            return torch.tensor(runs, device=device)

        return {
            "previous": previous,
            "base_run": base_run,
            "place": lambda: torch.tensor(list(self.places), device=device),
            "uniform": lambda: self.noise.uniform(self.keys, self.places).to(device),
        }


@dataclass
class Shown:
    """What one model shows at some of the positions.

    Attributes:
        look: its predictions, one after another.
        line_of: per position that was looked at, its line in ``look``.
    """

    look: Look
    line_of: dict[int, int]

    def logits(self, which: Sequence[int]) -> Tensor:
        """Logits at the positions numbered ``which``: [len(which), vocab]."""
        lines = [self.line_of[i] for i in which]
        if lines == list(range(self.look.logits.shape[0])):
            return self.look.logits
        return self.look.logits[torch.tensor(lines, device=self.look.logits.device)]

    def hidden(self, which: Sequence[int]) -> Tensor | None:
        """Hidden states at the positions numbered ``which``, if there are any."""
        if self.look.hidden is None:
            return None
        lines = [self.line_of[i] for i in which]
        return self.look.hidden[torch.tensor(lines, device=self.look.hidden.device)]


@dataclass
class Draft:
    """What the base model wrote ahead, position by position.

    Without a base model that is looked at always, a draft is one empty position per row.

    Attributes:
        positions: row by row at the first step of the draft, then at the second, and so on.
        shown: per model index, what was looked at so far.
        tokens: per position, the token that the base model would write; empty if it was not run.
        deferring: per position, whether the policy may want another writer.
        scores: per position, the number the policy decides on, as far as it is known.
    """

    positions: Positions
    shown: dict[int, Shown] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    deferring: list[bool] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)

    @cached_property
    def by_row(self) -> dict[Row, list[int]]:
        """Per row, the numbers of its positions by ascending place."""
        numbers: dict[Row, list[int]] = {}
        for i, row in enumerate(self.positions.rows):
            numbers.setdefault(row, []).append(i)
        return numbers
