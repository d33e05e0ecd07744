"""One model, served in two ways: whether an engine gives what a reference gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.testing.laws import LawBroken

__all__ = ["Difference", "check_against"]

_TEXTS = ("What is 2 * x + 15 if x = 7?", "two  blanks,\ttabs and\nnew lines ", "naïve café, 你好")
_LONGEST = 64  # tokens of a text, prompt and all; engines read several of them at each check


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a model was from its reference, where it kept every law.

    Attributes:
        greatest: in nats; for tokens of a log-probability below -1, as a part of it.
        n_positions: after how many tokens it was checked.
        n_unknown: for how many tokens, over all positions, the model returned nothing, as servers
            that return only the likeliest do.
    """

    greatest: float
    n_positions: int
    n_unknown: int


def check_against(
    model: Model,
    reference: Model,
    *,
    tolerance: float = 1e-5,
    texts: Sequence[str] = _TEXTS,
    seed: int = 0,
) -> Difference:
    """A model shows what another one shows that runs the same weights.

    Laws: the same ids are the same tokens, and texts are cut into the same; the next token has the
    same log-probabilities, whatever was read at once; so have all positions of a text, read in one
    go; after a roll-back it is as if what was cut had never been there; a text ends where the
    reference ends it, with an end token that both know; rows of different lengths, fed together,
    do not touch each other; a row that is given to another text remembers nothing.

    Args:
        model: what to check, such as an engine's.
        reference: what is right, such as the same weights in transformers, in float32.
        tolerance: the greatest difference of log-probabilities that counts as equal, in nats; for
            tokens less likely than 1/e, in proportion to the log-probability.
        texts: prompts, some of which the reference ends within 64 tokens if ends are to be
            compared; none for models whose tokens spell no texts.
        seed: of the random tokens and cuts.

    Returns:
        What was seen.

    Raises:
        LawBroken: naming the law.
    """
    trial = _Trial(model, reference, tolerance, seed)
    trial.vocabulary(texts)
    for text in texts:
        trial.ending(reference.tokenizer.encode(text))
    trial.next_tokens()
    trial.scoring()
    trial.rollback()
    trial.ragged_rows()
    return Difference(trial.greatest, trial.n_positions, trial.n_unknown)


