"""CoSD's decision tree as a policy, learned from three examples on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.config.wording import Strict
from multicolm.errors import TrainingError
from multicolm.policy.base import (
    ModelFacts,
    Needs,
    Schedule,
    SelectPolicy,
    When,
    register_policy,
)
from multicolm.policy.learned import check_made_for, untrained
from multicolm.policy.threshold import best_assistant
from multicolm.policy.tree import MAX_DEPTH, Feature, Leaf, Node, Split, Tree
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, View, Views

if TYPE_CHECKING:
    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreTable

__all__ = ["CosdTreePolicy"]


@dataclass(frozen=True, slots=True)
class _Number:
    """Something that every model shows of itself.

    Attributes:
        signal: that has to be asked for.
        of_view: the number at every position.
        of_table: the same of all models: [positions, models].
    """

    signal: Signal
    of_view: Callable[[View], Tensor]
    of_table: Callable[[ScoreTable], Tensor]


_NUMBERS = {
    "p": _Number("top1", lambda v: v.top1_probs, lambda table: table.top1_logprobs.float().exp()),
    "entropy": _Number("logprobs", lambda v: v.entropy_nats, lambda table: table.entropies.float()),
    "margin": _Number("topk", lambda v: v.margins, lambda table: table.margins.float()),
}


def _number_of(feature: str, role: Literal["draft", "assistant"]) -> _Number | None:
    """The number that a feature is of that model; ``None`` if it is about another one, or none."""
    name, _, whose = feature.partition("_")
    return _NUMBERS[name] if whose == role else None


def _agreement(top1_ids: Int[Tensor, "models positions"], k: int) -> Float[Tensor, "positions"]:
    """The part of all models whose most likely token is that of model ``k``."""
    return (top1_ids == top1_ids[k]).sum(0) / top1_ids.shape[0]


@register_policy("cosd-tree")
class CosdTreePolicy(SelectPolicy):
    """A decision tree says of every assistant whether its token replaces the base model's.

    An assistant is a candidate where its most likely token differs from the base model's and the
    tree says ``replace``. The candidate with the most probable leaf writes, of equal ones the
    surest; without one, the base model. Assistants are run only where the base model's own numbers
    leave a way to ``replace``, which changes nothing but the cost.

    Attributes:
        tree: what was learned; nothing yet if not given.
        features: what :meth:`fit` may ask about; a tree that is there asks what it asks.
        max_depth: the most questions on the way to a leaf.
        min_samples_leaf: positions that have to come to a leaf, so that it is no chance.
        balance: whether the positions where the assistant is right count as much, all together, as
            those where the base model is, however many there are of each.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        arXiv 2502.08020 (ICML 2025), section 3, tree-based verification: two features, learned
        from three samples. Depth, leaf size, class weights and more than one assistant are ours.
    """

    tree: Tree | None = None
    features: tuple[Feature, ...] = Field(default=("p_draft", "p_assistant"), min_length=1)
    max_depth: int = Field(default=3, ge=1, le=MAX_DEPTH)
    min_samples_leaf: int = Field(default=5, ge=1)
    balance: bool = True
    made_for: dict[str, str] | None = None

    assistants: ClassVar[When] = "deferred"
    schedule: ClassVar[Schedule] = "block"

    @property
    def _learned(self) -> Tree:
        if self.tree is None:
            raise untrained(self.name)
        return self.tree

    def needs(self, models: ModelNames) -> Needs:
        """What the tree asks about, and everybody's most likely token.

        Raises:
            ArtefactError: if the tree's file is missing or damaged.
            CapabilityError: if nothing was learned yet.
        """
        used = self._learned.used
        base, others = (
            frozenset[Signal]({"top1"}).union(
                number.signal for name in used if (number := _number_of(name, role))
            )
            for role in ("draft", "assistant")
        )
        return Needs({0: base}, dict.fromkeys(range(1, len(models)), others))

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse models that it was not trained with.

        Raises:
            CapabilityError: naming both.
        """
        check_made_for(self.name, self.made_for, models)

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's most likely token."""
        return views.base.top1_probs

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where some assistant could replace the base model's token, by the latter's numbers."""
        known: dict[str, Tensor] = {
            name: number.of_view(views.base)
            for name in self._learned.used
            if (number := _number_of(name, "draft"))
        }
        if "position" in self._learned.used:
            known["position"] = views.place.float()
        device = views.base.top1_ids.device
        return self._learned.may_replace(known, views.n_positions, device)

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The candidate with the most probable leaf, else the base model."""
        import torch

        if not views.assistants:
            return torch.zeros(views.n_positions, dtype=torch.long)
        replaces, probability = self._learned.decide(self._seen(views))
        ids = views.stack(lambda view: view.top1_ids)
        candidate = replaces & (ids[1:] != ids[0])
        probability = probability.masked_fill(~candidate, -1.0)
        first = candidate & (probability == probability.max(0).values)
        sureness = torch.stack([views[k].top1_logprobs for k in views.assistants])
        best = best_assistant(views, sureness.masked_fill(~first, float("-inf")))
        return best.masked_fill(~candidate.any(0), 0)

    def _seen(self, views: Views) -> Float[Tensor, "assistants positions used"]:
        """What the tree asks about, of every assistant."""
        import torch

        used = self._learned.used
        if not used:
            shape = (len(views.assistants), views.n_positions, 0)
            return torch.zeros(shape, device=views.base.top1_ids.device)
        seen = [[_from_views(name, views, k) for name in used] for k in views.assistants]
        return torch.stack([torch.stack(columns, -1) for columns in seen])

    def fit(self, table: ScoreTable, training: Training | None = None) -> CosdTreePolicy:
        """The same policy with a tree that was learned from a score table.

        It learns from each position and assistant whose most likely token differs from the base
        model's, where one of the two is right: whether it is the assistant. If it is always the
        same one that is right, or no question separates them, the tree is a single leaf.

        Args:
            table: of the ensemble's models.
            training: takes no options; what was measured, on the same positions, goes into its
                report.

        Raises:
            ConfigError: if the training has options.
            TrainingError: if there is no such position.
        """
        if training is not None:
            training.settings(Strict)
        features, right = _examples(table, self.features)
        if len(right) == 0:
            raise TrainingError(
                f"policy '{self.name}' finds nothing to learn from: at no position of this score "
                f"table do base model '{table.models[0]}' and an assistant have different first "
                "choices, one of them right; score texts that one of them gets right."
            )
        tree = Tree(_learn(features, right, self))
        if training is not None:
            training.report |= _report(tree, self.features, features, right)
        made_for = dict(zip(table.models, table.identities or [""] * table.n_models, strict=True))
        return replace(self, tree=tree, made_for=made_for)


