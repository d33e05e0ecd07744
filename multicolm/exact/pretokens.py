"""Where a pre-tokenizer cuts a text, decided while the text is still being written.

A pre-tokenizer is a chain of stages, each a regular expression that is searched from left to right;
matches and what lies between them become pieces, and the next stage cuts each piece. Later
characters decide about earlier cuts (``"  "`` stays whole before a blank, not before a letter), so
a text that is not finished may have several splits. They are followed together: at every place a
*hypothesis* says whether the text is cut there, and what must (or must not) follow for that to be
true. Hypotheses die with the first character that proves them wrong; all that are alive come true
for some continuation as far as the expressions go.

A hypothesis holds, per stage, the ordered threads of the match that it is in
(:mod:`multicolm.exact.patterns`), and the threads that were promised never to match.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from multicolm.exact.patterns import MATCH, Threads

__all__ = ["DEAD", "START", "Splitter", "Stage"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a pre-tokenizer.

    Attributes:
        start: the threads with which a match begins.
        is_added: whether matches are tokens as they are (added tokens) and not cut any further.
    """

    start: tuple[int, ...]
    is_added: bool = False


class _In(NamedTuple):
    """Where one stage is: in a match (``threads``), in a gap, or idle inside an added token."""

    kind: str  # "match", "gap", "idle"
    threads: tuple[int, ...]
    never: frozenset[int]  # threads that must not match


_IDLE = _In("idle", (), frozenset())


class _Hypothesis(NamedTuple):
    """Where all stages are, and what the next character must be."""

    stages: tuple[_In, ...]
    follows: tuple[tuple[int, bool], ...]  # (set, True: the next is not in it | False: it is)


_Raw = tuple[_In, ...]
"""Where all stages are after a character, before it is said whether the text is cut there."""

DEAD = -1
START = 0


