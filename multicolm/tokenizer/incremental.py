"""One growing text as one model's tokens, at a cost that does not grow with it.

Tokens on the two sides of a cut (:mod:`multicolm.tokenizer.cuts`) do not depend on each other, so
only what follows the last cut is encoded anew when the text changes. A tokenizer of which
no cuts are known is encoded from the start each time: right, and slow.
"""

from __future__ import annotations

from itertools import pairwise

from multicolm.errors import InputError
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["IncrementalEncoder"]

_CHUNK = 64  # characters between the places to which a text that is cut back can return
_ESCAPED = "".join(map(chr, range(0xDC80, 0xDD00)))  # bytes that are no UTF-8, one by one
_WIDEST = 4  # bytes of a character


class IncrementalEncoder:
    """The tokens of a text that grows and is cut back; a continuation, with nothing put in front.

    Laws: ``ids == adapter.encode_bytes(text)``; everything depends on the text alone, not on the
    pieces it came in nor on what was cut off.

    Example:
        >>> from multicolm.tokenizer.literal import LiteralTokenizer
        >>> encoder = IncrementalEncoder(LiteralTokenizer(["a", "b", "ab"]))
        >>> encoder.append(b"ba")
        >>> encoder.ids, encoder.ends
        ([1, 0], [1, 2])
        >>> encoder.append(b"b")
        >>> encoder.ids, encoder.ends
        ([1, 2], [1, 3])
    """

    def __init__(self, adapter: TokenizerAdapter) -> None:
        self._adapter = adapter
        self._text = bytearray()
        self._ids: list[int] = []
        self._ends: list[int] = []
        self._cuts = [(0, 0)]  # bytes and tokens in front of cuts that the text keeps
        self._is_encoded = True

    def append(self, content: bytes) -> None:
        """Let the text grow, be it in the middle of a character."""
        self._text += content
        self._is_encoded = self._is_encoded and not content

    def truncate(self, n_bytes: int) -> None:
        """Cut the text back to its first ``n_bytes`` bytes.

        Raises:
            InputError: if it does not have as many.
        """
        if not 0 <= n_bytes <= self.n_bytes:
            raise InputError(
                f"a text of {self.n_bytes} bytes cannot be cut back to {n_bytes}; "
                f"give a number from 0 to {self.n_bytes}."
            )
        if n_bytes == self.n_bytes:
            return
        del self._text[n_bytes:]
        # A cut is one because of the characters after it, some of which may be gone.
        cuts = self._adapter.cuts
        n_needed = _WIDEST * cuts.reach if cuts is not None else 0
        while self._cuts[-1][0] > max(0, n_bytes - n_needed):
            self._cuts.pop()
        self._is_encoded = False

    @property
    def n_bytes(self) -> int:
        """Length of the text."""
        return len(self._text)

    @property
    def ids(self) -> list[int]:
        """The tokens of the text.

        This is the encoder's own list, which changes with the text; copy what is to be kept.

        Raises:
            InputError: if the tokenizer has no token for something in the text.
        """
        self._encode()
        return self._ids

    @property
    def ends(self) -> list[int]:
        """Where each token ends, in bytes from the start of the text; the encoder's own list.

        Where the tokenizer changes the text (:meth:`TokenizerAdapter.covers_text`), it is told from
        the tokenizer's spelling, and exact at the cuts only.

        Raises:
            InputError: if the tokenizer has no token for something in the text.
        """
        self._encode()
        return self._ends

    @property
    def stable(self) -> int:
        """How many tokens in front stay whatever follows; there may be a few more than these.

        Raises:
            InputError: if the tokenizer has no token for something in the text.
        """
        self._encode()
        return self._cuts[-1][1]

    def _encode(self) -> None:
        """Encode what follows the last cut."""
        if self._is_encoded:
            return
        begin, n_tokens = self._cuts[-1]
        del self._ids[n_tokens:], self._ends[n_tokens:]
        text = self._text[begin:].decode("utf-8", "surrogateescape")
        done = 0
        inside: list[int] = []
        for place in self._places(text):
            inside.append(place - done)
            if place - done >= _CHUNK:
                self._settle(text[done:place], inside)
                done, inside = place, []
        if inside:
            self._settle(text[done : done + inside[-1]], inside)
            done += inside[-1]
        if text[done:]:
            self._write(text[done:], [])
        self._is_encoded = True

    def _places(self, text: str) -> list[int]:
        """Seams of a text, none of them so late that the rest of a character could undo it."""
        cuts = self._adapter.cuts
        if cuts is None:
            return []
        n_whole = len(text.rstrip(_ESCAPED))
        return list(cuts.places(text, max(0, n_whole - cuts.reach)))

    def _settle(self, text: str, places: list[int]) -> None:
        """Write a part of the text that ends at a cut."""
        self._write(text, places[:-1])
        n_bytes = self._cuts[-1][0] + len(_as_bytes(text))
        self._cuts.append((n_bytes, len(self._ids)))

    def _write(self, text: str, places: list[int]) -> None:
        """Add the tokens of a part of the text after the last cut.

        Args:
            text: the part.
            places: the cuts inside of it.
        """
        begin = self._cuts[-1][0]
        content = _as_bytes(text)
        ids = self._adapter.encode_bytes(content)
        if self._adapter.decode(ids) == content:
            self._ids += ids
            self._ends += self._counted(ids, begin)
            return
        for first, last in pairwise((0, *places, len(text))):
            content = _as_bytes(text[first:last])
            ids = self._adapter.encode_bytes(content)
            end = begin + len(content)
            self._ids += ids
            if ids:
                self._ends += [min(e, end) for e in self._counted(ids[:-1], begin)]
                self._ends.append(end)
            begin = end

    def _counted(self, ids: list[int], begin: int) -> list[int]:
        """Where tokens end that are written one after another."""
        ends: list[int] = []
        for token_id in ids:
            begin += len(self._adapter.token_bytes(token_id))
            ends.append(begin)
        return ends


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
