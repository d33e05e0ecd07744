"""What a decision tree is made of: leaves, and questions about models and about who asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, WrapValidator
from pydantic_core import PydanticCustomError

from multicolm.config.wording import show
from multicolm.errors import ArtefactError, unknown

__all__ = [
    "KINDS",
    "MAX_DEPTH",
    "MEANINGS",
    "TOO_DEEP",
    "AssistantSplit",
    "Feature",
    "Leaf",
    "Node",
    "Split",
    "branches",
    "every_node",
]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

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
"""A number that a tree may ask about: of the base model, which drafts, of one assistant, or of all.

See :data:`MEANINGS`.
"""

MEANINGS: Mapping[Feature, str] = {
    "p_draft": "probability of the base model's most likely token",
    "p_assistant": "probability of the assistant's most likely token",
    "entropy_draft": "entropy of the base model's next token, in nats",
    "entropy_assistant": "entropy of the assistant's next token, in nats",
    "margin_draft": "p_draft minus the probability of the base model's second token",
    "margin_assistant": "p_assistant minus the probability of the assistant's second token",
    "agreement": "part of all models whose most likely token is the assistant's",
    "position": "tokens of the text written before",
}
"""What each feature is, in words."""


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

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

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

    @property
    def log_odds(self) -> float:
        """Of the probability, in nats; infinite where that is 0 or 1."""
        p = self.probability
        return math.log(p) - math.log1p(-p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


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

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

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
        object.__setattr__(self, "depth", _depth(self.below, self.above))


@dataclass(frozen=True, slots=True)
class AssistantSplit:
    """A question: whether the assistant is one of some that are named.

    Attributes:
        assistants: the names.
        among: what follows if it is.
        others: what follows for every other assistant.
        depth: the most questions from here to a leaf.

    Raises:
        ArtefactError: if nobody is named, or somebody twice, or the tree is too deep.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    assistants: Annotated[tuple[str, ...], Field(strict=False)]
    among: Node
    others: Node
    depth: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.assistants or len(set(self.assistants)) < len(self.assistants):
            raise ArtefactError(
                "a question about the assistant names one or more, each once; got "
                f"{show(list(self.assistants))}."
            )
        object.__setattr__(self, "depth", _depth(self.among, self.others))


def _kind(data: Any) -> str:
    """Which node a mapping of a file is meant to be."""
    if isinstance(data, dict) and not data.keys().isdisjoint(KINDS["leaf"][:2]):
        return "leaf"
    return "who" if isinstance(data, dict) and "assistants" in data else "split"


def _placed(data: Any, read: Callable[[Any], Any]) -> Any:
    """Let pydantic say at which place of the tree a node is wrong."""
    try:
        return read(data)
    except ArtefactError as error:
        raise PydanticCustomError("node", "{reason}", {"reason": str(error)}) from error


Node: TypeAlias = Annotated[
    Annotated[Leaf, Tag("leaf")]
    | Annotated[Split, Tag("split")]
    | Annotated[AssistantSplit, Tag("who")],
    Discriminator(_kind),
    WrapValidator(_placed),
]
"""The root of a tree, or of a part of one."""

KINDS: Mapping[str, Sequence[str]] = {
    "leaf": ("replace", "probability", "samples", "assistant_right"),
    "split": ("feature", "threshold", "below", "above"),
    "who": ("assistants", "among", "others"),
}
"""The nodes that there are, and the keys of each in a file."""

TOO_DEEP = f"deeper than {MAX_DEPTH} questions; make the tree simpler."


def _depth(*branches: Node) -> int:
    """Of a question with these branches.

    Raises:
        ArtefactError: if that is too many questions.
    """
    depth = 1 + max(branch.depth for branch in branches)
    if depth > MAX_DEPTH:
        raise ArtefactError(TOO_DEEP)
    return depth


def branches(node: Split | AssistantSplit) -> tuple[Node, Node]:
    """What follows a question: if the answer is yes, and if it is no."""
    if isinstance(node, Split):
        return node.below, node.above
    return node.among, node.others


def every_node(root: Node) -> Iterator[Node]:
    """All nodes of a tree, each before those below it."""
    yield root
    if not isinstance(root, Leaf):
        for branch in branches(root):
            yield from every_node(branch)
