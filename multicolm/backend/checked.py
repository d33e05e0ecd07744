"""Sessions whose predictions are numbers: NaN would be the most likely token of every argmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.errors import ModelError

__all__ = ["CheckedSession", "open_session", "refuse_no_numbers"]


def open_session(model: Model, n_rows: int) -> CheckedSession:
    """A session of ``n_rows`` empty rows that refuses predictions that are no numbers.

    Whatever runs a model for somebody opens it here.
    """
    return CheckedSession(model, n_rows)


class CheckedSession(Session):
    """A session of a model; what it predicts is checked after each pass.

    That takes the greatest logit of each prediction, little beside the product that made them, and
    waits for the device, as the account of the pass's time does anyway.

    Args:
        model: the model.
        n_rows: how many texts.

    Attributes:
        model: the model.
    """

    def __init__(self, model: Model, n_rows: int) -> None:
        self.model = model
        self._n_rows = n_rows
        self._inner: Session | None = model.open(n_rows)

    @property
    def inner(self) -> Session:
        """The model's own session; opened anew after :meth:`reset`."""
        if self._inner is None:
            self._inner = self.model.open(self._n_rows)
        return self._inner

    def reset(self) -> None:
        """Forget all rows, whose caches are in an unknown state after a pass that broke."""
        self._inner = None

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # those of the session
        """Per row, how many tokens it holds."""
        return self.inner.lengths

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
        output = self.inner.feed(rows, tokens, n_last, hidden=hidden)
        fine = _fine(self.model, output.logits)
        if fine is None or bool(fine.all()):
            return output, {}
        errors: dict[int, ModelError] = {}
        broken = torch.zeros_like(fine)
        first = 0
        for number, n in enumerate(n_last):
            lines = slice(first, first + n)
            if not bool(fine[lines].all()):
                errors[number] = _error(self.model, output.logits[lines])
                broken[lines] = True
            first += n
        even = -math.log(output.logits.shape[-1])
        logits = torch.where(broken[:, None], even, output.logits)
        return replace(output, logits=logits), errors

    def logprobs_of(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        ids: Sequence[int],
        after: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.logprobs_of`."""
        return self.inner.logprobs_of(rows, lengths, ids, after)

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        self.inner.truncate(row, length)


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
