"""Regular expressions of tokenizers, simulated one character at a time.

An expression is followed by *threads*, in order: earlier ones win, as in backtracking. Characters
that all expressions treat alike are one *atom*. What an expression matches is asked of the
tokenizers library itself, whose Unicode tables may differ from Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

__all__ = ["MATCH", "Atoms", "Threads", "UnknownPattern"]

Member = Callable[[str], list[bool]]
"""Tells for every character of a string whether it belongs to a set."""


class UnknownPattern(Exception):
    """A regular expression with a part that is not followed here; never leaves the package."""


class Atoms:
    """Classes of characters that belong to the same sets.

    Attributes:
        signatures: per atom, for every set whether its characters belong to it.
    """

    def __init__(self) -> None:
        self._sets: list[Member] = []
        self._names: dict[tuple[str, str], int] = {}
        self._atoms: dict[str, int] = {}
        self._known: dict[tuple[bool, ...], int] = {}
        self._beginning: dict[bytes, frozenset[int]] = {}
        self.signatures: list[tuple[bool, ...]] = []

    def add(self, kind: str, source: str) -> int:
        """The number of a set of characters; all sets are added before the first atom is asked.

        Args:
            kind: ``"is"`` a character, ``"regex"`` that matches one character, or ``"digit"``.
            source: the character or the expression.
        """
        assert not self._atoms, "sets come before atoms"
        name = (kind, source)
        if name not in self._names:
            self._names[name] = len(self._sets)
            self._sets.append(_member(kind, source))
        return self._names[name]

    def learn(self, characters: Iterable[str]) -> None:
        """Find the atoms of many characters at once."""
        new = "".join(sorted({c for c in characters if c not in self._atoms}))
        if new:
            self._atoms.update(zip(new, self._work_out(new), strict=True))

    def _work_out(self, text: str) -> list[int]:
        columns = [member(text) for member in self._sets]
        atoms: list[int] = []
        for signature in zip(*columns, strict=True) if columns else [()] * len(text):
            if signature not in self._known:
                self._known[signature] = len(self.signatures)
                self.signatures.append(signature)
            atoms.append(self._known[signature])
        return atoms

    def beginning_with(self, tail: bytes) -> frozenset[int]:
        """The atoms of all characters that begin with some bytes."""
        if tail not in self._beginning:
            length = 4 if tail[0] >= 0xF0 else 3 if tail[0] >= 0xE0 else 2
            low, high = (_code_point(tail.ljust(length, fill)) for fill in (b"\x80", b"\xbf"))
            # Overlong forms and surrogates are no characters.
            low = max(low, {2: 0x80, 3: 0x800, 4: 0x10000}[length])
            high = min(high, 0x10FFFF)
            # Of planes 4 to 16, only 14 has any characters that are not for private use.
            many = range(low, min(high, 0x3FFFF) + 1), range(max(low, 0xE0000), min(high, 0xE0FFF))
            points = {low, high, *many[0], *many[1]}
            text = "".join(chr(point) for point in sorted(points) if not 0xD800 <= point < 0xE000)
            self._beginning[tail] = frozenset(self._work_out(text))
        return self._beginning[tail]

    def of(self, character: str) -> int:
        """The atom of a character."""
        if character not in self._atoms:
            self.learn(character)
        return self._atoms[character]


def _code_point(content: bytes) -> int:
    """The number that UTF-8 writes with some bytes, be it a character or not."""
    value = content[0] & (0x7F >> len(content))
    for byte in content[1:]:
        value = value << 6 | byte & 0x3F
    return value


def _member(kind: str, source: str) -> Member:
    if kind == "is":

        def is_it(text: str) -> list[bool]:
            flags = [False] * len(text)
            place = text.find(source)
            while place >= 0:
                flags[place] = True
                place = text.find(source, place + 1)
            return flags

        return is_it
    from tokenizers import Regex, pre_tokenizers

    if kind == "digit":
        digits = pre_tokenizers.Digits(individual_digits=True)

        def is_digit(text: str) -> list[bool]:
            # Letters between them show which characters are cut off alone.
            flags = [False] * len(text)
            for piece, (start, _) in digits.pre_tokenize_str("a".join(("", *text))):
                if start % 2 and len(piece) == 1:
                    flags[start // 2] = True
            return flags

        return is_digit
    cut = pre_tokenizers.Split(Regex(source), "removed")

    def is_matched(text: str) -> list[bool]:
        matched = [True] * len(text)
        for _, (start, stop) in cut.pre_tokenize_str(text):
            matched[start:stop] = [False] * (stop - start)
        return matched

    return is_matched


# One node of a compiled expression: ("set", number, next), ("look", number, next) for "what follows
# is not in the set", ("split", first, second) and ("match", 0, 0).
_Node = tuple[str, int, int]
MATCH = 0


class Threads:
    """The compiled expressions of all stages."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.nodes: list[_Node] = [("match", 0, 0)]
        self._closures: dict[int, tuple[int, ...]] = {}
        self._steps: dict[tuple[int, int], tuple[int, ...]] = {}

    def compile(self, pattern: str) -> tuple[int, ...]:
        """The threads with which a match of an expression begins.

        Raises:
            UnknownPattern: if the expression has a part that is not followed here.
        """
        start = self.closure(_Parser(pattern, self).entry())
        if any(self.nodes[node][0] != "set" for node in start):
            raise UnknownPattern("an expression that may match nothing")
        return start

    def literals(self, contents: Iterable[str]) -> tuple[int, ...]:
        """The threads of several strings, of which the longest wins."""
        start: list[int] = []
        for content in sorted(contents, key=len, reverse=True):
            node = MATCH
            for character in reversed(content):
                node = self.node("set", self.atoms.add("is", character), node)
            start.append(node)
        return tuple(start)

    def node(self, kind: str, a: int, b: int) -> int:
        """Add a node."""
        self.nodes.append((kind, a, b))
        return len(self.nodes) - 1

    def closure(self, node: int) -> tuple[int, ...]:
        """What can be next from a node on, best first."""
        if node not in self._closures:
            found: list[int] = []
            seen: set[int] = set()
            stack = [node]
            while stack:
                at = stack.pop()
                if at in seen:
                    continue
                seen.add(at)
                kind, a, b = self.nodes[at]
                if kind == "split":
                    stack += [b, a]
                else:
                    found.append(at)
            self._closures[node] = tuple(found)
        return self._closures[node]

    def step(self, threads: Iterable[int], atom: int) -> tuple[int, ...]:
        """The threads after a character, best first, none after a match."""
        signature = self.atoms.signatures[atom]
        after: list[int] = []
        for node in threads:
            kind, number, following = self.nodes[node]
            if kind == "set" and signature[number]:
                after.extend(self.closure(following))
        return _cut(after)

    def looks(self, threads: Iterable[int]) -> set[int]:
        """The sets at which threads look ahead."""
        return {self.nodes[node][1] for node in threads if self.nodes[node][0] == "look"}

    def resolve(self, threads: Iterable[int], truth: dict[int, bool]) -> tuple[int, ...]:
        """Threads whose look at the next character has come out as ``truth`` says.

        Sets that are not in ``truth`` are not followed by anything: the look succeeds.
        """
        stack = list(reversed(list(threads)))
        after: list[int] = []
        while stack:
            node = stack.pop()
            kind, number, following = self.nodes[node]
            if kind != "look":
                after.append(node)
            elif truth.get(number, True):
                stack.extend(reversed(self.closure(following)))
        return _cut(after)


