"""A decision tree that says where an assistant's token replaces the base model's.

It is kept as JSON, and shown as text:

    if p_draft <= 0.53:
        if assistant in ["facts"]: replace 0.82
        else: keep 0.14
    else: keep 0.05

It is evaluated with tensors; scikit-learn is needed to learn one and not to use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, get_args

from jaxtyping import Bool, Float, Int

from multicolm.artefacts import Artefact
from multicolm.errors import ArtefactError
from multicolm.files import write_whole
from multicolm.policy.tree_json import as_json, from_json
from multicolm.policy.tree_nodes import (
    MAX_DEPTH,
    AssistantSplit,
    Feature,
    Leaf,
    Node,
    Split,
    branches,
    every_node,
)
from multicolm.policy.tree_text import as_text
from multicolm.types import Tensor

if TYPE_CHECKING:
    import torch


__all__ = ["MAX_DEPTH", "AssistantSplit", "Decided", "Feature", "Leaf", "Node", "Split", "Tree"]


class Tree(Artefact["Node"]):
    """A decision tree: ``Tree(Split("p_draft", 0.5, Leaf(True, 0.8), Leaf(False, 0.1)))``.

    Lives in a ``.json`` file.
    """

    suffix: ClassVar[str] = ".json"

    @classmethod
    def read(cls, path: Path) -> Node:
        """See :meth:`Artefact.read`; a message names the place in the tree."""
        _check_suffix(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{path} cannot be read ({error}); is it whole?") from error
        return from_json(text, str(path))

    @classmethod
    def write(cls, content: Node, path: Path) -> None:
        """See :meth:`Artefact.write`."""
        _check_suffix(path)
        write_whole(path, as_json(content))

    def as_text(self) -> str:
        """The tree as lines of ``if`` and ``else``; comments above it say what its features are."""
        return as_text(self.content)

    @cached_property
    def used(self) -> tuple[Feature, ...]:
        """The features that it asks about, in the order in which they are listed."""
        asked = {node.feature for node in self.splits if isinstance(node, Split)}
        return tuple(name for name in get_args(Feature) if name in asked)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups of assistants that it asks about, each once."""
        asked = [node.assistants for node in self.splits if isinstance(node, AssistantSplit)]
        return tuple(dict.fromkeys(asked))

    @property
    def splits(self) -> Iterator[Split | AssistantSplit]:
        """Every question, the first one first."""
        return (node for node in every_node(self.content) if not isinstance(node, Leaf))

    @cached_property
    def _flat(self) -> _Flat:
        return _Flat.of(self.content, [*self.used, *self.groups])

    def decide(self, features: Float[Tensor, "*places columns"]) -> Decided:
        """What the leaves say, in any number of places at once.

        Args:
            features: in float32, in the order of :attr:`used`; then a column for each of
                :attr:`groups`, which is 0 for an assistant of the group and 1 for another.
        """
        return self._flat.decide(features)

    def can_replace(self, assistant: str) -> bool:
        """Whether a leaf that replaces can be reached for an assistant, whatever is seen."""
        return any(leaf.replace for leaf in _leaves(self.content, assistant))

    def may_replace(
        self,
        known: Mapping[str, Tensor],
        n_positions: int,
        device: torch.device,
        *,
        assistant: str,
        least: float = -math.inf,
    ) -> Bool[Tensor, "positions"]:
        """Where a leaf that replaces can be reached, whatever the unknown features are.

        Args:
            known: by name, features [positions] in float32 whose values are known.
            n_positions: how many positions.
            device: where they are.
            assistant: whose token it would be.
            least: the log-odds, in nats, that the probability of such a leaf has to have.
        """
        import torch

        def reaches(node: Node) -> Tensor:
            if isinstance(node, Leaf):
                # In float32, as :meth:`decide` has it: one of them must not be finer.
                log_odds = torch.tensor(node.log_odds, dtype=torch.float32)
                passes = node.replace and bool(log_odds >= least)
                return torch.full((n_positions,), passes, device=device)
            if isinstance(node, AssistantSplit):
                return reaches(node.among if assistant in node.assistants else node.others)
            below, over = reaches(node.below), reaches(node.above)
            if node.feature not in known:
                return below | over
            limit = _down_to_float32([node.threshold]).to(device)
            return torch.where(known[node.feature] <= limit, below, over)

        return reaches(self.content)


