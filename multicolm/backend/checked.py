"""Sessions whose predictions are numbers: NaN would be the most likely token of every argmax."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.errors import ModelError

__all__ = ["CheckedSession", "open_session", "refuse_no_numbers"]


def open_session(model: Model, n_rows: int) -> Session:
    """A session of ``n_rows`` empty rows that refuses predictions that are no numbers.

    Whatever runs a model for somebody opens it here.
    """
    return CheckedSession(model, model.open(n_rows))


class CheckedSession(Session):
    """A session of a model; what it predicts is checked after each pass.

    That takes the greatest logit of each prediction, little beside the product that made them, and
    waits for the device, as the account of the pass's time does anyway.
    """

    def __init__(self, model: Model, session: Session) -> None:
        self._model = model
        self.inner = session

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
        output = self.inner.feed(rows, tokens, n_last, hidden=hidden)
        refuse_no_numbers(self._model, output.logits)
        return output

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
    if not logits.numel():
        return
    # The greatest of a row is NaN if anything in the row is. Columns of a padded head belong to no
    # token, and may hold anything.
    top = logits[:, : model.tokenizer.n_tokens].amax(-1)
    fine = top.isfinite() if model.max_top_logprobs is None else ~top.isnan()
    if bool(fine.all()):
        return
    worst = top[~fine]
    if bool(worst.isnan().any()):
        what = "no numbers (NaN)"
    else:
        what = "infinite" if bool((worst > 0).any()) else "all minus infinity"
    where = f"server {model.server}" if model.server else f"computing in {model.precision}"
    raise ModelError(
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
