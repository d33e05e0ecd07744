"""A decision tree as text that a person can read and edit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from multicolm.errors import ArtefactError
from multicolm.policy.tree_nodes import (
    MAX_DEPTH,
    MEANINGS,
    TOO_DEEP,
    AssistantSplit,
    Leaf,
    Node,
    Split,
    branches,
    every_node,
)

__all__ = ["as_text", "from_text"]

_HEAD = """\
# keep P: the base model's token stays. replace P: the assistant's takes its place.
# P is how likely the assistant is right; where several would replace, the greatest P does.
"""
_INDENT = "    "
_QUESTION = re.compile(r"if\s+(\S+)\s*(<=|<)\s*([^\s:]+)\s*:\s*(.*)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHO = re.compile(r"if\s+assistant\s+in\s*(?=\[)")
_FORMS = 'allowed are `keep`, `replace`, `if FEATURE <= NUMBER:` and `if assistant in ["NAME"]:`'


def as_text(root: Node) -> str:
    """The tree as lines of ``if`` and ``else``, below comments that say what it asks."""
    return _head(root) + "\n".join(_lines(root, "")) + "\n"


def from_text(text: str, origin: str = "tree") -> Node:
    """The tree of :func:`as_text`.

    Raises:
        ArtefactError: naming ``origin``, the line, and what may stand there.
    """
    return _Lines(text, origin).tree()


def _head(root: Node) -> str:
    asked = {node.feature for node in every_node(root) if isinstance(node, Split)}
    return _HEAD + "".join(
        f"# {name}: {meaning}.\n" for name, meaning in MEANINGS.items() if name in asked
    )


def _lines(node: Node, indent: str) -> Iterator[str]:
    if isinstance(node, Leaf):
        yield indent + _leaf_text(node)
        return
    if isinstance(node, Split):
        question = f"{node.feature} <= {float(node.threshold)!r}"
    else:
        question = f"assistant in [{', '.join(map(_quoted, node.assistants))}]"
    yes, no = branches(node)
    yield from _branch(f"{indent}if {question}:", yes)
    yield from _branch(f"{indent}else:", no)


def _quoted(name: str) -> str:
    """A name as JSON has it, on one line and without what begins a comment."""
    return json.dumps(name, ensure_ascii=not name.isprintable()).replace("#", "\\u0023")


def _branch(head: str, node: Node) -> Iterator[str]:
    if isinstance(node, Leaf):
        yield f"{head} {_leaf_text(node)}"
        return
    yield head
    indent = head[: len(head) - len(head.lstrip())]
    yield from _lines(node, indent + _INDENT)


def _leaf_text(leaf: Leaf) -> str:
    text = f"{'replace' if leaf.replace else 'keep'} {float(leaf.probability)!r}"
    if leaf.samples is None:
        return text
    return f"{text}  # assistant right: {leaf.assistant_right} of {leaf.samples}"


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    indent: int
    text: str


class _Lines:
    """Reads the text form, line by line."""

    def __init__(self, text: str, origin: str) -> None:
        self._origin = origin
        self._coming = [
            _Line(number, len(plain) - len(plain.lstrip()), plain.strip())
            for number, line in enumerate(text.splitlines(), start=1)
            if (plain := line.partition("#")[0]).strip()
        ]
        for line, full in ((line, text.splitlines()[line.number - 1]) for line in self._coming):
            if "\t" in full[: line.indent]:
                self._refuse(line, "indented by a tab; use spaces.")
        self._last = self._coming[-1].number if self._coming else 1

    def tree(self) -> Node:
        """The whole of it."""
        if not self._coming:
            raise ArtefactError(f"{self._origin}: holds no tree; {_FORMS}.")
        root = self._node(self._coming.pop(0), 0)
        if self._coming:
            self._refuse(self._coming[0], "the tree has ended above, and nothing may follow it.")
        return root

    def _node(self, line: _Line, level: int) -> Node:
        if level > MAX_DEPTH:
            self._refuse(line, TOO_DEEP)
        if not line.text.startswith("if "):
            return self._leaf(line, line.text)
        if who := _WHO.match(line.text):
            return self._about_the_assistant(line, who.end(), level)
        question = _QUESTION.fullmatch(line.text)
        if question is None:
            self._refuse(line, f"'{line.text}' cannot be read; {_FORMS}.")
        feature, sign, number, rest = question.groups()
        threshold = self._number(line, number)
        if sign == "<":  # the same question for every number
            threshold = math.nextafter(threshold, -math.inf)
        below, above = self._branches(line, rest, level)
        try:
            return Split(feature, threshold, below, above)
        except ArtefactError as error:
            self._refuse(line, str(error))

    def _about_the_assistant(self, line: _Line, start: int, level: int) -> Node:
        """A question whose list of names starts at this place of the line."""
        try:
            names, end = json.JSONDecoder().raw_decode(line.text, start)
        except ValueError:
            names, end = None, start
        colon, rest = line.text[end:].lstrip()[:1], line.text[end:].lstrip()[1:].strip()
        if colon != ":" or not isinstance(names, list) or not all(type(n) is str for n in names):
            self._refuse(line, f"'{line.text}' cannot be read; {_FORMS}.")
        among, others = self._branches(line, rest, level)
        try:
            return AssistantSplit(tuple(names), among, others)
        except ArtefactError as error:
            self._refuse(line, str(error))

    def _branches(self, line: _Line, rest: str, level: int) -> tuple[Node, Node]:
        """What follows a question, and what follows its ``else:``."""
        yes = self._after_colon(line, line, rest, level)
        otherwise = self._else_of(line)
        return yes, self._after_colon(line, otherwise, otherwise.text[5:].strip(), level)

    def _else_of(self, line: _Line) -> _Line:
        coming = self._coming[0] if self._coming else None
        if coming is None or coming.indent < line.indent:
            self._refuse(line, "this `if` has no `else:`; add one, as far indented as the `if`.")
        if coming.indent > line.indent or not coming.text.startswith("else:"):
            self._refuse(
                coming,
                f"expected the `else:` of line {line.number}, as far indented as its `if`, got "
                f"'{coming.text}'.",
            )
        return self._coming.pop(0)

    def _after_colon(self, question: _Line, line: _Line, rest: str, level: int) -> Node:
        """What follows ``if ...:`` or ``else:``: a leaf on the same line, or deeper lines."""
        if rest.startswith("if "):
            self._refuse(line, "a question needs its own line, indented further than this one.")
        if rest:
            return self._leaf(line, rest)
        if not self._coming or self._coming[0].indent <= question.indent:
            self._refuse(line, f"nothing follows the colon; {_FORMS} on deeper lines.")
        return self._node(self._coming.pop(0), level + 1)

    def _leaf(self, line: _Line, text: str) -> Leaf:
        word, _, number = text.partition(" ")
        if word not in ("keep", "replace"):
            self._refuse(line, f"'{text}' cannot be read; {_FORMS}.")
        replaces = word == "replace"
        probability = self._number(line, number.strip()) if number else float(replaces)
        try:
            return Leaf(replaces, probability)
        except ArtefactError as error:
            self._refuse(line, str(error))

    def _number(self, line: _Line, text: str) -> float:
        if not _NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
            self._refuse(line, f"'{text}' is no finite number.")
        return number

    def _refuse(self, line: _Line, reason: str) -> NoReturn:
        raise ArtefactError(f"{self._origin}:{line.number}: {reason}")
