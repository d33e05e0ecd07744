"""Models that follow the texts of all rows byte by byte, under the exact byte bridge."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput
from multicolm.backend.passes import Passes
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row
from multicolm.exact.byte_session import ByteSession, Pieces
from multicolm.exact.lattice import N_OUTCOMES
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.types import Usage

__all__ = ["ByteReader", "ExactReader"]


class _Bytes(Reader):
    """Follows texts as bytes.

    Args:
        model: the model.
        index: its index in the ensemble.
        n_slots: how many rows there can be at a time.

    Raises:
        VocabularyError: if the model's tokenizer is not covered by the exact bridge.
    """

    def __init__(self, model: Model, index: int, n_slots: int) -> None:
        self._model = model
        self._index = index
        self._session = ByteSession(model, n_slots)
        self._ends: list[list[int]] = [[0] for _ in range(n_slots)]  # in bytes, per place
        self._n_fed = [0] * n_slots
        self._encoders: dict[int, IncrementalEncoder] = {}
        self.usage = Usage()

    @property
    @abstractmethod
    def _n_outcomes(self) -> int:
        """How many numbers a prediction has."""

    @abstractmethod
    def _content(self, token: int) -> bytes:
        """What a token adds to the text."""

    @abstractmethod
    def _shown(
        self, slots: Sequence[int], places: Sequence[Sequence[int]]
    ) -> Passes[Float[Tensor, "positions vocab"]]:
        """What the model predicts after some numbers of bytes of the texts in some slots."""

    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""
        self._session.begin(row.slot, row.prompt_ids[self._index])
        self._ends[row.slot] = [0]
        self._n_fed[row.slot] = 0
        self._encoders[row.slot] = IncrementalEncoder(self._model.tokenizer)

    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` tokens."""
        ends = self._ends[row.slot]
        if n_tokens < len(ends) - 1:
            del ends[n_tokens + 1 :]
            self._cut(row.slot, ends[-1])

    def _cut(self, slot: int, n_bytes: int) -> None:
        if n_bytes < self._n_fed[slot]:
            self._session.truncate(slot, n_bytes)
            self._n_fed[slot] = n_bytes

    def length(self, row: Row) -> int:
        """How many own tokens the prompt and the written text have."""
        encoder = self._encoders[row.slot]
        written = b"".join(self._content(new.token) for new in row.written)
        encoder.append(written[encoder.n_bytes :])
        return len(row.prompt_ids[self._index]) + len(encoder.ids)

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
            places: per row, ascending.
            hidden: has to be false: what is summed over many paths has no hidden state.
        """
        assert not hidden
        session = self._session
        n_forwards, n_read, n_calls = session.n_forwards, session.n_read, session.n_calls
        seconds = session.seconds
        for row, wanted in zip(rows, places, strict=True):
            self._feed(row, wanted[-1])
        ends = [
            [self._ends[row.slot][place] for place in wanted]
            for row, wanted in zip(rows, places, strict=True)
        ]
        shown, unspelled = yield from self._shown_where_spelled([row.slot for row in rows], ends)
        for row in rows:
            row.error = session.errors.get(row.slot, row.error)
        passes, read = session.n_forwards - n_forwards, session.n_read - n_read
        calls = session.n_calls - n_calls
        self._share_out(rows, Usage(passes, read, 0, session.seconds - seconds, calls))
        return ModelOutput(shown, None, passes, calls, unspelled=unspelled)

    def _shown_where_spelled(
        self, slots: Sequence[int], places: Sequence[Sequence[int]]
    ) -> Passes[tuple[Float[Tensor, "positions vocab"], tuple[int, ...]]]:
        """What the model predicts, and the lines of texts that it cannot spell."""
        covered = [
            [self._session.is_covered(slot, place) for place in wanted]
            for slot, wanted in zip(slots, places, strict=True)
        ]
        flags = [flag for each in covered for flag in each]
        if all(flags):
            return (yield from self._shown(slots, places)), ()
        some = [slot for slot, each in zip(slots, covered, strict=True) if any(each)]
        kept = [
            [place for place, flag in zip(wanted, each, strict=True) if flag]
            for wanted, each in zip(places, covered, strict=True)
        ]
        shown = torch.zeros(len(flags), self._n_outcomes)
        if some:
            spelled = yield from self._shown(some, [wanted for wanted in kept if wanted])
            shown[torch.tensor(flags)] = spelled
        return shown, tuple(line for line, flag in enumerate(flags) if not flag)

    def _feed(self, row: Row, place: int) -> None:
        """Let the model's text be the row's up to a place."""
        slot, ends = row.slot, self._ends[row.slot]
        # What has been followed beyond the place stands until the text is cut.
        if place < len(ends) and ends[place] <= self._n_fed[slot]:
            return
        while len(ends) <= place:
            ends.append(ends[-1] + len(self._content(row.ids[len(ends) - 1])))
        first = bisect_right(ends, self._n_fed[slot]) - 1
        text = b"".join(self._content(token) for token in row.ids[first:place])
        self._session.feed([slot], [text])
        self._n_fed[slot] = ends[place]

    def _share_out(self, rows: Sequence[Row], used: Usage) -> None:
        """Rows that are read together share what that took."""
        self.usage += used
        for i, row in enumerate(rows):
            n_read = used.tokens_read // len(rows) + (i < used.tokens_read % len(rows))
            seconds = used.seconds / len(rows)
            row.usage[self._index] += Usage(min(used.forwards, 1), n_read, 0, seconds, used.calls)


class ByteReader(_Bytes):
    """A model that shows the next byte, of texts that are written in bytes."""

    @property
    def _n_outcomes(self) -> int:
        return N_OUTCOMES

    def _content(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def _shown(
        self, slots: Sequence[int], places: Sequence[Sequence[int]]
    ) -> Passes[Float[Tensor, "positions vocab"]]:
        return (yield from self._session.read_next_bytes(slots, places)).float()


class ExactReader(_Bytes):
    """A model that shows what it would write next, wherever in its own token the text ends.

    Args:
        model: the model.
        index: its index in the ensemble.
        vocabulary: what the ensemble writes in.
        n_slots: how many rows there can be at a time.
    """

    def __init__(
        self,
        model: Model,
        index: int,
        vocabulary: BridgedVocabulary,
        n_slots: int,
    ) -> None:
        super().__init__(model, index, n_slots)
        self._vocabulary = vocabulary
        self._starts, self._ids = vocabulary.ends_of_tokens(index)
        self._end = min(vocabulary.end_ids(index), default=-1)

    @property
    def _n_outcomes(self) -> int:
        return self._vocabulary.size

    def can_start_at(
        self, row: Row, places: Sequence[int], token: int, writer: int
    ) -> dict[int, bool | None]:
        """Anywhere, unless others have written bytes that no tokens of its own spell."""
        # The text up to the last place is followed once; cut back, all would be learned again.
        self._feed(row, places[-1])
        ends = self._ends[row.slot]
        return {place: self._session.is_covered(row.slot, ends[place]) for place in places}

    def _content(self, token: int) -> bytes:
        return self._vocabulary.token_bytes(token)

    def _shown(
        self, slots: Sequence[int], places: Sequence[Sequence[int]]
    ) -> Passes[Float[Tensor, "positions vocab"]]:
        found = yield from self._session.read_pieces(slots, places)
        shown = torch.full((len(found), self._vocabulary.size), float("-inf"))
        for line, pieces in zip(shown, found, strict=True):
            if pieces is None:
                line.zero_()  # the text ends with an error
            else:
                self._spread(pieces, line)
        return shown

    def _spread(self, pieces: Pieces, line: Float[Tensor, "vocab"]) -> None:
        """Put pieces where the ensemble's vocabulary has them; equal ones are added up."""
        ids = [self._ids[self._starts[b.ids] + b.n_cut] for b in pieces.continuations]
        logprobs = [branch.logprobs for branch in pieces.continuations]
        if self._end >= 0:
            ids.append(torch.tensor([self._end]))
            logprobs.append(torch.tensor([pieces.end_logprob]))
        index, values = torch.cat(ids).long(), torch.cat(logprobs).double()
        sums = torch.zeros(len(line), dtype=torch.float64).index_add_(0, index, values.exp())
        line.copy_(sums.log().float())
