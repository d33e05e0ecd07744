"""The laws of backends and tokenizers; and proof that each check bites."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from multicolm.backend.base import ModelOutput
from multicolm.backend.table import TableModel, TableSession
from multicolm.testing import LawBroken, check_model, check_tokenizer
from multicolm.tokenizer.literal import LiteralTokenizer

TOKENS = ["a", "b", "."]
TABLE = {
    "": {"a": 0.5, "b": 0.3, ".": 0.2},
    "a": {"b": 0.9, ".": 0.1},
    ("a", "b"): {"a": 0.6, "b": 0.2, ".": 0.2},
}


def test_the_table_backend_keeps_the_laws() -> None:
    model = TableModel("table", TOKENS, TABLE, ends=["."])
    for seed in range(5):
        check_model(model, seed=seed)
    assert model.open(1).lengths == [0]


class _Wrong(TableModel):
    session: type[TableSession] = TableSession

    def open(self, n_rows: int) -> TableSession:
        return self.session(self, n_rows)


def wrong(kind: type[TableSession]) -> _Wrong:
    model = _Wrong("wrong", TOKENS, TABLE, ends=["."])
    model.session = kind
    return model


class ForgetsToCut(TableSession):
    def truncate(self, row: int, length: int) -> None:
        pass


class CutsTheCountOnly(TableSession):
    """Its cache keeps what was cut, behind a length that looks right."""

    def __init__(self, model: TableModel, n_rows: int) -> None:
        super().__init__(model, n_rows)
        self._stale: list[list[int]] = [[] for _ in range(n_rows)]

    def truncate(self, row: int, length: int) -> None:
        self._stale[row] = self._ids[row][length:]
        super().truncate(row, length)

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        if any(self._stale[row] for row in rows):
            tokens = [
                [*new[:-1], self._stale[r][-1]] if self._stale[r] else new
                for r, new in zip(rows, tokens, strict=True)
            ]
        return super().feed(rows, tokens, n_last)


class MixesRowsUp(TableSession):
    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        return ModelOutput(super().feed(rows, tokens, n_last).logits.flip(0))


class GivesNaN(TableSession):
    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        return ModelOutput(torch.full_like(super().feed(rows, tokens, n_last).logits, float("nan")))


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (ForgetsToCut, "a cut row has the length"),
        (CutsTheCountOnly, "equals a fresh start"),
        (MixesRowsUp, "equals a fresh start"),
        (GivesNaN, "predictions are distributions"),
    ],
)
def test_a_backend_that_breaks_a_law_is_caught(kind: type[TableSession], law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        for seed in range(5):
            check_model(wrong(kind), seed=seed)


def test_a_literal_tokenizer_keeps_the_laws() -> None:
    tokenizer = LiteralTokenizer(["a", "ab", "b", "<end>"], ends=["<end>"])
    check_tokenizer(tokenizer, ["abab", "aab", "b"])
    assert tokenizer.encode("aab") == [0, 1]


class DropsBytes(LiteralTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == 0 else super().token_bytes(token_id)


class CountsPieces(LiteralTokenizer):
    def decode(self, ids: Sequence[int]) -> bytes:
        return super().decode(ids) if len(ids) == 4 else super().decode(ids) + b"!"


class LetsSpecialsOut(LiteralTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return self.piece(token_id).encode()


class EndsPrompts(LiteralTokenizer):
    def __init__(self, tokens: Sequence[str], specials: Sequence[str] = ()) -> None:
        super().__init__(tokens, specials, ends=specials)

    def encode(self, text: str) -> list[int]:
        return [*super().encode(text), *self.end_ids]

    def encode_continuation(self, text: str) -> list[int]:
        return super().encode(text)


class EndsNowhere(LiteralTokenizer):
    end_ids = frozenset({99})

    def __init__(self, tokens: Sequence[str], specials: Sequence[str] = ()) -> None:
        super().__init__(tokens, specials)
        self.end_ids = frozenset({99})


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (DropsBytes, "is the text"),
        (CountsPieces, "decoding in pieces"),
        (LetsSpecialsOut, "specials|special tokens"),
        (EndsPrompts, "does not end as texts end"),
        (EndsNowhere, "end tokens exist"),
    ],
)
def test_a_tokenizer_that_breaks_a_law_is_caught(kind: type[LiteralTokenizer], law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        check_tokenizer(kind(["a", "b", "<end>"], specials=["<end>"]), ["abab"])
