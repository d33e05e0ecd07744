"""A decision tree that says where an assistant's token replaces the base model's.

It is kept as JSON, or as text that a person can read and edit:

    if p_draft <= 0.53:
        if p_assistant <= 0.61: keep 0.14
        else: replace 0.82
    else: keep 0.05

It is evaluated with tensors; scikit-learn is needed to learn one and not to use it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeAlias, get_args

from jaxtyping import Bool, Float, Int

from multicolm.artefacts import Artefact
from multicolm.config.wording import show
from multicolm.errors import ArtefactError, unknown
from multicolm.files import write_whole
from multicolm.types import Tensor

if TYPE_CHECKING:
    import torch


__all__ = ["MAX_DEPTH", "Feature", "Leaf", "Node", "Split", "Tree"]

MAX_DEPTH = 32
"""The most questions on the way to a leaf."""

Feature = Literal[
    "p_draft",
    "p_assistant",
    "entropy_draft",
    "entropy_assistant",
    "margin_draft",
    "margin_assistant",
    "agreement",
    "position",
]
"""What a tree may ask about the base model, which drafts, and about one assistant.

``p_*``       probability of the model's most likely token
``entropy_*`` of its next token, in nats
``margin_*``  probability of its most likely token minus that of the second
``agreement`` part of all models whose most likely token is the assistant's
``position``  how many tokens of the text are written before
"""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is done with an assistant's token.

    Attributes:
        replace: whether it replaces the base model's.
        probability: how likely it is right where only one of the two is; where several assistants
            would replace, the greatest does.
        samples: positions of the training that came here; ``None`` if it was not learned.
        assistant_right: at how many of these the assistant was right.

    Raises:
        ArtefactError: if a number is out of range.
    """

    replace: bool
    probability: float
    samples: int | None = None
    assistant_right: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ArtefactError(f"probability must be from 0 to 1, got {self.probability}.")
        right, samples = self.assistant_right, self.samples
        if right is None and samples is None:
            return
        if right is None or samples is None or not 0 <= right <= samples:
            raise ArtefactError(
                "samples and assistant_right must be there both or neither, assistant_right from "
                f"0 to samples; got {show(samples)} and {show(right)}."
            )

    @property
    def depth(self) -> int:
        """No question is asked."""
        return 0


@dataclass(frozen=True, slots=True)
class Split:
    """A question: whether a feature is at most a threshold.

    Attributes:
        feature: which one.
        threshold: in the feature's unit.
        below: what follows if it is at most that.
        above: what follows if it is more.
        depth: the most questions from here to a leaf.

    Raises:
        ArtefactError: if there is no such feature, the threshold is no finite number, or the tree
            is too deep.
    """

    feature: str
    threshold: float
    below: Node
    above: Node
    depth: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise ArtefactError(unknown("feature", self.feature, get_args(Feature)))
        if not math.isfinite(self.threshold):
            raise ArtefactError(f"threshold must be a finite number, got {self.threshold}.")
        depth = 1 + max(self.below.depth, self.above.depth)
        if depth > MAX_DEPTH:
            raise ArtefactError(_TOO_DEEP)
        object.__setattr__(self, "depth", depth)


Node: TypeAlias = Leaf | Split
"""The root of a tree, or of a part of one."""

_TOO_DEEP = f"deeper than {MAX_DEPTH} questions; make the tree simpler."


class Tree(Artefact["Node"]):
    """A decision tree: ``Tree(Split("p_draft", 0.5, Leaf(True, 0.8), Leaf(False, 0.1)))``.

    Lives in a ``.json`` file, or in a ``.txt`` or ``.tree`` file in the form of :meth:`as_text`.
    """

    suffix: ClassVar[str] = ".json"

    @classmethod
    def read(cls, path: Path) -> Node:
        """See :meth:`Artefact.read`; a message names the place in the tree, or the line."""
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{path} cannot be read ({error}); is it whole?") from error
        if _is_text(path):
            return _Lines(text, str(path)).tree()
        return _from_json(text, str(path))

    @classmethod
    def write(cls, content: Node, path: Path) -> None:
        """See :meth:`Artefact.write`."""
        write_whole(path, _as_text(content) if _is_text(path) else _as_json(content))

    def as_text(self) -> str:
        """The tree as lines of ``if`` and ``else``, exact to the last bit of every number."""
        return _as_text(self.content)

    @classmethod
    def from_text(cls, text: str, origin: str = "tree") -> Tree:
        """The tree of :meth:`as_text`; how many positions came to a leaf is not read back.

        A leaf is ``keep`` or ``replace``, with or without its probability (0 and 1 are meant
        without); a question is ``if FEATURE <= NUMBER:``, or with ``<``, and has its ``else:``.
        What follows a colon stands on the same line if it is a leaf, or on deeper lines below.

        Raises:
            ArtefactError: naming ``origin``, the line, and what may stand there.
        """
        return cls(_Lines(text, origin).tree())

    @cached_property
    def used(self) -> tuple[Feature, ...]:
        """The features that it asks about, in the order in which they are listed."""
        asked = {node.feature for node in self.splits}
        return tuple(name for name in get_args(Feature) if name in asked)

    @property
    def splits(self) -> Iterator[Split]:
        """Every question, the first one first."""
        return (node for node in _nodes(self.content) if isinstance(node, Split))

    @cached_property
    def _flat(self) -> _Flat:
        return _Flat.of(self.content, self.used)

    def decide(
        self, features: Float[Tensor, "*places used"]
    ) -> tuple[Bool[Tensor, "*places"], Float[Tensor, "*places"]]:
        """What the leaves say, in any number of places at once.

        Args:
            features: in float32, in the order of :attr:`used`.

        Returns:
            Whether the assistant replaces, and the probability that it is right.
        """
        return self._flat.decide(features)

    def may_replace(
        self, known: Mapping[str, Tensor], n_positions: int, device: torch.device
    ) -> Bool[Tensor, "positions"]:
        """Where a leaf that replaces can be reached, whatever the other features are.

        Args:
            known: by name, features [positions] in float32 whose values are known.
            n_positions: how many positions.
            device: where they are.
        """
        import torch

        def reaches(node: Node) -> Tensor:
            if isinstance(node, Leaf):
                return torch.full((n_positions,), node.replace, device=device)
            below, above = reaches(node.below), reaches(node.above)
            if node.feature not in known:
                return below | above
            limit = _down_to_float32([node.threshold]).to(device)
            return torch.where(known[node.feature] <= limit, below, above)

        return reaches(self.content)


