"""Models that follow the texts of all rows character by character, as CharED does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from multicolm.backend.base import Model, ModelOutput
from multicolm.backend.checked import CheckedSession
from multicolm.backend.passes import ForwardPass, Passes
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row
from multicolm.errors import InputError, ModelError
from multicolm.exact.character_vocabulary import CharacterVocabulary
from multicolm.types import Usage

__all__ = ["CharacterReader"]


@dataclass
class _Table:
    """What a model would write next, as characters: CharED's table of one model.

    Attributes:
        own: the tokens that the model has read.
        probs: per token in the order of its characters, its probability; empty before it is asked.
        end: probability that the text ends; only before the first character.
        low: first of the tokens that begin with what was written since the model was asked.
        high: after the last of them.
        written: the characters written since then.
        n_followed: how many characters of the text it has followed, ends of tokens counted.
    """

    own: list[int]
    probs: Float[np.ndarray, "tokens"] = field(default_factory=lambda: np.zeros(0))
    end: float = 0.0
    low: int = 0
    high: int = 0
    written: list[int] = field(default_factory=list)
    n_followed: int = 0

    @property
    def mass(self) -> float:
        """Probability of all that can still come."""
        ends = 0.0 if self.written else self.end
        return float(self.probs[self.low : self.high].sum()) + ends


class CharacterReader(Reader):
    """A model that shows the next character of what it would write.

    It is asked for its next token; while characters are written, the strings of the tokens that
    begin with them stay, less these characters. Where a token ends, or none begins so, it is
    asked again after what was written: the token that it is, if one of the strings is exactly
    that, else the text in the model's own encoding.

    Args:
        model: the model.
        index: its index in the ensemble.
        vocabulary: the characters.
        session: one of the model's, in which a row's slot is its row.

    Source:
        CharED, arXiv 2407.11009, algorithm 1.
    """

    def __init__(
        self,
        model: Model,
        index: int,
        vocabulary: CharacterVocabulary,
        session: CheckedSession,
    ) -> None:
        self._model = model
        self._index = index
        self._vocabulary = vocabulary
        self._sorted = vocabulary.sorted(index)
        self._ends = np.array(sorted(model.tokenizer.end_ids), dtype=np.int64)
        self._session = session
        self._tables: dict[int, _Table] = {}
        self.usage = Usage()

    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""
        self._session.truncate(row.slot, 0)
        self._tables[row.slot] = _Table(list(row.prompt_ids[self._index]))

    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` characters; cut further back, it is read anew."""
        if n_tokens < self._tables[row.slot].n_followed:
            self.start(row)

    def length(self, row: Row) -> int:
        """How many own tokens the prompt and the text have; what is not read yet is encoded."""
        table = self._tables[row.slot]
        unread = b"".join(self._vocabulary.token_bytes(c) for c in row.ids[table.n_followed :])
        pending = self._content(table) + unread
        return len(table.own) + len(self._model.tokenizer.encode_bytes(pending))

    def forward(
        self,
        rows: Sequence[Row],
        places: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Passes[ModelOutput]:
        """What the model would write next at one place of each row: its next character.

        Args:
            rows: distinct rows.
            places: per row, one place.
            hidden: has to be false: between the ends of tokens there is no hidden state.
        """
        assert not hidden and all(len(wanted) == 1 for wanted in places)
        n_passes = 0
        waiting = {row: place for row, [place] in zip(rows, places, strict=True)}
        # A row that was cut back may have to ask several times; else this is one round.
        while waiting := {
            row: place
            for row, place in waiting.items()
            if row.error is None and not self._follow(row, place)
        }:
            n_passes += yield from self._ask(list(waiting))
        even = np.ones(self._vocabulary.size)
        shown = np.stack(
            [even if row.error else self._shown(self._tables[row.slot]) for row in rows]
        )
        return ModelOutput(torch.from_numpy(shown).log().float(), None, n_passes)

    def _follow(self, row: Row, place: int) -> bool:
        """Follow the characters up to a place; false where the model has to be asked first."""
        table = self._tables[row.slot]
        while len(table.probs):
            if table.n_followed == place:
                return True
            character = row.ids[table.n_followed]
            table.n_followed += 1
            if character == self._vocabulary.null:
                self._end_token(table)
            else:
                depth = len(table.written)
                table.written.append(character)
                table.low, table.high = self._sorted.narrow(table.low, table.high, depth, character)
                if not table.mass > 0:
                    try:
                        self._take(table, self._encoded(table))
                    except InputError as error:
                        row.error = error
                        return True
        return False

    def _end_token(self, table: _Table) -> None:
        """A token ends here, for every model that can spell what was written."""
        try:
            self._take(table, self._encoded(table))
        except InputError:
            # It has no tokens for a part of its own token, and continues within that.
            return

    def _encoded(self, table: _Table) -> list[int]:
        """What was written since the model was asked, as tokens of its own.

        Raises:
            InputError: if it has no tokens for that.
        """
        if table.written and table.low < table.high:
            # The strings are sorted: the one that ends here comes first.
            following = self._sorted.next(table.low, table.high, len(table.written))
            if following[0] == -1:
                return [int(self._sorted.ids[table.low])]
        return self._model.tokenizer.encode_bytes(self._content(table))

    def _take(self, table: _Table, tokens: Sequence[int]) -> None:
        """Tokens have been written; the model has to be asked after them."""
        table.own += tokens
        table.probs = np.zeros(0)
        table.written.clear()

    def _content(self, table: _Table) -> bytes:
        return b"".join(self._vocabulary.token_bytes(c) for c in table.written)

    def _ask(self, rows: Sequence[Row]) -> Passes[int]:
        """Ask for the next token of some rows; returns the number of passes."""
        ordered = sorted(rows, key=lambda row: row.slot)
        slots = [row.slot for row in ordered]
        fed = []
        for slot in slots:
            # An end of a token right after another one adds nothing: the last is read again.
            keep = min(self._session.lengths[slot], len(self._tables[slot].own) - 1)
            self._session.truncate(slot, keep)
            fed.append(self._tables[slot].own[keep:])
        [result] = yield [ForwardPass(self._session, slots, fed, [1] * len(slots))]
        output = result.output
        self._account(ordered, fed, result)
        known = output.logits[:, : self._model.tokenizer.n_tokens].float().softmax(-1)
        for row, probs in zip(ordered, known.cpu().double().numpy(), strict=True):
            table = self._tables[row.slot]
            table.probs = probs[self._sorted.ids]
            table.end = float(probs[self._ends].sum())
            table.low, table.high = 0, len(self._sorted)
            if not table.mass > 0:
                row.error = ModelError(
                    f"model '{self._model.name}' puts all of its probability on special tokens "
                    "that are no text and do not end one, so it has no next character to show."
                )
        return output.n_passes

    def _shown(self, table: _Table) -> Float[np.ndarray, "vocab"]:
        """Probabilities of the next character, of the end of the token and of the text."""
        probs = table.probs[table.low : table.high]
        following = self._sorted.next(table.low, table.high, len(table.written))
        is_end = following < 0
        # Of nothing at all, bincount makes whole numbers.
        sums = np.bincount(following[~is_end], probs[~is_end], self._vocabulary.size).astype(float)
        sums[self._vocabulary.null] = probs[is_end].sum()
        sums[self._vocabulary.end] = 0.0 if table.written else table.end
        shown: Float[np.ndarray, "vocab"] = sums / sums.sum()
        return shown