class Splitter:
    """All splits of a text that some continuation makes true, as numbered sets of hypotheses.

    A *place* (number of a set of hypotheses) is where the next character is read; an *arrival*
    (another numbering) is where a character has just been read and the text may be cut or not.

    Attributes:
        can_end: per arrival, whether the text may end there.
        whole: per arrival, the place after it if the text is not cut there; -1 if it must be.
        cut: per arrival, the place after it if the text is cut there; -1 if it cannot be.
    """

    def __init__(self, threads: Threads, stages: Sequence[Stage]) -> None:
        self._threads = threads
        self._stages = tuple(stages)
        self._places: dict[frozenset[_Hypothesis], int] = {}
        self._hypotheses: list[frozenset[_Hypothesis]] = []
        self._arrivals: dict[frozenset[_Raw], int] = {}
        self._raws: list[frozenset[_Raw]] = []
        self.can_end: list[bool] = []
        self.whole: list[int] = []
        self.cut: list[int] = []
        self._of_text: dict[int, int] = {}
        # Per place and atom, the arrival; -2 where it has not been worked out yet.
        self._table = np.full((64, 64), -2, dtype=np.int32)
        fresh = frozenset(_Hypothesis(h, ()) for h in self._fresh(0))
        self._arrivals[frozenset()] = START  # what no character leads to
        self._raws.append(frozenset())
        self.can_end.append(True)
        self.whole.append(DEAD)
        self.cut.append(self._place(fresh))

    def _place(self, hypotheses: frozenset[_Hypothesis]) -> int:
        if not hypotheses:
            return DEAD
        if hypotheses not in self._places:
            self._places[hypotheses] = len(self._hypotheses)
            self._hypotheses.append(hypotheses)
        return self._places[hypotheses]

    def _arrive(self, raws: frozenset[_Raw]) -> int:
        if not raws:
            return DEAD
        if raws not in self._arrivals:
            self._arrivals[raws] = len(self._raws)
            self._raws.append(raws)
            self.can_end.append(any(self._may_end(raw) for raw in raws))
            self.whole.append(self._place(frozenset(h for r in raws for h in self._uncut(r))))
            self.cut.append(self._place(frozenset(h for r in raws for h in self._cuts(r))))
        return self._arrivals[raws]

    def join_arrivals(self, arrivals: Iterable[int]) -> int:
        """The arrival with the hypotheses of several."""
        several = set(arrivals)
        if len(several) == 1:
            return several.pop()
        return self._arrive(frozenset().union(*(self._raws[arrival] for arrival in several)))

    def join_places(self, places: Iterable[int]) -> int:
        """The place with the hypotheses of several."""
        several = set(places)
        if len(several) == 1:
            return several.pop()
        return self._place(frozenset().union(*(self._hypotheses[place] for place in several)))

    # Hypotheses after an arrival.

    def _fresh(self, stage: int) -> list[tuple[_In, ...]]:
        """Every way in which the stages from ``stage`` on may begin a piece."""
        if stage == len(self._stages):
            return [()]
        start = self._stages[stage].start
        match = _In("match", start, frozenset())
        gap = _In("gap", (), frozenset(start))
        ways: list[tuple[_In, ...]] = []
        if self._stages[stage].is_added:
            ways.append((match, *[_IDLE] * (len(self._stages) - stage - 1)))
        else:
            ways.extend((match, *rest) for rest in self._fresh(stage + 1))
        ways.extend((gap, *rest) for rest in self._fresh(stage + 1))
        return ways

    def _looked(self, raw: _Raw) -> set[int]:
        looks = self._threads.looks
        return set().union(*(looks(part.threads) | looks(part.never) for part in raw))

    def _resolved(self, part: _In, truth: dict[int, bool]) -> _In | None:
        never = self._threads.resolve(part.never, truth)
        if MATCH in never:
            return None
        return _In(part.kind, self._threads.resolve(part.threads, truth), frozenset(never))

    def _uncut(self, raw: _Raw) -> list[_Hypothesis]:
        found: list[_Hypothesis] = []
        for truth in _truths(self._looked(raw)):
            parts = [self._on(j, self._resolved(part, truth)) for j, part in enumerate(raw)]
            if all(part is not None for part in parts):
                found.append(_Hypothesis(tuple(p for p in parts if p), tuple(truth.items())))
        return found

    def _on(self, stage: int, part: _In | None) -> _In | None:
        """A stage that does not cut here."""
        if part is None or part.kind == "idle":
            return part
        if part.kind == "gap":
            return part._replace(never=part.never | set(self._stages[stage].start))
        threads = part.threads[:-1] if MATCH in part.threads else part.threads
        return part._replace(threads=threads) if threads else None

    def _cuts(self, raw: _Raw) -> list[_Hypothesis]:
        found: list[_Hypothesis] = []
        for j in range(len(raw)):  # the first stage that cuts; those after it begin anew
            if not all(self._ends(part) for part in raw[j + 1 :]):
                continue
            for truth in _truths(self._looked(raw[: j + 1])):
                parts = [self._on(i, self._resolved(part, truth)) for i, part in enumerate(raw[:j])]
                here = self._resolved(raw[j], truth)
                if here is None or any(part is None for part in parts):
                    continue
                before = tuple(part for part in parts if part)
                for begun in self._next(j, here):
                    if self._stages[j].is_added and begun.kind == "match":
                        rests = [(_IDLE,) * (len(raw) - j - 1)]
                    else:
                        rests = self._fresh(j + 1)
                    found.extend(
                        _Hypothesis((*before, begun, *rest), tuple(truth.items())) for rest in rests
                    )
        return found

    def _next(self, stage: int, part: _In) -> list[_In]:
        """What a stage may begin after a cut of its own."""
        start = self._stages[stage].start
        if part.kind == "gap":
            return [_In("match", start, part.never)]
        if part.kind == "idle" or MATCH not in part.threads:
            return []
        # Threads before the match would have won, so they must come to nothing.
        never = part.never | set(part.threads[:-1])
        return [_In("match", start, never), _In("gap", (), never | set(start))]

    def _ends(self, part: _In) -> bool:
        """Whether a stage accepts that nothing follows."""
        ended = self._resolved(part, {})
        return ended is not None and (ended.kind != "match" or MATCH in ended.threads)

    def _may_end(self, raw: _Raw) -> bool:
        return all(self._ends(part) for part in raw)

    # Characters.

    def _read(self, hypothesis: _Hypothesis, atom: int) -> _Raw | None:
        signature = self._threads.atoms.signatures[atom]
        if any(signature[number] == truth for number, truth in hypothesis.follows):
            return None
        parts: list[_In] = []
        for part in hypothesis.stages:
            never = frozenset(self._threads.step(part.never, atom))
            threads = self._threads.step(part.threads, atom)
            if MATCH in never or (part.kind == "match" and not threads):
                return None
            parts.append(_In(part.kind, threads, never))
        return tuple(parts)

    def _in_added(self, hypothesis: _Hypothesis) -> bool:
        return any(
            stage.is_added and part.kind == "match"
            for stage, part in zip(self._stages, hypothesis.stages, strict=True)
        )

    def of_text(self, place: int) -> int:
        """The place with only those hypotheses that begin no added token; -1 if there is none."""
        if place not in self._of_text:
            plain = frozenset(h for h in self._hypotheses[place] if not self._in_added(h))
            self._of_text[place] = self._place(plain)
        return self._of_text[place]

    def _after(self, place: int, atom: int, added: bool) -> int:
        hypotheses = (h for h in self._hypotheses[place] if self._in_added(h) == added)
        raws = (self._read(hypothesis, atom) for hypothesis in hypotheses)
        return self._arrive(frozenset(raw for raw in raws if raw is not None))

    def steps(self, places: np.ndarray, atoms: np.ndarray) -> np.ndarray:
        """The arrivals after one character of text at several places; -1 where it cannot follow."""
        n_places, n_atoms = len(self._hypotheses), len(self._threads.atoms.signatures)
        if n_places > self._table.shape[0] or n_atoms > self._table.shape[1]:
            rows, columns = self._table.shape
            grown = np.full((max(rows, 2 * n_places), max(columns, 2 * n_atoms)), -2, np.int32)
            grown[:rows, :columns] = self._table
            self._table = grown
        arrivals = self._table[places, atoms]
        missing = arrivals == -2
        if missing.any():
            pairs = set(zip(places[missing].tolist(), atoms[missing].tolist(), strict=True))
            for place, atom in pairs:
                self._table[place, atom] = self._after(place, atom, added=False)
            arrivals = self._table[places, atoms]
        return np.asarray(arrivals)

    def step(self, place: int, atom: int) -> int:
        """The arrival after one character of text; -1 if it cannot follow."""
        if place < self._table.shape[0] and atom < self._table.shape[1]:
            known = int(self._table[place, atom])
            if known != -2:
                return known
        return int(self.steps(np.array([place]), np.array([atom]))[0])

    def read_added(self, place: int, atoms: Sequence[int]) -> int:
        """The arrival after an added token that begins at a place; -1 if it cannot stand there."""
        for i, atom in enumerate(atoms):
            arrival = self._after(place, atom, added=True)
            if arrival == DEAD or i == len(atoms) - 1:
                return arrival
            place = self.whole[arrival]
            if place == DEAD:
                return DEAD
        return DEAD


def _truths(looked: Iterable[int]) -> list[dict[int, bool]]:
    numbers = sorted(looked)
    return [
        dict(zip(numbers, truth, strict=True))
        for truth in itertools.product((True, False), repeat=len(numbers))
    ]