def _cut(threads: Sequence[int]) -> tuple[int, ...]:
    distinct = tuple(dict.fromkeys(threads))
    return distinct[: distinct.index(MATCH) + 1] if MATCH in distinct else distinct


class _Parser:
    """The expressions that tokenizers are written with; anything else is refused."""

    def __init__(self, pattern: str, threads: Threads) -> None:
        self._pattern = pattern
        self._threads = threads
        self._place = 0
        self._any_case = False

    def entry(self) -> int:
        node = self._alternatives()(MATCH)
        if self._place < len(self._pattern):
            raise UnknownPattern(f"'{self._pattern[self._place]}'")
        return node

    # Each part is parsed into a function from the node after it to its own first node.

    def _alternatives(self) -> Callable[[int], int]:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._place += 1
            branches.append(self._sequence())

        def build(following: int) -> int:
            entries = [branch(following) for branch in branches]
            node = entries[-1]
            for entry in reversed(entries[:-1]):
                node = self._threads.node("split", entry, node)
            return node

        return build

    def _sequence(self) -> Callable[[int], int]:
        items: list[Callable[[int], int]] = []
        while self._peek() not in ("|", ")", ""):
            items.append(self._quantified(self._item()))

        def build(following: int) -> int:
            for item in reversed(items):
                following = item(following)
            return following

        return build

    def _quantified(self, item: Callable[[int], int]) -> Callable[[int], int]:
        sign = self._peek()
        if sign not in ("?", "*", "+", "{"):
            return item
        least, most = self._counts()
        if self._peek() in ("?", "+", "*", "{") and self._peek():
            raise UnknownPattern(f"'{sign}{self._peek()}'")
        threads = self._threads

        def build(following: int) -> int:
            if most is None:
                loop = threads.node("split", 0, following)
                threads.nodes[loop] = ("split", item(loop), following)
                node = loop
            else:
                node = following
                for _ in range(most - least):
                    node = threads.node("split", item(node), following)
            for _ in range(least):
                node = item(node)
            return node

        return build

    def _counts(self) -> tuple[int, int | None]:
        sign = self._take()
        if sign != "{":
            return {"?": (0, 1), "*": (0, None), "+": (1, None)}[sign]
        stop = self._pattern.find("}", self._place)
        low, comma, high = self._pattern[self._place : stop].partition(",")
        if stop < 0 or not low.isdigit() or not (high.isdigit() or high == ""):
            raise UnknownPattern("'{'")
        self._place = stop + 1
        return int(low), (int(high) if high else None) if comma else int(low)

    def _item(self) -> Callable[[int], int]:
        if self._peek() == "(":
            return self._group()
        number = self._set()
        return lambda following: self._threads.node("set", number, following)

    def _group(self) -> Callable[[int], int]:
        rest = self._pattern[self._place :]
        opening = next((o for o in ("(?:", "(?i:", "(?!", "(?") if rest.startswith(o)), "(")
        self._place += len(opening)
        if opening == "(?":
            raise UnknownPattern(f"'{rest[:4]}'")
        if opening == "(?!":
            number = self._set()
            self._expect(")")
            return lambda following: self._threads.node("look", number, following)
        before, self._any_case = self._any_case, self._any_case or opening == "(?i:"
        inner = self._alternatives()
        self._any_case = before
        self._expect(")")
        return inner

    def _set(self) -> int:
        source = self._source()
        atoms = self._threads.atoms
        if len(source) == 1 and not self._any_case:
            return atoms.add("is", source)
        if len(source) == 1:
            source = f"\\x{{{ord(source):x}}}"
        return atoms.add("regex", f"(?i:{source})" if self._any_case else source)

    def _source(self) -> str:
        """One character, or the expression of a class of characters."""
        character = self._take()
        if character == "[":
            return self._bracket()
        if character == "\\":
            return self._escape()
        if character in ("", ".", "^", "$", "(", ")", "|", "?", "*", "+", "{"):
            raise UnknownPattern(f"'{character}'")
        return character

    def _escape(self) -> str:
        character = self._take()
        plain = {"r": "\r", "n": "\n", "t": "\t"}
        if character in plain:
            return plain[character]
        if character in ("p", "P"):
            stop = self._pattern.index("}", self._place) + 1
            name = self._pattern[self._place : stop]
            self._place = stop
            return f"\\{character}{name}"
        if character in ("s", "S", "d", "D", "w", "W"):
            return f"\\{character}"
        if not character or character.isalnum():
            raise UnknownPattern(f"'\\{character}'")
        return character

    def _bracket(self) -> str:
        start, depth = self._place - 1, 1
        while depth:
            character = self._take()
            if not character:
                raise UnknownPattern("'['")
            if character == "\\":
                self._take()
            depth += {"[": 1, "]": -1}.get(character, 0)
        return self._pattern[start : self._place]

    def _peek(self) -> str:
        return self._pattern[self._place : self._place + 1]

    def _take(self) -> str:
        self._place += 1
        return self._pattern[self._place - 1 : self._place]

    def _expect(self, character: str) -> None:
        if self._take() != character:
            raise UnknownPattern(f"no '{character}'")
