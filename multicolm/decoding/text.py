"""From bytes of several writers to text that can be shown, stop strings included."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from multicolm.decoding.thinking import Part, Thinking, split
from multicolm.types import PieceKind

__all__ = ["Shown", "TextStream"]


class Shown(NamedTuple):
    """A piece of text that is certain to stay.

    Attributes:
        text: of it, never empty.
        writer: the index of its model.
        kind: see :class:`multicolm.types.Piece`.
    """

    text: str
    writer: int
    kind: PieceKind = "answer"


class TextStream:
    """Grows a text by bytes and lets out what is certain to stay.

    Half a UTF-8 character is held back until it is whole; so is text that may become a stop
    string. Bytes that are no UTF-8 show as U+FFFD. A stop string may name special tokens, which
    are no part of the text; it holds the whole name of one or nothing of it.

    Attributes:
        stopped: whether a stop string was found.
        content_start: how many characters of :attr:`text` come before what it answers: what it has
            thought, and the markers around that.

    Args:
        stops: strings that end the text; they may straddle tokens and writers. They are looked for
            in what it answers, not in what it thinks.
        thinking: tells the two apart; a text without one only answers.
    """

    def __init__(self, stops: Sequence[str] = (), thinking: Thinking | None = None) -> None:
        self._stops = tuple(stops)
        self._thinking = thinking
        self._thoughts: list[str] = []
        self.content_start = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[Part] = []
        self._shown: list[str] = []
        self._last_writer = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that was let out."""
        return "".join(self._shown)

    @property
    def content(self) -> str:
        """What was let out of the answer, without thoughts."""
        return self.text[self.content_start :]

    @property
    def is_thinking(self) -> bool:
        """Whether it thinks, or has not begun to write yet and may."""
        return self._thinking is not None and not self._thinking.is_over

    @property
    def has_open_thoughts(self) -> bool:
        """Whether it thinks, and has not closed its thoughts yet."""
        return self._thinking is not None and self._thinking.is_open

    @property
    def reasoning(self) -> str:
        """What it has thought, without markers."""
        return "".join(self._thoughts)

    def push(self, content: bytes, writer: int, special: str = "") -> list[Shown]:
        """Add what ``writer`` wrote; returns new pieces of text with their writers and kinds.

        Sets :attr:`stopped` when a stop string is complete; the text ends before it.

        Args:
            content: of a token of text.
            writer: the index of its model.
            special: the name of a special token, where that was written.
        """
        if special and (self._stops or self._thinking is not None):
            return self._let_out(Part(special, writer, is_shown=False), last=False)
        if content:
            self._last_writer = writer
        new = self._decoder.decode(content)
        return self._let_out(Part(new, writer), last=False) if new else []

    def finish(self) -> list[Shown]:
        """The text ends here: let out what was held back."""
        if self.stopped:
            return []
        rest = self._decoder.decode(b"", final=True)
        return self._let_out(Part(rest, self._last_writer), last=True)

    def _let_out(self, new: Part, *, last: bool) -> list[Shown]:
        parts = [new] if self._thinking is None else self._thinking.push(new, last=last)
        thoughts = [part for part in parts if part.kind != "answer"]
        return [*self._show(thoughts), *self._answer(parts[len(thoughts) :], last=last)]

    def _show(self, parts: Sequence[Part]) -> list[Shown]:
        shown = [Shown(part.text, part.writer, part.kind) for part in parts if part.is_shown]
        self._shown += [part.text for part in shown]
        self._thoughts += [part.text for part in shown if part.kind == "reasoning"]
        self.content_start += sum(len(part.text) for part in shown if part.kind != "answer")
        return shown

    def _answer(self, new: Sequence[Part], *, last: bool) -> list[Shown]:
        parts = [*self._held, *new]
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
        out, self._held = split(parts, n_certain)
        return self._show(out)

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
