"""From bytes of several writers to text that can be shown, stop strings included."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

__all__ = ["TextStream"]


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of what was written.

    Attributes:
        text: that stop strings are looked for in.
        writer: who wrote it.
        is_shown: whether it is text, and not the name of a special token.
    """

    text: str
    writer: int
    is_shown: bool = True


class TextStream:
    """Grows a text by bytes and lets out what is certain to stay.

    Half a UTF-8 character is held back until it is whole; so is text that may become a stop
    string. Bytes that are no UTF-8 show as U+FFFD. A stop string may name special tokens, which
    are no part of the text; it holds the whole name of one or nothing of it.

    Args:
        stops: strings that end the text; they may straddle tokens and writers.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[_Part] = []
        self._shown: list[str] = []
        self._last_writer = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that was let out."""
        return "".join(self._shown)

    def push(self, content: bytes, writer: int, special: str = "") -> list[tuple[str, int]]:
        """Add what ``writer`` wrote; returns new pieces of text with their writers.

        Sets :attr:`stopped` when a stop string is complete; the text ends before it.

        Args:
            content: of a token of text.
            writer: the index of its model.
            special: the name of a special token, where that was written.
        """
        if special and self._stops:
            return self._let_out(_Part(special, writer, is_shown=False), last=False)
        if content:
            self._last_writer = writer
        new = self._decoder.decode(content)
        return self._let_out(_Part(new, writer), last=False) if new else []

    def finish(self) -> list[tuple[str, int]]:
        """The text ends here: let out what was held back."""
        if self.stopped:
            return []
        rest = self._decoder.decode(b"", final=True)
        return self._let_out(_Part(rest, self._last_writer), last=True)

    def _let_out(self, new: _Part, *, last: bool) -> list[tuple[str, int]]:
        parts = [*self._held, new]
        text = "".join(part.text for part in parts)
        ends = list(accumulate(len(part.text) for part in parts))
        # Places that lie within the name of a special token.
        within = {
            place
            for part, end in zip(parts, ends, strict=True)
            if not part.is_shown
            for place in range(end - len(part.text) + 1, end)
        }
        found = [at for stop in self._stops if (at := _find(text, stop, within)) >= 0]
        if found:
            n_certain, self.stopped = min(found), True
        else:
            n_certain = len(text) if last else len(text) - self._n_possible(text, within)
        out, self._held = _split(parts, n_certain)
        self._shown.extend(part.text for part in out if part.is_shown)
        return [(part.text, part.writer) for part in out if part.is_shown]

    def _n_possible(self, text: str, within: Collection[int]) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if len(text) - length not in within and text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _find(text: str, stop: str, within: Collection[int]) -> int:
    """Where a stop string is that neither begins nor ends within a name; -1 if nowhere."""
    at = text.find(stop)
    while at >= 0 and (at in within or at + len(stop) in within):
        at = text.find(stop, at + 1)
    return at


def _split(parts: Sequence[_Part], length: int) -> tuple[list[_Part], list[_Part]]:
    before: list[_Part] = []
    after: list[_Part] = []
    for part in parts:
        if part.text[:length]:
            before.append(replace(part, text=part.text[:length]))
        if part.text[length:]:
            after.append(replace(part, text=part.text[length:]))
        length = max(0, length - len(part.text))
    return before, after
