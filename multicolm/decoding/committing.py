"""Decided tokens become text."""

from __future__ import annotations

from collections.abc import Sequence

from multicolm.decoding.plan import Plan
from multicolm.decoding.readers import Readers
from multicolm.decoding.row import Row, Written
from multicolm.decoding.text import Shown
from multicolm.types import Piece

__all__ = ["Committer"]


class Committer:
    """Writes decided tokens, lets out the text that became certain, and ends texts.

    Args:
        plan: the policy and its models.
        readers: know whether a text still fits into every context.
    """

    def __init__(self, plan: Plan, readers: Readers) -> None:
        self._plan = plan
        self._readers = readers

    def write(self, row: Row, new: Written) -> list[Piece]:
        """Write one token, after which the text may be finished."""
        row.write(new)
        vocabulary, pieces = self._plan.vocabulary, []
        at_end = new.token in self._plan.end_ids[new.writer]
        if not at_end:
            content = vocabulary.token_bytes(new.token)
            if row.meter is not None:
                row.meter.append(content)
            special = "" if content else vocabulary.name(new.token)
            pieces += self._pieces(row, row.text.push(content, new.writer, special))
        for k in self._plan.used:
            row.lengths[k] += vocabulary.n_read(k, new.token)
        if row.text.stopped:
            row.finish_reason = "stop"
        elif at_end:
            row.finish_reason = "eos"
        elif row.n_tokens >= row.max_new_tokens:
            row.finish_reason = "length"
        elif not self._readers.fits(row):
            row.finish_reason = "context"
        if row.finish_reason is not None:
            pieces += self._pieces(row, row.text.finish())
        return pieces

    def close_thoughts(self, row: Row) -> list[Piece]:
        """Write the end of thinking in a text whose budget for it is used up.

        No model was asked: it is the base model's, and nothing else could have come.
        """
        ids, row.end_of_thinking = row.end_of_thinking, ()
        return self.write_all(row, [Written(token, 0, 0.0, None) for token in ids])

    def end(self, row: Row) -> list[Piece]:
        """End a text where its policy wants it to end."""
        row.finish_reason = "stop"
        return self._pieces(row, row.text.finish())

    def write_all(self, row: Row, tokens: Sequence[Written]) -> list[Piece]:
        """Write tokens until the text is finished, or has to stop thinking."""
        pieces: list[Piece] = []
        for new in tokens:
            pieces += self.write(row, new)
            if row.finish_reason is not None or row.thinking_is_used_up:
                break
        return pieces

    def _pieces(self, row: Row, parts: Sequence[Shown]) -> list[Piece]:
        return [
            Piece(row.number, text, self._plan.name(writer), kind) for text, writer, kind in parts
        ]
