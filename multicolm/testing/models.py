"""The laws of tokenizers and of backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.testing.laws import LawBroken
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["check_model", "check_tokenizer"]

_TEXTS = (
    "What is 2 * x + 15 if x = 7?",
    "two  blanks,\ttabs and\nnew lines ",
    "naïve café, Straße, 你好, 😀👩‍👩‍👧",
    "<|end|> is only text here",
)


def check_tokenizer(tokenizer: TokenizerAdapter, texts: Sequence[str] = _TEXTS) -> None:
    """An adapter turns text into tokens and back without loss.

    Laws: ``decode(encode_continuation(text))`` is the text's bytes; decoding in pieces equals
    decoding at once; a prompt does not end as texts end; special tokens have no bytes; end tokens
    exist.

    Args:
        tokenizer: what to check.
        texts: texts that it claims to cover.

    Raises:
        LawBroken: naming the law.
    """
    for text in texts:
        ids = tokenizer.encode_continuation(text)
        if tokenizer.decode(ids) != text.encode():
            raise LawBroken(
                "decode(encode(text)) is the text",
                f"{text!r} became {tokenizer.decode(ids)!r}.",
            )
        half = len(ids) // 2
        if tokenizer.decode(ids[:half]) + tokenizer.decode(ids[half:]) != tokenizer.decode(ids):
            raise LawBroken("decoding in pieces equals decoding at once", f"for {text!r}.")
        ends = tokenizer.end_ids.intersection(tokenizer.encode(text)[-1:])
        if ends:
            raise LawBroken(
                "a prompt does not end as texts end",
                f"{text!r} is followed by {tokenizer.special_name(min(ends))!r}.",
            )
    for token_id in range(tokenizer.n_tokens):
        if tokenizer.special_name(token_id) is not None and tokenizer.token_bytes(token_id):
            raise LawBroken(
                "special tokens leave no text", f"token {token_id} has bytes and a special name."
            )
    missing = [i for i in tokenizer.end_ids if not 0 <= i < tokenizer.n_tokens]
    if missing:
        raise LawBroken("end tokens exist", f"{missing[0]} is none of {tokenizer.n_tokens} tokens.")


def check_model(model: Model, *, seed: int = 0, tolerance: float = 1e-3) -> None:
    """A model's caches change nothing but the time.

    Laws: predictions are distributions; a cached look equals an uncached one; after any roll-back
    a row equals a fresh start; a batch equals its rows one by one.

    Args:
        model: what to check.
        seed: of the random texts and cuts.
        tolerance: greatest difference of probabilities that still counts as equal.

    Raises:
        LawBroken: naming the law.
    """
    trial = _Trial(model, seed)
    for _ in range(12):
        trial.cut_some_rows()
        trial.feed_some_rows(tolerance)


class _Trial:
    """Some texts in one session of a model, and what they should be."""

    n_rows = 3
    longest = 40

    def __init__(self, model: Model, seed: int) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(seed)
        self._longest = min(self.longest, model.context_length or self.longest)
        self._texts = [[self._token()] for _ in range(self.n_rows)]
        self._session = model.open(self.n_rows)
        self._session.feed(range(self.n_rows), self._texts, [1] * self.n_rows)

    def _number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self._generator))

    def _token(self) -> int:
        return self._number(0, self._model.tokenizer.n_tokens)

    def cut_some_rows(self) -> None:
        for row, text in enumerate(self._texts):
            length = self._number(1, len(text) + 1)
            if self._number(0, 3) == 0:
                continue
            self._session.truncate(row, length)
            del text[length:]
            if self._session.lengths[row] != length:
                raise LawBroken(
                    "a cut row has the length it was cut to",
                    f"row {row}: {self._session.lengths[row]} instead of {length}.",
                )

    def feed_some_rows(self, tolerance: float) -> None:
        rooms = [self._longest - len(text) for text in self._texts]
        rows = [row for row, room in enumerate(rooms) if room > 0 and self._number(0, 3)]
        if not rows:
            return
        new = [[self._token() for _ in range(min(self._number(1, 6), rooms[row]))] for row in rows]
        n_last = [self._number(1, len(tokens) + 1) for tokens in new]
        for row, tokens in zip(rows, new, strict=True):
            self._texts[row].extend(tokens)
        probs = _probs(self._session.feed(rows, new, n_last).logits, self._model)
        fresh = [
            _probs(self._model.open(1).feed([0], [self._texts[row]], [count]).logits, self._model)
            for row, count in zip(rows, n_last, strict=True)
        ]
        error = float((probs - torch.cat(fresh)).abs().max())
        if not error <= tolerance:
            raise LawBroken(
                "a cached look after roll-backs, in a batch, equals a fresh start of the row alone",
                f"probabilities differ by {error:.2g} (allowed {tolerance:.2g}).",
            )


def _probs(logits: Tensor, model: Model) -> Tensor:
    if logits.shape[-1] < model.tokenizer.n_tokens:
        missing = model.tokenizer.n_tokens - logits.shape[-1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    probs = logits.float().softmax(-1)
    total = probs.sum(-1)
    if bool(probs.isnan().any()) or bool(((total - 1).abs() > 1e-4).any()):
        raise LawBroken("predictions are distributions", f"probabilities sum to {total.tolist()}.")
    return probs