class Decided(NamedTuple):
    """What the leaves of a tree say in some places.

    Attributes:
        replace: whether the assistant's token replaces the base model's.
        probability: that the assistant is right, where one of the two is.
        log_odds: of that probability, in nats.
    """

    replace: Bool[Tensor, "*places"]
    probability: Float[Tensor, "*places"]
    log_odds: Float[Tensor, "*places"]


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
        log_odds: of the probabilities, in nats.
    """

    depth: int
    column: Int[Tensor, "nodes"]
    threshold: Float[Tensor, "nodes"]
    below: Int[Tensor, "nodes"]
    above: Int[Tensor, "nodes"]
    replace: Bool[Tensor, "nodes"]
    probability: Float[Tensor, "nodes"]
    log_odds: Float[Tensor, "nodes"]

    @classmethod
    def of(cls, root: Node, columns: Sequence[str | tuple[str, ...]]) -> _Flat:
        import torch

        rows: list[tuple[int, float, int, int, Leaf]] = []
        no_leaf = Leaf(False, 0.0)

        def enter(node: Node) -> int:
            number = len(rows)
            if isinstance(node, Leaf):
                rows.append((0, 0.0, number, number, node))
                return number
            rows.append((0, 0.0, 0, 0, no_leaf))  # its place; its children come after it
            asked, threshold = (
                (node.feature, node.threshold)
                if isinstance(node, Split)
                else (node.assistants, 0.5)  # 0 is one of them, 1 is another
            )
            yes, no = (enter(branch) for branch in branches(node))
            rows[number] = (columns.index(asked), threshold, yes, no, no_leaf)
            return number

        enter(root)
        column, threshold, below, above, leaves = zip(*rows, strict=True)
        return cls(
            root.depth,
            torch.tensor(column),
            _down_to_float32(threshold),
            torch.tensor(below),
            torch.tensor(above),
            torch.tensor([leaf.replace for leaf in leaves]),
            torch.tensor([leaf.probability for leaf in leaves], dtype=torch.float32),
            torch.tensor([leaf.log_odds for leaf in leaves], dtype=torch.float32),
        )

    def decide(self, features: Tensor) -> Decided:
        """See :meth:`Tree.decide`."""
        import torch

        device = features.device
        column, threshold = self.column.to(device), self.threshold.to(device)
        below, above = self.below.to(device), self.above.to(device)
        at = torch.zeros(features.shape[:-1], dtype=torch.long, device=device)
        for _ in range(self.depth):
            value = features.gather(-1, column[at][..., None])[..., 0]
            at = torch.where(value <= threshold[at], below[at], above[at])
        said = (self.replace, self.probability, self.log_odds)
        return Decided(*(of_node.to(device)[at] for of_node in said))


def _down_to_float32(thresholds: Sequence[float]) -> Float[Tensor, "thresholds"]:
    """The greatest float32 up to each: for float32 features the comparison is the same one.

    So the tree is exact on devices that have no float64.
    """
    import torch

    exact = torch.tensor(thresholds, dtype=torch.float64)
    near = exact.float()
    lower = torch.nextafter(near, torch.tensor(-torch.inf))
    return torch.where(near.double() > exact, lower, near)


def _leaves(node: Node, assistant: str) -> Iterator[Leaf]:
    """Those that an assistant can come to."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, AssistantSplit):
        yield from _leaves(node.among if assistant in node.assistants else node.others, assistant)
    else:
        for branch in branches(node):
            yield from _leaves(branch, assistant)


def _check_suffix(path: Path) -> None:
    """Refuse files that hold no tree.

    Raises:
        ArtefactError: if it is no JSON file.
    """
    if path.suffix in (".txt", ".tree"):
        raise ArtefactError(
            f"{path}: trees as text, which 0.1 read, are only shown now; give the tree.json that "
            "it came from, and edit that."
        )
    if path.suffix != ".json":
        raise ArtefactError(f"{path}: a tree is a .json file.")