class _Trial:
    """Two models that are shown the same, and how far they were apart.

    Attributes:
        greatest: see :class:`Difference`.
        n_positions: see :class:`Difference`.
        n_unknown: see :class:`Difference`.
    """

    def __init__(self, model: Model, reference: Model, tolerance: float, seed: int) -> None:
        self._model = model
        self._reference = reference
        self._tolerance = tolerance
        self._partial = model.max_top_logprobs is not None
        self._generator = torch.Generator().manual_seed(seed)
        self._pool: list[int] = []  # prompts and what the reference writes after them
        self._n_tokens = min(model.tokenizer.n_tokens, reference.tokenizer.n_tokens)
        limits = [m.context_length for m in (model, reference) if m.context_length is not None]
        self._longest = min([_LONGEST, *limits])
        self.greatest = 0.0
        self.n_positions = 0
        self.n_unknown = 0

    def vocabulary(self, texts: Sequence[str]) -> None:
        """The same ids are the same tokens, and texts are cut into the same."""
        mine, right = self._model.tokenizer, self._reference.tokenizer
        for i in range(self._n_tokens):
            pairs = (mine.token_bytes(i), right.token_bytes(i))
            if pairs[0] != pairs[1]:
                raise LawBroken(
                    "the same ids are the same tokens",
                    f"token {i} is {pairs[0]!r} instead of {pairs[1]!r}.",
                )
        for text in texts:
            for how in ("encode", "encode_continuation"):
                ids, wanted = getattr(mine, how)(text), getattr(right, how)(text)
                if ids != wanted:
                    raise LawBroken(
                        "texts are cut into the same tokens",
                        f"{how}({text!r}) gave {ids} instead of {wanted}.",
                    )

    def next_tokens(self) -> None:
        """The next token is foreseen alike, after a text that comes token by token or in parts."""
        text = self._text(min(12, self._longest))
        mine, right = self._model.open(1), self._reference.open(1)
        sizes = [1, 1, 3, 1, 4, 1, 1]
        for size in sizes:
            part, text = text[:size], text[size:]
            if part:
                self._same("the next token is as likely", mine, right, [0], [part], [1])

    def scoring(self) -> None:
        """All positions of a text that is read in one go, and of one that is fed in blocks."""
        text = self._text(self._longest)
        half = len(text) // 2
        mine, right = self._model.open(1), self._reference.open(1)
        law = "all positions of a text score the same"
        self._same(law, mine, right, [0], [text[:half]], [half])
        rest = text[half:]
        self._same(law, mine, right, [0], [rest], [len(rest)])

    def rollback(self) -> None:
        """A cut row continues as if what was cut had never been there."""
        mine, right = self._model.open(1), self._reference.open(1)
        law = "after a roll-back the row is as if what was cut had never been there"
        text = self._text(self._longest)
        self._same(law, mine, right, [0], [text], [1])
        for length in (2 * len(text) // 3, 1, 0):
            for session in (mine, right):
                session.truncate(0, length)
            new = self._text(min(5, self._longest - length))
            self._same(law, mine, right, [0], [new], [len(new)])

    def ragged_rows(self) -> None:
        """Rows of different lengths, fed together, some not at all, one begun anew."""
        mine, right = self._model.open(4), self._reference.open(4)
        law = "rows that are fed together do not touch each other"
        sizes = [self._longest // part for part in (1, 2, 5, 12)]
        texts = [self._text(max(1, size - 4)) for size in sizes]
        self._same(law, mine, right, [0, 1, 2, 3], texts, [1, len(texts[1]), 2, 1])
        self._same(law, mine, right, [1, 3], [self._text(3), self._text(1)], [2, 1])
        for session in (mine, right):
            session.truncate(0, 2)
            session.truncate(2, 0)
        news = [self._text(n) for n in (2, 1, 4)]
        self._same(law, mine, right, [0, 1, 2], news, [1, 1, 4])

    def ending(self, prompt: list[int]) -> None:
        """The reference's greedy text, end token included, is as likely and ends alike."""
        text = self._greedy(prompt)
        ends = self._reference.tokenizer.end_ids
        if text and text[-1] in ends and text[-1] not in self._model.tokenizer.end_ids:
            raise LawBroken(
                "a text ends where the reference ends it",
                f"token {text[-1]} ends a text, and the model's end tokens are "
                f"{sorted(self._model.tokenizer.end_ids)}.",
            )
        law = "the reference's own text, to its end, is as likely"
        whole = (prompt + text)[: self._longest]
        self._pool += whole
        mine, right = self._model.open(1), self._reference.open(1)
        self._same(law, mine, right, [0], [whole[: len(prompt)]], [1])
        # One by one, as it is written; the last prediction is after the end of the text.
        for token in whole[len(prompt) :]:
            self._same(law, mine, right, [0], [[token]], [1])

    def _greedy(self, prompt: list[int]) -> list[int]:
        """What the reference writes, up to and with its end token."""
        session = self._reference.open(1)
        output = session.feed([0], [prompt], [1])
        text: list[int] = []
        while len(prompt) + len(text) < self._longest:
            text.append(int(output.logits[0, : self._n_tokens].argmax()))
            if text[-1] in self._reference.tokenizer.end_ids:
                break
            output = session.feed([0], [text[-1:]], [1])
        return text

    def _text(self, length: int) -> list[int]:
        """A stretch of what the models write, from anywhere; of random tokens if that is nothing.

        Where a model is lost, logits are large, and float32 by itself is off by more than 1e-5.
        """
        size = len(self._pool)
        if not size:
            drawn = torch.randint(self._n_tokens, (length,), generator=self._generator)
            return [int(token) for token in drawn]
        start = int(torch.randint(size, (1,), generator=self._generator))
        return [self._pool[(start + i) % size] for i in range(length)]

    def _same(
        self,
        law: str,
        mine: Session,
        right: Session,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
    ) -> None:
        """Feed both, and compare what they show."""
        got = self._logprobs(mine.feed(rows, tokens, n_last), self._partial)
        want = self._logprobs(right.feed(rows, tokens, n_last), False)
        if got.shape != want.shape or mine.lengths != right.lengths:
            raise LawBroken(
                "a look shows the positions that were asked for, and rows are as long as was fed",
                f"{list(got.shape)} of lengths {mine.lengths} instead of {list(want.shape)} of "
                f"{right.lengths}.",
            )
        difference = (got - want).abs() / want.abs().clamp(1.0, 1e6)
        difference = difference.masked_fill(got == want, 0.0)
        if self._partial:
            difference = self._of_known(difference, got, want)
        worst = float(difference.max())
        if not worst <= self._tolerance:
            line, token = divmod(int(difference.argmax()), difference.shape[-1])
            raise LawBroken(
                law,
                f"rows {list(rows)} were fed {[len(new) for new in tokens]} tokens, and at look "
                f"{line} of {len(got)} token {token} has the log-probability "
                f"{got[line, token]:.6f} instead of {want[line, token]:.6f} (allowed is a "
                f"difference of {self._tolerance:.2g}).",
            )
        self.greatest = max(self.greatest, worst)
        self.n_positions += len(got)

    def _of_known(self, difference: Tensor, got: Tensor, want: Tensor) -> Tensor:
        """The differences of tokens that are shown, which have to be the likeliest."""
        hidden = got == float("-inf")
        self.n_unknown += int(hidden.sum())
        least_shown = want.masked_fill(hidden, float("inf")).min(-1).values
        greatest_hidden = want.masked_fill(~hidden, float("-inf")).max(-1).values
        line = int((greatest_hidden - least_shown).argmax())
        if greatest_hidden[line] > least_shown[line] + self._tolerance:
            raise LawBroken(
                "a model that shows a part of its tokens shows the likeliest",
                f"at look {line} it hides one of log-probability {greatest_hidden[line]:.6f} and "
                f"shows one of {least_shown[line]:.6f}.",
            )
        return difference.masked_fill(hidden, 0.0)

    def _logprobs(self, output: ModelOutput, partial: bool) -> Tensor:
        """Log-probabilities of the tokens that both have: [positions, tokens]."""
        logits = output.logits.double()
        # Of a model that returns its likeliest tokens these are log-probabilities as they are.
        logprobs = logits if partial else logits.log_softmax(-1)
        missing = self._n_tokens - logprobs.shape[-1]
        if missing > 0:  # a head that is narrower than the vocabulary
            logprobs = torch.nn.functional.pad(logprobs, (0, missing), value=float("-inf"))
        return logprobs[:, : self._n_tokens]
