"""Learns a decision tree from a score table: whether an assistant or the base model is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from multicolm.learning.reliability import reliability
from multicolm.policy.tree import AssistantSplit, Feature, Leaf, Node, Split, Tree
from multicolm.score_table import ScoreTable

__all__ = ["Examples", "examples", "learn_tree", "tree_report"]


@dataclass(frozen=True)
class Examples:
    """Positions at which an assistant and the base model differ and one of the two is right.

    As the corpus says, or roll-outs where the table has some
    (:attr:`multicolm.score_table.ScoreTable.right`).

    Attributes:
        names: of the columns of ``features``.
        assistants: the names of all assistants.
        features: what the two show.
        assistant: whose token it is, as a number in ``assistants``.
        right: whether that is the one that is right.
    """

    names: tuple[Feature, ...]
    assistants: tuple[str, ...]
    features: Float[Tensor, "examples features"]
    assistant: Int[Tensor, "examples"]
    right: Bool[Tensor, "examples"]

    def __len__(self) -> int:
        return len(self.right)


def examples(
    table: ScoreTable, names: Sequence[Feature], number: Callable[[Feature, int], Tensor]
) -> Examples:
    """The examples of a score table.

    Args:
        table: of the ensemble's models.
        names: the features.
        number: a feature of an assistant, by its index, at every position.
    """
    seen, who, right = [torch.zeros(0, len(names))], [], [torch.zeros(0, dtype=torch.bool)]
    for k in range(1, table.n_models):
        which = table.known[:, 0] & table.known[:, k]
        if "agreement" in names:  # while a text is written, it is known of every model
            which &= table.known.all(1)
        which &= table.top1_ids[:, k] != table.top1_ids[:, 0]
        which &= table.right[:, k] ^ table.right[:, 0]
        right.append(table.right[which, k])
        who += [k - 1] * len(right[-1])
        columns = [number(name, k)[which] for name in names]
        seen.append(torch.stack(columns, -1) if columns else torch.zeros(len(right[-1]), 0))
    return Examples(
        tuple(names),
        tuple(table.models[1:]),
        torch.cat(seen),
        torch.tensor(who, dtype=torch.long),
        torch.cat(right),
    )


def learn_tree(
    learnt_from: Examples,
    *,
    max_depth: int,
    min_samples_leaf: int,
    balance: bool,
    ask_who: bool,
) -> Tree:
    """A tree that separates the positions where the assistant is right from the others.

    A leaf goes by the positions that came to it: the assistant replaces where it was right at more
    than half of them, with probability (right + 1) / (positions + 2).

    Args:
        learnt_from: one example at least.
        max_depth: the most questions on the way to a leaf.
        min_samples_leaf: examples that have to come to a leaf.
        balance: whether questions are chosen as if both kinds of examples were equally many.
        ask_who: whether it may ask who the assistant is.

    Source:
        CART with Gini impurity. Assistants are ordered by how often they are right, which for two
        classes makes the best grouping an interval (Breiman et al. 1984, theorem 4.5).
    """
    seen, labels = learnt_from.features.cpu().numpy(), learnt_from.right.cpu().numpy()
    ranks = _ranks(learnt_from)
    if ask_who:
        whose = np.array(ranks, dtype=np.float32)[learnt_from.assistant.numpy()]
        seen = np.column_stack([seen, whose])

    def leaf(here: int, here_right: int) -> Leaf:
        return Leaf(2 * here_right > here, (here_right + 1) / (here + 2), here, here_right)

    if labels.all() or not labels.any() or not seen.shape[1]:
        return Tree(leaf(len(labels), int(labels.sum())))
    learner = DecisionTreeClassifier(
        max_depth=max_depth,
        min_samples_leaf=min_samples_leaf,
        class_weight="balanced" if balance else None,
        random_state=0,
    )
    found = learner.fit(seen, labels).tree_
    ends = learner.apply(seen)
    n_here = np.bincount(ends, minlength=found.node_count)
    n_here_right = np.bincount(ends[labels], minlength=found.node_count)

    def node(number: int) -> Node:
        yes, no = int(found.children_left[number]), int(found.children_right[number])
        if yes == no:  # both -1
            return leaf(int(n_here[number]), int(n_here_right[number]))
        column, threshold = int(found.feature[number]), float(found.threshold[number])
        if column < len(learnt_from.names):
            return Split(learnt_from.names[column], threshold, node(yes), node(no))
        named = list(zip(learnt_from.assistants, ranks, strict=True))
        low = [name for name, rank in named if rank <= threshold]
        high = [name for name, rank in named if rank > threshold]
        if len(high) <= len(low):  # the shorter list is the easier one to read
            return AssistantSplit(tuple(high), node(no), node(yes))
        return AssistantSplit(tuple(low), node(yes), node(no))

    return Tree(node(0))


def _ranks(learnt_from: Examples) -> list[int]:
    """Per assistant its rank, from 0 for who is right least often; equals have the same."""
    n = len(learnt_from.assistants)
    here = torch.bincount(learnt_from.assistant, minlength=n)
    here_right = torch.bincount(learnt_from.assistant[learnt_from.right], minlength=n)
    share = ((here_right + 1) / (here + 2)).tolist()
    return [sorted(set(share)).index(part) for part in share]


def tree_report(tree: Tree, learnt_from: Examples) -> dict[str, Any]:
    """How often the tree decides rightly where one of the two models is right, and the other not.

    These are the positions that it was learned from: with a few questions it has little to learn
    by heart, and with three examples nothing could be held out.
    """
    columns = [learnt_from.features[:, learnt_from.names.index(name)] for name in tree.used]
    names = learnt_from.assistants
    for group in tree.groups:
        is_another = torch.tensor([float(name not in group) for name in names])
        columns.append(is_another[learnt_from.assistant])
    right = learnt_from.right
    seen = torch.stack(columns, -1) if columns else torch.zeros(len(right), 0)
    decided = tree.decide(seen.float())
    return {
        "positions": len(right),
        "right_ways": float((decided.replace == right).float().mean()),
        "right_ways_always_base": float((~right).float().mean()),
        "right_ways_always_assistant": float(right.float().mean()),
        "questions": sum(1 for _ in tree.splits),
    } | reliability(decided.probability, right.float())
