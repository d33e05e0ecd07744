"""Where a text stops thinking and begins to answer: markers, found in what was written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from multicolm.types import PieceKind

__all__ = ["Part", "Thinking", "split"]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of what was written.

    Attributes:
        text: that markers and stop strings are looked for in.
        writer: who wrote it.
        is_shown: whether it is text, and not the name of a special token.
        kind: whether it thinks, answers, or marks the one off from the other.
    """

    text: str
    writer: int
    is_shown: bool = True
    kind: PieceKind = "answer"


class Thinking:
    r"""Follows one text through what it thinks to what it answers.

    A text thinks from ``start``, which is the first thing in it or the last in its prompt, up to
    ``end``; a text that begins otherwise does not think. Blank space after a marker belongs to it.

    Args:
        start: such as ``<think>``.
        end: such as ``</think>``.
        is_open: whether the prompt ends with ``start``.

    Example:
        >>> thinking = Thinking("<think>", "</think>", is_open=False)
        >>> [(p.text, p.kind) for p in thinking.push(Part("<think>\n1 + 1 </thi", 0))]
        [('<think>', 'marker'), ('\n', 'marker'), ('1 + 1 ', 'reasoning')]
        >>> [(p.text, p.kind) for p in thinking.push(Part("nk>\n\n2", 0))]
        [('</thi', 'marker'), ('nk>', 'marker'), ('\n\n', 'marker'), ('2', 'answer')]
    """

    def __init__(self, start: str, end: str, *, is_open: bool) -> None:
        self._start = start
        self._end = end
        self._held: list[Part] = []
        # What is next: the first marker, blank space, thoughts up to the other marker, blank
        # space, the answer.
        self._next: Literal["start", "gap", "end", "last gap", "answer"]
        self._next = "gap" if is_open else "start"

    @property
    def is_open(self) -> bool:
        """Whether it thinks now."""
        return self._next in ("gap", "end")

    @property
    def is_over(self) -> bool:
        """Whether it answers, or does from the next token on that is not blank."""
        return self._next in ("last gap", "answer")

    def push(self, new: Part, *, last: bool = False) -> list[Part]:
        """Add what was written; returns what is certain of it, by its kind.

        Args:
            new: the next stretch of the text.
            last: whether there is nothing after it.
        """
        self._held.append(new)
        out: list[Part] = []
        while self._held and self._advance(out):
            pass
        if last:
            self._take(out, self._length, "reasoning" if self.is_open else "answer")
        return out

    def _advance(self, out: list[Part]) -> bool:
        """Go one step on in what is held; whether there may be another one."""
        text = "".join(part.text for part in self._held)
        blank = len(text) - len(text.lstrip())
        if self._next == "start":
            rest = text[blank:]
            if rest.startswith(self._start):
                self._take(out, blank + len(self._start), "marker")
                self._next = "gap"
                return True
            if self._start.startswith(rest):
                return False
            self._next = "answer"
            return True
        if self._next in ("gap", "last gap"):
            self._take(out, blank, "marker")
            if blank < len(text):
                self._next = "end" if self._next == "gap" else "answer"
                return True
            return False
        if self._next == "end":
            at = text.find(self._end)
            self._take(out, at if at >= 0 else len(text) - self._n_possible(text), "reasoning")
            if at >= 0:
                self._take(out, len(self._end), "marker")
                self._next = "last gap"
            return at >= 0
        self._take(out, len(text), "answer")
        return False

    def _n_possible(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins the end marker."""
        longest = min(len(self._end) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(self._end[:n])), 0)

    def _take(self, out: list[Part], length: int, kind: PieceKind) -> None:
        taken, self._held = split(self._held, length)
        out += [replace(part, kind=kind) for part in taken]

    @property
    def _length(self) -> int:
        return sum(len(part.text) for part in self._held)


def split(parts: Sequence[Part], length: int) -> tuple[list[Part], list[Part]]:
    """The first ``length`` characters of a text in parts, and the rest."""
    before: list[Part] = []
    after: list[Part] = []
    for part in parts:
        if part.text[:length]:
            before.append(replace(part, text=part.text[:length]))
        if part.text[length:]:
            after.append(replace(part, text=part.text[length:]))
        length = max(0, length - len(part.text))
    return before, after
