"""The places of some texts that are known, as a policy is asked about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicolm.decoding.row import Row, Written
from multicolm.decoding.sampling import Noise

__all__ = ["Places"]


class Places:
    """The stretches of some texts, numbered through.

    Attributes:
        rows: the texts, as a policy sees them.
        noise: that the policy draws from.
        at: per stretch, its first position among all tokens.
        text: per stretch, which of the texts it is of.
        place: per stretch, how many tokens of the text come before it.
        gold: per stretch, its first token.
    """

    def __init__(self, rows: Sequence[Row], texts: Sequence[Sequence[int]], begins: Tensor) -> None:
        self.rows = rows
        self.noise = Noise()
        self.at = begins.nonzero()[:, 0]
        self._span = begins.long().cumsum(0) - 1
        flat = [
            (number, place, token)
            for number, text in enumerate(texts)
            for place, token in enumerate(text)
        ]
        self._flat = flat
        chosen = [flat[i] for i in self.at.tolist()]
        self.text = [number for number, _, _ in chosen]
        self.place = [place for _, place, _ in chosen]
        self.gold = [token for _, _, token in chosen]

    def __len__(self) -> int:
        return len(self.gold)

    def sums(self, values: Float[Tensor, "positions"]) -> Float[Tensor, "stretches"]:
        """Per stretch, the sum over its tokens."""
        return torch.zeros(len(self), dtype=torch.float64).index_add_(
            0, self._span, values.double()
        )

    def per_text(self, values: Float[Tensor, "stretches"]) -> Float[Tensor, "texts"]:
        """Per text, the sum over its stretches."""
        sums = torch.zeros(len(self.rows), dtype=torch.float64)
        return sums.index_add_(0, torch.tensor(self.text), values.double())

    def one_by_one(self) -> Iterator[list[int]]:
        """The first stretch of every text, then the second, and so on."""
        order: list[list[int]] = [[] for _ in self.rows]
        for i, number in enumerate(self.text):
            order[number].append(i)
        for turn in range(max(map(len, order))):
            yield [numbers[turn] for numbers in order if turn < len(numbers)]

    def write(self, i: int, writer: int) -> None:
        """Note who wrote a stretch, for policies that look back."""
        first = int(self.at[i])
        last = int(self.at[i + 1]) if i + 1 < len(self) else len(self._flat)
        row = self.rows[self.text[i]]
        for _, _, token in self._flat[first:last]:
            row.write(Written(token, writer, 0.0, None))
