"""Valid paths of byte-pair encodings of the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from multicolm.exact.boundaries import BoundaryIndex
from multicolm.exact.canonical import Canonical, State, sorted_slots
from multicolm.exact.patterns import Atoms, Threads, UnknownPattern
from multicolm.exact.plan import BLANK, NotCovered, Plan, plan_of
from multicolm.exact.pretokens import DEAD, START, Splitter, Stage
from multicolm.exact.token_strings import TokenStrings, unfinished
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["BytePairs"]

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class _Path(NamedTuple):
    """A state of byte-pair encodings.

    Attributes:
        groups: (word, arrival of the splitter), or (word, place) if a character is unfinished. The
            word says which whole word of the vocabulary the current piece may still become; see
            :class:`_Words`.
        tail: the bytes of an unfinished character.
        last: slot of the last token, -1 if there is none.
    """

    groups: tuple[tuple[int, int], ...]
    tail: bytes
    last: int


_OFF, _CLOSED = 0, 1


class _Words:
    """Whole words of the vocabulary that the merges do not make, for ``ignore_merges``.

    A piece that is such a word is encoded as that one token. So the tokens that the merges make of
    it may stand at the beginning of a longer piece, and not be a piece. States: 0 is off all such
    words, 1 is a piece that must end here, others are inner nodes of a trie of tokens.
    """

    def __init__(self, encodings: Iterable[Sequence[int]]) -> None:
        self._after: dict[tuple[int, int], int] = {}
        self._is_word: set[int] = set()
        root, n = -1, 2
        for slots in encodings:
            node = root
            for slot in slots:
                if (node, slot) not in self._after:
                    self._after[node, slot] = n
                    n += 1
                node = self._after[node, slot]
            self._is_word.add(node)
        self.following: dict[int, list[int]] = {}
        for node, slot in self._after:
            self.following.setdefault(node, []).append(slot)

    def first(self, slot: int) -> int:
        return self._after.get((-1, slot), _OFF)

    def then(self, word: int, slot: int) -> int:
        return self._after.get((word, slot), _OFF)

    def may_stop(self, word: int) -> bool:
        return word not in self._is_word


class BytePairs(Canonical):
    """Paths of byte-pair encodings of the tokenizers library."""

    def __init__(self, adapter: TokenizerAdapter, settings: Mapping[str, Any]) -> None:
        plan, model = plan_of(settings), settings["model"]
        vocab: dict[str, int] = model["vocab"]
        self._ignores_merges = bool(model.get("ignore_merges"))
        symbols = _symbols(vocab, plan.is_byte_level)
        byte_ids = (
            set()
            if plan.is_byte_level
            else {i for piece, i in vocab.items() if _BYTE.fullmatch(piece)}
        )
        self._boundaries = _boundary_index(vocab, model["merges"], {*symbols.values(), *byte_ids})
        added = {
            i: c for c, i in (plan.raw_added | plan.late_added).items() if i < adapter.n_tokens
        }
        own = {i for i in vocab.values() if i < adapter.n_tokens}
        usable = {
            i
            for i in own
            if adapter.special_name(i) is None
            and (self._ignores_merges or self._boundaries.is_made[i])
        }
        ids, self.contents = sorted_slots(adapter, usable | added.keys())
        self.ids = np.array(ids, dtype=np.int64)
        self._is_plain = np.array([i in usable for i in ids], dtype=bool)
        self._is_made = np.array(
            [i in usable and bool(self._boundaries.is_made[i]) for i in ids], dtype=bool
        )
        known = (
            frozenset()
            if plan.is_byte_level
            else frozenset(p.replace(BLANK, " ") for p in symbols) | {BLANK}
        )
        self._build_splitter(plan)
        self._strings = TokenStrings(
            self.ids, self.contents, self._is_plain, byte_ids, known, self._atoms, self._splitter
        )
        self._added = [
            (self.slot_of[i], [self._atoms.of(character) for character in content])
            for i, content in added.items()
            if adapter.token_bytes(i) == content.encode()
        ]
        self._words = self._unmade_words(vocab, symbols)
        self._added_after: dict[int, dict[int, int]] = {}
        self._lives: dict[_Path, bool] = {}
        self.start: State = _Path(((_OFF, START),), b"", -1)

    def _build_splitter(self, plan: Plan) -> None:
        self._atoms = Atoms()
        threads = Threads(self._atoms)
        stages = [
            Stage(threads.literals(contents), is_added=True)
            for contents in (plan.raw_added, plan.late_added)
            if contents
        ]
        for kind, source in plan.patterns:
            if kind == "digits":
                digit = threads.node("set", self._atoms.add("digit", ""), 0)
                if source == "+":
                    loop = threads.node("split", digit, 0)
                    threads.nodes[digit] = (*threads.nodes[digit][:2], loop)
                stages.append(Stage((digit,)))
                continue
            try:
                stages.append(Stage(threads.compile(source)))
            except UnknownPattern as reason:
                raise NotCovered(
                    f"its pre-tokenizer has an expression with {reason}, which is unknown here"
                ) from reason
        self._splitter = Splitter(threads, stages)

    def _unmade_words(self, vocab: Mapping[str, int], symbols: Mapping[str, int]) -> _Words:
        encodings: list[list[int]] = []
        if self._ignores_merges:
            for piece, token_id in vocab.items():
                if self._boundaries.is_made[token_id] or any(c not in symbols for c in piece):
                    continue
                made = self._boundaries.encode([symbols[character] for character in piece])
                if all(part in self.slot_of for part in made):
                    encodings.append([self.slot_of[part] for part in made])
        return _Words(encodings)

    def _live(self, place: int, tail: bytes, after_cut: bool) -> Bool[np.ndarray, "some"]:
        """Tokens after which a text can be finished, whatever token stood before."""
        row = self._strings.row(place, tail)
        if after_cut not in row.is_live:
            part = self._strings.part(tail)
            usable = (self._is_plain if after_cut else self._is_made)[part.slots]
            possible = (row.outcome >= 0) & usable
            has_tail = np.array([bool(rest) for rest in part.tails], dtype=bool)
            can_end = np.array(self._splitter.can_end, dtype=bool)
            live = possible & ~has_tail
            live[live] = can_end[row.outcome[live]]
            for i in np.flatnonzero(possible & ~live).tolist():
                slot = int(part.slots[i])
                word = self._first(slot) if after_cut else _OFF
                path = _Path(((word, int(row.outcome[i])),), part.tails[i], slot)
                live[i] = self._can_be_finished(path)
            row.is_live[after_cut] = live
        return row.is_live[after_cut]

    def _first(self, slot: int) -> int:
        return self._words.first(slot) if self._is_made[slot] else _CLOSED

    def _added_at(self, place: int) -> dict[int, int]:
        """Added tokens that may begin at a place, and the arrivals after them."""
        if place not in self._added_after:
            after = {slot: self._splitter.read_added(place, a) for slot, a in self._added}
            live = {}
            for slot, arrival in after.items():
                path = _Path(((_CLOSED, arrival),), b"", slot)
                if arrival != DEAD and self._can_be_finished(path):
                    live[slot] = arrival
            self._added_after[place] = live
        return self._added_after[place]

    # Paths.

    def may_end(self, state: State) -> bool:
        """Whether no character is unfinished and the splits are those of the text as it is."""
        assert isinstance(state, _Path)
        return not state.tail and any(
            self._splitter.can_end[arrival] and self._words.may_stop(word)
            for word, arrival in state.groups
        )

    def allowed(self, state: State) -> Bool[np.ndarray, "slots"]:
        """Tokens that leave a valid path."""
        assert isinstance(state, _Path)
        mask = np.zeros(len(self.ids), dtype=bool)
        checked: set[int] = set()
        for word, at in state.groups:
            cut = DEAD if state.tail or not self._words.may_stop(word) else self._splitter.cut[at]
            if cut != DEAD:
                part = self._strings.part(b"")
                mask[part.slots] |= self._live(cut, b"", after_cut=True)
                mask[list(self._added_at(cut))] = True
            whole = at if state.tail else self._splitter.whole[at]
            if whole != DEAD and word != _CLOSED:
                part = self._strings.part(state.tail)
                if part.slots.size:
                    live = self._live(whole, state.tail, after_cut=False)
                    mask[part.slots] |= live & self._neighbours(state.last)[part.slots]
                checked.update(self._words.following.get(word, ()))
        for slot in checked:
            after = self._step(state, slot)
            mask[slot] = after is not None and self._can_be_finished(after)
        return mask

    def _neighbours(self, slot: int) -> Bool[np.ndarray, "slots"]:
        return np.asarray(self._boundaries.row(int(self.ids[slot]))[self._own_ids] & self._is_made)

    @cached_property
    def _own_ids(self) -> Int[np.ndarray, "slots"]:
        """Ids of slots as the merges know them; added tokens stand for any, they are not made."""
        return np.where(self._is_made, self.ids, 0)

    def after(self, state: State, slot: int) -> State:
        """The path with one more token."""
        assert isinstance(state, _Path)
        after = self._step(state, slot)
        assert after is not None, "the token is allowed"
        return after

    def _step(self, state: _Path, slot: int) -> _Path | None:
        """A path with one more token; ``None`` if the splits or the merges forbid it."""
        found: dict[int, set[int]] = {}
        tail = b""
        for word, at in state.groups:
            cut = DEAD if state.tail or not self._words.may_stop(word) else self._splitter.cut[at]
            if cut != DEAD:
                arrival = self._added_at(cut).get(slot, DEAD)
                if arrival != DEAD:
                    found.setdefault(_CLOSED, set()).add(arrival)
                outcome, rest = self._strings.outcome(cut, b"", slot)
                if outcome != DEAD:
                    found.setdefault(self._first(slot), set()).add(outcome)
                    tail = rest
            whole = at if state.tail else self._splitter.whole[at]
            if whole == DEAD or word == _CLOSED or not self._is_made[slot]:
                continue
            outcome, rest = self._strings.outcome(whole, state.tail, slot)
            if outcome != DEAD and self._boundaries.allows(
                int(self.ids[state.last]), int(self.ids[slot])
            ):
                found.setdefault(self._words.then(word, slot), set()).add(outcome)
                tail = rest
        if not found:
            return None
        join = self._splitter.join_places if tail else self._splitter.join_arrivals
        return _Path(tuple((word, join(ats)) for word, ats in sorted(found.items())), tail, slot)

    def _can_be_finished(self, path: _Path) -> bool:
        """Whether some tokens after a path make it a complete text; searched without haste."""
        if path not in self._lives:
            self._lives[path] = self._search(path)
        return self._lives[path]

    def _search(self, path: _Path) -> bool:
        if self.may_end(path):
            return True
        seen = {path}
        stack = [(path, self._candidates(path))] if self._fits(path) else []
        while stack:
            at, candidates = stack[-1]
            slot = next(candidates, None)
            if slot is None:
                stack.pop()
                continue
            after = self._step(at, slot)
            if after is None or after in seen:
                continue
            if self.may_end(after):
                return True
            seen.add(after)
            if self._fits(after):
                stack.append((after, self._candidates(after)))
        return False

    def _fits(self, path: _Path) -> bool:
        """Whether some character begins with the tail and may stand there; needed, not enough."""
        return not path.tail or self._some_fits(path.tail, [place for _, place in path.groups])

    def _some_fits(self, tail: bytes, places: Sequence[int]) -> bool:
        if len(tail) == 1 and tail[0] >= 0xF0:  # these are many, and the first will often do
            longer = (tail + bytes([byte]) for byte in range(0x80, 0xC0))
            return any(self._some_fits(more, places) for more in longer if unfinished(more) == 2)
        atoms = self._atoms.beginning_with(tail)
        return any(self._splitter.step(place, atom) != DEAD for place in places for atom in atoms)

    def _candidates(self, path: _Path) -> Iterator[int]:
        """Tokens that may come next as far as the splits go; those that can end first."""
        can_end = self._splitter.can_end
        for word, at in path.groups:
            stops = not path.tail and self._words.may_stop(word)
            places = [(self._splitter.cut[at], b"")] if stops else []
            if word != _CLOSED:
                places.append((at if path.tail else self._splitter.whole[at], path.tail))
            for place, tail in places:
                if place == DEAD:
                    continue
                part, outcome = self._strings.part(tail), self._strings.row(place, tail).outcome
                ready: list[int] = []
                others: list[int] = []
                for i in np.flatnonzero(outcome >= 0).tolist():
                    ends = not part.tails[i] and can_end[outcome[i]]
                    (ready if ends else others).append(int(part.slots[i]))
                yield from ready
                yield from others
            yield from (slot for slot, _ in self._added)


def _symbols(vocab: Mapping[str, int], is_byte_level: bool) -> dict[str, int]:
    """The symbols with which every string begins, by their pieces.

    A byte without a symbol is one that the model never writes: no path spells a text that holds it.
    SmolLM2's vocabulary lacks 21 of them, most of which no UTF-8 text holds.

    Raises:
        NotCovered: if no text has any, or blanks have none.
    """
    single = {piece: i for piece, i in vocab.items() if len(piece) == 1}
    if is_byte_level:
        from tokenizers import pre_tokenizers

        if not any(c in single for c in pre_tokenizers.ByteLevel.alphabet()):
            raise NotCovered("none of its tokens is a byte")
    elif BLANK not in vocab:
        raise NotCovered(f"it has no token for a blank, {BLANK!r}")
    return single


def _boundary_index(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str] | str], symbols: Iterable[int]
) -> BoundaryIndex:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    lengths = [0] * (max(vocab.values()) + 1)
    for piece, i in vocab.items():
        lengths[i] = len(piece)
    ranked = [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs]
    return BoundaryIndex(len(lengths), symbols, ranked, lengths)