def _report(
    tree: Tree, names: Sequence[Feature], features: Tensor, right: Tensor
) -> dict[str, Any]:
    """How often the tree decides rightly where one of the two models is right, and the other not.

    These are the positions that it was learned from: with a few questions it has little to learn
    by heart, and with three examples nothing could be held out.
    """
    from multicolm.learning.reliability import reliability

    columns = [names.index(name) for name in tree.used]
    replaces, probability = tree.decide(features[:, columns].float())
    return {
        "positions": len(right),
        "right_ways": float((replaces == right).float().mean()),
        "right_ways_always_base": float((~right).float().mean()),
        "right_ways_always_assistant": float(right.float().mean()),
        "questions": sum(1 for _ in tree.splits),
    } | reliability(probability, right.float())


def _from_views(feature: Feature, views: Views, k: int) -> Float[Tensor, "positions"]:
    if feature == "position":
        return views.place.float()
    if feature == "agreement":
        return _agreement(views.stack(lambda view: view.top1_ids), k)
    if number := _number_of(feature, "draft"):
        return number.of_view(views.base)
    name = feature.partition("_")[0]
    return _NUMBERS[name].of_view(views[k])


def _from_table(feature: Feature, table: ScoreTable, k: int) -> Float[Tensor, "positions"]:
    if feature == "position":
        return table.place.float()
    if feature == "agreement":
        return _agreement(table.top1_ids.T, k)
    if number := _number_of(feature, "draft"):
        return number.of_table(table)[:, 0]
    name = feature.partition("_")[0]
    return _NUMBERS[name].of_table(table)[:, k]


def _examples(
    table: ScoreTable, features: Sequence[Feature]
) -> tuple[Float[Tensor, "examples features"], Bool[Tensor, "examples"]]:
    """What the assistant and the base model show where one of them is right, and who is."""
    import torch

    seen, right = [torch.zeros(0, len(features))], [torch.zeros(0, dtype=torch.bool)]
    for k in range(1, table.n_models):
        which = table.known[:, 0] & table.known[:, k]
        if "agreement" in features:  # while a text is written, it is known of every model
            which &= table.known.all(1)
        which &= table.top1_ids[:, k] != table.top1_ids[:, 0]
        which &= table.correct[:, k] | table.correct[:, 0]
        columns = [_from_table(name, table, k)[which] for name in features]
        seen.append(torch.stack(columns, -1))
        right.append(table.correct[which, k])
    return torch.cat(seen), torch.cat(right)


def _learn(features: Tensor, right: Tensor, policy: CosdTreePolicy) -> Node:
    """A tree that tells the positions where the assistant is right from the others."""
    n_right, n = int(right.sum()), len(right)
    n_wrong = n - n_right
    balance = policy.balance and 0 < n_right < n

    def leaf(here: int, here_right: int) -> Leaf:
        # In whole numbers, so that a tie is one, and the base model keeps what is undecided.
        weights = (n_wrong, n_right) if balance else (1, 1)
        pro, contra = here_right * weights[0], (here - here_right) * weights[1]
        return Leaf(pro > contra, pro / (pro + contra), here, here_right)

    if n_right in (0, n):
        return leaf(n, n_right)

    import numpy as np
    from sklearn.tree import DecisionTreeClassifier

    learner = DecisionTreeClassifier(
        max_depth=policy.max_depth,
        min_samples_leaf=policy.min_samples_leaf,
        class_weight="balanced" if balance else None,
        random_state=0,
    )
    seen, labels = features.cpu().numpy(), right.cpu().numpy()
    found = learner.fit(seen, labels).tree_
    ends = learner.apply(seen)
    n_here = np.bincount(ends, minlength=found.node_count)
    n_here_right = np.bincount(ends[labels], minlength=found.node_count)

    def node(number: int) -> Node:
        below, above = int(found.children_left[number]), int(found.children_right[number])
        if below == above:  # both -1
            return leaf(int(n_here[number]), int(n_here_right[number]))
        name = policy.features[found.feature[number]]
        return Split(name, float(found.threshold[number]), node(below), node(above))

    return node(0)