@dataclass(frozen=True)
class _Flat:
    """A tree as arrays over its nodes, the root first; a leaf leads to itself.

    Attributes:
        depth: questions to the deepest leaf.
        column: per node, which feature is asked about.
        threshold: per node, rounded down to float32.
        below: per node, the number of the next one.
        above: per node, the number of the next one.
        replace: per node, what a leaf says.
        probability: per node, what a leaf says.
    """

    depth: int
    column: Int[Tensor, "nodes"]
    threshold: Float[Tensor, "nodes"]
    below: Int[Tensor, "nodes"]
    above: Int[Tensor, "nodes"]
    replace: Bool[Tensor, "nodes"]
    probability: Float[Tensor, "nodes"]

    @classmethod
    def of(cls, root: Node, used: Sequence[str]) -> _Flat:
        import torch

        rows: list[tuple[int, float, int, int, bool, float]] = []

        def enter(node: Node) -> int:
            number = len(rows)
            if isinstance(node, Leaf):
                rows.append((0, 0.0, number, number, node.replace, node.probability))
                return number
            rows.append((0, 0.0, 0, 0, False, 0.0))  # its place; its children come behind it
            below, above = enter(node.below), enter(node.above)
            rows[number] = (used.index(node.feature), node.threshold, below, above, False, 0.0)
            return number

        enter(root)
        column, threshold, below, above, replaces, probability = zip(*rows, strict=True)
        return cls(
            root.depth,
            torch.tensor(column),
            _down_to_float32(threshold),
            torch.tensor(below),
            torch.tensor(above),
            torch.tensor(replaces),
            torch.tensor(probability, dtype=torch.float32),
        )

    def decide(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Tree.decide`."""
        import torch

        device = features.device
        column, threshold = self.column.to(device), self.threshold.to(device)
        below, above = self.below.to(device), self.above.to(device)
        at = torch.zeros(features.shape[:-1], dtype=torch.long, device=device)
        for _ in range(self.depth):
            value = features.gather(-1, column[at][..., None])[..., 0]
            at = torch.where(value <= threshold[at], below[at], above[at])
        return self.replace.to(device)[at], self.probability.to(device)[at]


def _down_to_float32(thresholds: Sequence[float]) -> Float[Tensor, "thresholds"]:
    """The greatest float32 up to each: for float32 features the comparison is the same one.

    So the tree is exact on devices that have no float64.
    """
    import torch

    exact = torch.tensor(thresholds, dtype=torch.float64)
    near = exact.float()
    lower = torch.nextafter(near, torch.tensor(-torch.inf))
    return torch.where(near.double() > exact, lower, near)


def _nodes(root: Node) -> Iterator[Node]:
    yield root
    if isinstance(root, Split):
        yield from _nodes(root.below)
        yield from _nodes(root.above)


# ---- JSON


def _as_json(root: Node) -> str:
    data = {"format": _FORMAT, "tree": _plain(root)}
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _plain(node: Node) -> dict[str, Any]:
    if isinstance(node, Split):
        return {
            "feature": node.feature,
            "threshold": float(node.threshold),
            "below": _plain(node.below),
            "above": _plain(node.above),
        }
    leaf: dict[str, Any] = {"replace": node.replace, "probability": float(node.probability)}
    if node.samples is not None:
        leaf |= {"samples": node.samples, "assistant_right": node.assistant_right}
    return leaf


_SPLIT = ("feature", "threshold", "below", "above")
_LEAF = ("replace", "probability")
_COUNTS = ("samples", "assistant_right")


def _from_json(text: str, origin: str) -> Node:
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ArtefactError(f"{origin}: {_TOO_DEEP}") from error
    except ValueError as error:
        raise ArtefactError(f"{origin} is no JSON ({error}); is it whole?") from error
    try:
        _check_keys(data, "the file", ("format", "tree"))
        if type(data["format"]) is not int or data["format"] != _FORMAT:
            raise ArtefactError(
                f"format must be {_FORMAT}, got {show(data['format'])}; a newer multicolm "
                "may read it."
            )
        return _node(data["tree"], "tree", 0)
    except ArtefactError as error:
        raise ArtefactError(f"{origin}: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' stands twice in one place")
    return dict(pairs)


def _node(data: Any, place: str, level: int) -> Node:
    if level > MAX_DEPTH:
        raise ArtefactError(f"{place}: {_TOO_DEEP}")
    if isinstance(data, dict) and not data.keys().isdisjoint(_LEAF):
        _check_keys(data, f"{place}: a leaf", _LEAF, _COUNTS)
        return _placed(place, lambda: _leaf(data))
    _check_keys(data, f"{place}: a split", _SPLIT)
    below = _node(data["below"], f"{place}.below", level + 1)
    above = _node(data["above"], f"{place}.above", level + 1)
    return _placed(place, lambda: _split(data, below, above))


def _leaf(data: Mapping[str, Any]) -> Leaf:
    if not isinstance(data["replace"], bool):
        raise ArtefactError(f"replace must be true or false, got {show(data['replace'])}.")
    for key in _COUNTS:
        if key in data and type(data[key]) is not int:
            raise ArtefactError(f"{key} must be a whole number, got {show(data[key])}.")
    return Leaf(data["replace"], _real(data, "probability"), *(data.get(key) for key in _COUNTS))


def _split(data: Mapping[str, Any], below: Node, above: Node) -> Split:
    if not isinstance(data["feature"], str):
        raise ArtefactError(f"feature must be text, got {show(data['feature'])}.")
    return Split(data["feature"], _real(data, "threshold"), below, above)


def _real(data: Mapping[str, Any], key: str) -> float:
    value = data[key]
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise ArtefactError(f"{key} must be a finite number, got {show(value)}.")


def _placed(place: str, make: Callable[[], Node]) -> Node:
    try:
        return make()
    except ArtefactError as error:
        raise ArtefactError(f"{place}: {error}") from error


def _check_keys(
    data: Any, what: str, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if not isinstance(data, dict):
        raise ArtefactError(
            f"{what} must be a mapping with {', '.join(required)}, got {show(data)}."
        )
    for key in required:
        if key not in data:
            raise ArtefactError(f"{what} needs {', '.join(required)}; '{key}' is missing.")
    for key in data:
        if key not in (*required, *optional):
            raise ArtefactError(f"{what}: {unknown('key', key, [*required, *optional])}")


# ---- text


_HEAD = """\
# keep P: the base model's token stays. replace P: the assistant's takes its place.
# P is how likely the assistant is right; where several would replace, the greatest P does.
"""
_INDENT = "    "
_QUESTION = re.compile(r"if\s+(\S+)\s*(<=|<)\s*([^\s:]+)\s*:\s*(.*)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_FORMS = "allowed are `keep`, `replace`, and `if FEATURE <= NUMBER:`"


def _is_text(path: Path) -> bool:
    """Whether a file holds the text form; otherwise it holds JSON."""
    if path.suffix in (".txt", ".tree"):
        return True
    if path.suffix == ".json":
        return False
    raise ArtefactError(f"{path}: a tree is a .json file, or a .txt or .tree file with its text.")


def _as_text(root: Node) -> str:
    return _HEAD + "\n".join(_lines(root, "")) + "\n"


def _lines(node: Node, indent: str) -> Iterator[str]:
    if isinstance(node, Leaf):
        yield indent + _leaf_text(node)
        return
    yield from _branch(f"{indent}if {node.feature} <= {float(node.threshold)!r}:", node.below)
    yield from _branch(f"{indent}else:", node.above)


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
            self._refuse(line, _TOO_DEEP)
        if not line.text.startswith("if "):
            return self._leaf(line, line.text)
        question = _QUESTION.fullmatch(line.text)
        if question is None:
            self._refuse(line, f"'{line.text}' cannot be read; {_FORMS}.")
        feature, sign, number, rest = question.groups()
        threshold = self._number(line, number)
        if sign == "<":  # the same question for every number
            threshold = math.nextafter(threshold, -math.inf)
        below = self._after_colon(line, line, rest, level)
        otherwise = self._else_of(line)
        above = self._after_colon(line, otherwise, otherwise.text[5:].strip(), level)
        try:
            return Split(feature, threshold, below, above)
        except ArtefactError as error:
            self._refuse(line, str(error))

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
            self._refuse(line, "a question needs a line of its own, deeper than this one.")
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
