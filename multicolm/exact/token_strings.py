"""What the tokens of a byte-pair encoding lead to, character by character."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from multicolm.exact.patterns import Atoms
from multicolm.exact.pretokens import DEAD, Splitter

__all__ = ["Part", "Row", "TokenStrings", "unfinished"]

_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


@dataclass(frozen=True)
class Part:
    """The tokens that may follow an unfinished character (or none), as strings of atoms.

    Attributes:
        slots: their slots, ascending.
        columns: per place in the string: the tokens that reach it (their numbers), and the atoms.
        n_atoms: per token, the length of its string.
        tails: per token, the bytes of the unfinished character it ends with.
    """

    slots: Int[np.ndarray, "some"]
    columns: list[tuple[np.ndarray, np.ndarray]]
    n_atoms: Int[np.ndarray, "some"]
    tails: list[bytes]


@dataclass
class Row:
    """What the tokens of a part lead to from one place of the splitter.

    Attributes:
        outcome: per token the arrival, or the place if it ends with an unfinished character; -1.
        is_live: which of them can be continued to a text, after a cut (True) and else (False).
    """

    outcome: Int[np.ndarray, "some"]
    is_live: dict[bool, Bool[np.ndarray, "some"]] = field(default_factory=dict)


class TokenStrings:
    """Tokens as strings of atoms, and where the splitter is after them.

    Args:
        ids: per slot, the token's id.
        contents: per slot, the token's bytes.
        is_plain: per slot, whether it is a token of the vocabulary, not an added one.
        byte_ids: ids of tokens that stand for one byte.
        known: characters that have a token, for which bytes never stand.
        atoms: classes of characters that the splitter distinguishes.
        splitter: cuts a text as the pre-tokenizer does.
    """

    def __init__(
        self,
        ids: Int[np.ndarray, "slots"],
        contents: Sequence[bytes],
        is_plain: Bool[np.ndarray, "slots"],
        byte_ids: Set[int],
        known: frozenset[str],
        atoms: Atoms,
        splitter: Splitter,
    ) -> None:
        self._ids = ids
        self._contents = contents
        self._is_plain = is_plain
        self._byte_ids = byte_ids
        self._known = known
        self._atoms = atoms
        self._splitter = splitter
        self._parts: dict[bytes, Part] = {}
        self._rows: dict[tuple[int, bytes], Row] = {}

    def part(self, tail: bytes) -> Part:
        """The tokens that may follow an unfinished character, or none."""
        if tail not in self._parts:
            self._parts[tail] = self._make_part(tail)
        return self._parts[tail]

    def _make_part(self, tail: bytes) -> Part:
        # A byte that continues with a character is one of 80..BF, so these tokens are neighbours.
        slots = [
            slot
            for slot in np.flatnonzero(self._is_plain).tolist()
            if (0x80 <= self._contents[slot][0] < 0xC0) == bool(tail)
        ]
        read = [(slot, *self._characters(tail, slot)) for slot in slots]
        fitting = [(slot, text, rest) for slot, text, rest in read if text is not None]
        self._atoms.learn(character for _, text, _ in fitting for character in text)
        strings = [[self._atoms.of(character) for character in text] for _, text, _ in fitting]
        n_atoms = np.array([len(string) for string in strings], dtype=np.int64)
        columns = []
        for place in range(int(n_atoms.max(initial=0))):
            reaching = np.flatnonzero(n_atoms > place)
            atoms = np.array([strings[i][place] for i in reaching.tolist()], dtype=np.int64)
            columns.append((reaching, atoms))
        return Part(
            np.array([slot for slot, _, _ in fitting], dtype=np.int64),
            columns,
            n_atoms,
            [rest for _, _, rest in fitting],
        )

    def _characters(self, tail: bytes, slot: int) -> tuple[str | None, bytes]:
        """The characters that a token completes after a tail, and the new tail; None: none."""
        content = tail + self._contents[slot]
        cut = unfinished(content)
        try:
            text = content[: len(content) - cut].decode()
        except UnicodeDecodeError:
            return None, b""
        rest = content[len(content) - cut :]
        if int(self._ids[slot]) in self._byte_ids and text in self._known:
            return None, b""  # bytes stand only for characters without a token
        return text, rest

    def row(self, place: int, tail: bytes) -> Row:
        """What these tokens lead to from a place of the splitter."""
        key = (place, tail)
        if key not in self._rows:
            part, splitter = self.part(tail), self._splitter
            state = np.full(len(part.slots), splitter.of_text(place), dtype=np.int64)
            outcome = np.full(len(part.slots), DEAD, dtype=np.int64)
            has_tail = np.array([bool(rest) for rest in part.tails], dtype=bool)
            for column, (reaching, atoms) in enumerate(part.columns):
                alive = state[reaching] >= 0
                reaching, atoms = reaching[alive], atoms[alive]
                arrivals = splitter.steps(state[reaching], atoms).astype(np.int64)
                is_last = (part.n_atoms[reaching] == column + 1) & ~has_tail[reaching]
                outcome[reaching[is_last]] = arrivals[is_last]
                whole = np.array(splitter.whole, dtype=np.int64)
                state[reaching] = np.where(arrivals >= 0, whole[arrivals], DEAD)
            outcome[has_tail] = state[has_tail]
            self._rows[key] = Row(outcome)
        return self._rows[key]

    def outcome(self, place: int, tail: bytes, slot: int) -> tuple[int, bytes]:
        """What one token leads to, and the tail after it."""
        part = self.part(tail)
        i = int(np.searchsorted(part.slots, slot))
        if i == len(part.slots) or part.slots[i] != slot:
            return DEAD, b""
        return int(self.row(place, tail).outcome[i]), part.tails[i]


def unfinished(content: bytes) -> int:
    """How many bytes at the end may be the beginning of a character."""
    for n in range(1, min(3, len(content)) + 1):
        byte = content[-n]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC2 else 0
        if length <= n or byte > 0xF4:
            return 0
        if n > 1:
            # Not every second byte makes a character (RFC 3629).
            low, high = _SECOND.get(byte, (0x80, 0xBF))
            if not low <= content[1 - n] <= high:
                return 0
        return n
    return 0
