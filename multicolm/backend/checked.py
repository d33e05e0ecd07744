"""Sessions whose predictions are numbers: NaN would be the most likely token of every argmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.errors import ModelError

__all__ = ["CheckedSession", "RowPool", "open_session", "refuse_no_numbers"]


def open_session(model: Model, n_rows: int, pool: RowPool | None = None) -> CheckedSession:
    """A session of ``n_rows`` empty rows that refuses predictions that are no numbers.

    Whatever runs a model for somebody opens it here.

    Args:
        model: the model.
        n_rows: how many texts.
        pool: where other models with the same weights have their rows, to be run in one pass.
    """
    return CheckedSession(model, n_rows, pool)


class RowPool:
    """Rows of one model, or of several with the same weights: any of them can be fed in one pass.

    What is predicted is checked after each pass. That takes the greatest logit of each prediction,
    little beside the product that made them, and waits for the device, as the account of the pass's
    time does anyway.
    """

    def __init__(self) -> None:
        self._model_of: list[Model] = []
        self._parts: list[tuple[Model, int]] = []
        self._inner: Session | None = None

    def add(self, model: Model, n_rows: int) -> int:
        """Append empty rows of a model; returns the number of the first."""
        if self._parts:
            self.inner.add_rows(model, n_rows)
        else:
            self._inner = model.open(n_rows)
        first = len(self._model_of)
        self._parts.append((model, n_rows))
        self._model_of += [model] * n_rows
        return first

    @property
    def inner(self) -> Session:
        """The session of all rows; opened anew after :meth:`reset`."""
        if self._inner is None:
            (first, n_rows), *others = self._parts
            self._inner = first.open(n_rows)
            for model, n_rows in others:
                self._inner.add_rows(model, n_rows)
        return self._inner

    def reset(self) -> None:
        """Forget all rows, whose caches are in an unknown state after a pass that broke."""
        self._inner = None

    def feed_each(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> tuple[ModelOutput, dict[int, ModelError]]:
        """See :meth:`CheckedSession.feed_each`."""
        output = self.inner.feed(rows, tokens, n_last, hidden=hidden)
        # Models with the same weights have the same tokens.
        fine = _fine(self._model_of[0], output.logits)
        if fine is None or bool(fine.all()):
            return output, {}
        errors: dict[int, ModelError] = {}
        broken = torch.zeros_like(fine)
        first = 0
        for number, (row, n) in enumerate(zip(rows, n_last, strict=True)):
            lines = slice(first, first + n)
            if not bool(fine[lines].all()):
                errors[number] = _error(self._model_of[row], output.logits[lines])
                broken[lines] = True
            first += n
        even = -math.log(output.logits.shape[-1])
        logits = torch.where(broken[:, None], even, output.logits)
        return replace(output, logits=logits), errors


class CheckedSession(Session):
    """A session of a model that refuses predictions that are no numbers.

    Args:
        model: the model.
        n_rows: how many texts.
        pool: where its rows are, beside those of other models with the same weights; not given, in
            one of their own.

    Attributes:
        model: the model.
        pool: its rows; a pass may feed those of several sessions.
        first_row: where they begin in the pool.
    """

    def __init__(self, model: Model, n_rows: int, pool: RowPool | None = None) -> None:
        self.model = model
        self.pool = RowPool() if pool is None else pool
        self.first_row = self.pool.add(model, n_rows)
        self._n_rows = n_rows

    @property
    def inner(self) -> Session:
        """The session of all rows of the pool."""
        return self.pool.inner

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # those of the pool
        """Per row, how many tokens it holds."""
        return self.inner.lengths[self.first_row : self.first_row + self._n_rows]

    def _in_pool(self, rows: Sequence[int]) -> list[int]:
        return [self.first_row + row for row in rows]

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`.

        Raises:
            ModelError: if a prediction is no distribution.
        """
        output, errors = self.feed_each(rows, tokens, n_last, hidden=hidden)
        for error in errors.values():
            raise error
        return output

    def feed_each(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> tuple[ModelOutput, dict[int, ModelError]]:
        """Like :meth:`feed`, for rows that do not depend on each other.

        Returns:
            The predictions, and by number among ``rows`` why a row failed: one of its predictions
            is no distribution. All of its predictions are even then.
        """
        return self.pool.feed_each(self._in_pool(rows), tokens, n_last, hidden=hidden)

    def logprobs_of(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        ids: Sequence[int],
        after: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.logprobs_of`."""
        return self.inner.logprobs_of(self._in_pool(rows), lengths, ids, after)

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        self.inner.truncate(self.first_row + row, length)


def refuse_no_numbers(model: Model, logits: Tensor) -> None:
    """Refuse predictions with NaN or +inf in them, or without any possible token.

    Of a model that returns its likeliest tokens only (:attr:`Model.max_top_logprobs`) +inf has a
    meaning, and so has a row that is unknown.

    Args:
        model: whose they are.
        logits: unnormalised log-probabilities, [predictions, vocab].

    Raises:
        ModelError: naming the model, the type it computes in, and what to do.
    """
    fine = _fine(model, logits)
    if fine is not None and not bool(fine.all()):
        raise _error(model, logits)


def _fine(model: Model, logits: Tensor) -> Tensor | None:
    """Per prediction whether it is a distribution; ``None`` if there are none."""
    if not logits.numel():
        return None
    top = _greatest(model, logits)
    return top.isfinite() if model.max_top_logprobs is None else ~top.isnan()


def _greatest(model: Model, logits: Tensor) -> Tensor:
    """The greatest logit of each prediction, which is NaN if anything in it is."""
    # Columns of a padded head belong to no token, and may hold anything.
    return logits[:, : model.tokenizer.n_tokens].amax(-1)


def _error(model: Model, logits: Tensor) -> ModelError:
    """What to say of predictions of which one or more are no distributions."""
    top = _greatest(model, logits)
    if bool(top.isnan().any()):
        what = "no numbers (NaN)"
    else:
        what = "infinite" if bool((top == math.inf).any()) else "all minus infinity"
    where = f"server {model.server}" if model.server else f"computing in {model.precision}"
    return ModelError(
        f"model '{model.name}' ({where}) predicts logits that are {what}; {_advice(model)}."
    )


def _advice(model: Model) -> str:
    if model.server:
        return "check the model in its server, in another type (bfloat16, float32) if need be"
    if model.precision == "float16":
        return (
            "its numbers outgrow this type: set `dtype: bfloat16` or `dtype: float32`; if that "
            "does not help, its weights are damaged"
        )
    if model.precision in ("bfloat16", "float32", "float64"):
        return "its weights are damaged or do not fit its config: fetch or convert them anew"
    return "convert it anew, or to another type"
