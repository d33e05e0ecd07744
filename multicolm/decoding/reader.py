"""One model following the texts of all rows, through its own tokens and its own cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import ModelOutput
from multicolm.backend.passes import Passes, PassResult
from multicolm.decoding.row import Row
from multicolm.types import Pooling, Usage

__all__ = ["Reader"]


class Reader(ABC):
    """One model following the texts of all rows.

    Attributes:
        usage: what it did for all of them together.
    """

    usage: Usage
    _index: int

    @abstractmethod
    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""

    @abstractmethod
    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` tokens; what was read after them is void."""

    @abstractmethod
    def length(self, row: Row) -> int:
        """How many own tokens the prompt and the text that is written have."""

    @abstractmethod
    def forward(
        self,
        rows: Sequence[Row],
        places: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Passes[ModelOutput]:
        """What the model predicts at some places of each row.

        Args:
            rows: distinct rows.
            places: per row, ascending places at which it can continue; place ``i`` is before token
                ``i`` of the text.
            hidden: whether hidden states are wanted.

        Returns:
            Predictions over the ensemble's vocabulary, row after row, by ascending place.
        """

    def read_ahead(self, row: Row, n_tokens: int) -> Passes[bool]:
        """Read so many tokens of a prompt, of which nothing is wanted yet but the cache.

        Returns:
            Whether what is left of it is no more than that.
        """
        yield from ()
        return True

    def logprobs_of(
        self, rows: Sequence[Row], places: Sequence[int], ids: Sequence[Int[Tensor, "_"]]
    ) -> Passes[list[Float[Tensor, "_"]]]:
        """Log-probabilities of given own tokens at places at which it was just run, in nats.

        Asked of models in servers that do not return all tokens.

        Args:
            rows: per place its row; rows may come several times.
            places: of the rows' texts.
            ids: per place, own tokens.
        """
        raise NotImplementedError(f"a {type(self).__name__} returns all tokens")

    def prompt_mean_nll(self, row: Row) -> Passes[float]:
        """How unlikely the model finds the row's prompt, in nats per token of the base model's.

        Its own first token, which nothing predicts, does not count. Asked before anything is
        written.
        """
        raise NotImplementedError(f"a {type(self).__name__} scores no prompts")

    def prompt_hidden(
        self, rows: Sequence[Row], pooling: Collection[Pooling]
    ) -> Passes[dict[Pooling, Float[Tensor, "rows hidden"]]]:
        """The model's last hidden states of the rows' prompts, pooled in the ways asked for.

        Asked before anything is written.
        """
        raise NotImplementedError(f"a {type(self).__name__} has no hidden states of prompts")

    def draft_nll(self, rows: Sequence[Row]) -> Passes[list[tuple[float, int]]]:
        """How unlikely the model finds what follows the written tokens of some rows.

        Returns:
            Per row, nats, and over how many own tokens. An own token that began before counts as a
            whole; an end of text counts as one, however the model would end it.
        """
        raise NotImplementedError(f"a {type(self).__name__} scores no drafts")

    def text_nll(self, row: Row, place: int) -> float:
        """How unlikely the model finds the text before a place at which it was just run.

        In nats, its prompt given, over its own tokens. Asked of readers that were made to score
        the text.
        """
        raise NotImplementedError(f"a {type(self).__name__} scores no text")

    def is_settled(self, row: Row) -> bool:
        """Whether the model can continue after what is written, whatever else might follow."""
        return True

    def can_start_at(
        self, row: Row, places: Sequence[int], token: int, writer: int
    ) -> dict[int, bool | None]:
        """Where the model could continue, if the text continues as predicted.

        Args:
            row: the text, and after it what is predicted.
            places: ascending.
            token: predicted at the last place.
            writer: of that token.

        Returns:
            Per place whether it can; ``None`` where that cannot be known together with the places
            before, from there on.
        """
        return dict.fromkeys(places, True)

    def _account(
        self, rows: Sequence[Row], fed: Sequence[Sequence[int]], result: PassResult
    ) -> None:
        """Note what was fed together, for all rows and for each; and which of them failed."""
        output, seconds = result.output, result.seconds
        n_read = sum(map(len, fed))
        for number, error in result.errors.items():
            rows[number].error = error
        self.usage += Usage(output.n_passes, n_read, 0, seconds, output.n_calls)
        calls = output.calls_of or [0] * len(rows)
        for number, (row, new, n_calls) in enumerate(zip(rows, fed, calls, strict=True)):
            # What a server foresaw is no pass of its own, nor what another model's pass includes.
            n_passes = 0 if number in result.again or (output.calls_of and not n_calls) else 1
            share = seconds * len(new) / n_read
            row.usage[self._index] += Usage(n_passes, len(new), 0, share, n_calls)
