"""From bytes of several writers to text that can be shown, stop strings included."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Grows a text by bytes and lets out what is certain to stay.

    Half a UTF-8 character is held back until it is whole; so is text that may become a stop
    string. Bytes that are no UTF-8 show as U+FFFD.

    Args:
        stops: strings that end the text; they may straddle tokens and writers.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[tuple[str, int]] = []
        self._shown: list[str] = []
        self._last_writer = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that was let out."""
        return "".join(self._shown)

    def push(self, content: bytes, writer: int) -> list[tuple[str, int]]:
        """Add what ``writer`` wrote; returns new pieces of text with their writers.

        Sets :attr:`stopped` when a stop string is complete; the text ends before it.
        """
        if content:
            self._last_writer = writer
        new = self._decoder.decode(content)
        return self._let_out(new, writer, last=False) if new else []

    def finish(self) -> list[tuple[str, int]]:
        """The text ends here: let out what was held back."""
        if self.stopped:
            return []
        return self._let_out(self._decoder.decode(b"", final=True), self._last_writer, last=True)

    def _let_out(self, new: str, writer: int, *, last: bool) -> list[tuple[str, int]]:
        pieces = [*self._held, (new, writer)]
        text = "".join(piece for piece, _ in pieces)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            n_certain, self.stopped = min(found), True
        else:
            n_certain = len(text) if last else len(text) - self._n_possible(text)
        out, self._held = _split(pieces, n_certain)
        self._shown.extend(piece for piece, _ in out)
        return out

    def _n_possible(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _split(
    pieces: Sequence[tuple[str, int]], length: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    before: list[tuple[str, int]] = []
    after: list[tuple[str, int]] = []
    for text, writer in pieces:
        if text[:length]:
            before.append((text[:length], writer))
        if text[length:]:
            after.append((text[length:], writer))
        length = max(0, length - len(text))
    return before, after
