"""One model following the texts of all rows byte by byte, under the exact byte bridge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multicolm.backend.base import Look, Model
from multicolm.backend.byte_session import ByteSession
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.types import Usage

__all__ = ["ByteReader"]


class ByteReader(Reader):
    """A model of bytes.

    Args:
        model: the model.
        index: its index in the ensemble.
        n_slots: how many rows there can be at a time.
        clock: current time in seconds.

    Raises:
        VocabularyError: if the model's tokenizer is not covered by the exact bridge.
    """

    def __init__(self, model: Model, index: int, n_slots: int, clock: Callable[[], float]) -> None:
        self._model = model
        self._index = index
        self._clock = clock
        self._session = ByteSession(model, n_slots)
        self._n_bytes = [0] * n_slots
        self._encoders: dict[int, IncrementalEncoder] = {}
        self.usage = Usage()

    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""
        self._session.begin(row.slot, row.prompt_ids[self._index])
        self._n_bytes[row.slot] = 0
        self._encoders[row.slot] = IncrementalEncoder(self._model.tokenizer)

    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` bytes."""
        if n_tokens < self._n_bytes[row.slot]:
            self._session.truncate(row.slot, n_tokens)
            self._n_bytes[row.slot] = n_tokens

    def length(self, row: Row) -> int:
        """How many own tokens the prompt and the written text have."""
        encoder = self._encoders[row.slot]
        written = bytes(new.token for new in row.written if new.token < 256)
        encoder.append(written[encoder.n_bytes :])
        return len(row.prompt_ids[self._index]) + len(encoder.ids)

    def look(
        self,
        rows: Sequence[Row],
        places: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Look:
        """The log-probabilities of the next byte, or of the end, at one place of each row.

        Args:
            rows: distinct rows.
            places: per row one place, counted in bytes.
            hidden: has to be false: bytes have no hidden states.
        """
        assert not hidden and all(len(wanted) == 1 for wanted in places)
        start = self._clock()
        n_forwards, n_read = self._session.n_forwards, self._session.n_read
        for row, [place] in zip(rows, places, strict=True):
            self.rollback(row, place)
            self._session.feed([row.slot], [bytes(row.ids[self._n_bytes[row.slot] : place])])
            self._n_bytes[row.slot] = place
        logprobs = self._session.next_byte_logprobs([row.slot for row in rows]).float()
        self._model.wait()
        passes, read = self._session.n_forwards - n_forwards, self._session.n_read - n_read
        self._account(rows, passes, read, self._clock() - start)
        return Look(logprobs, None, passes)

    def _account(self, rows: Sequence[Row], n_passes: int, n_read: int, seconds: float) -> None:
        """Rows that are read together share what that took."""
        self.usage += Usage(n_passes, n_read, 0, seconds)
        for i, row in enumerate(rows):
            share = n_read // len(rows) + (i < n_read % len(rows))
            forwards = min(n_passes, 1)
            row.usage[self._index] += Usage(forwards, share, 0, seconds / len(rows))
