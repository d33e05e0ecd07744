"""CoSD's decision tree as a policy, learned from three examples on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.config.wording import Strict
from multicolm.errors import CapabilityError, TrainingError
from multicolm.policy.base import (
    ModelFacts,
    Needs,
    Schedule,
    SelectPolicy,
    When,
    register_policy,
)
from multicolm.policy.learned import COST_WEIGHTS, check_made_for, untrained
from multicolm.policy.threshold import best_assistant
from multicolm.policy.tree import MAX_DEPTH, Feature, Tree
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, View, Views

if TYPE_CHECKING:
    from multicolm.learning.training import Training
    from multicolm.score_table import ScoreTable

__all__ = ["CosdTreePolicy"]

Asked = Feature | Literal["assistant"]
"""What :meth:`CosdTreePolicy.fit` may ask about: a number, or who the assistant is."""


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
    tree says ``replace``. With q the leaf's probability that the assistant is right, the candidate
    with the greatest ``log(q / (1 - q)) - cost_weight * cost`` writes, of equal ones the surest;
    without one, the base model. An assistant is run only where the base model's own numbers leave
    it a way to ``replace``, which changes nothing but the cost.

    Attributes:
        tree: what was learned; nothing yet if not given.
        features: what :meth:`fit` may ask about; ``assistant`` is who it is. A tree that is there
            asks what it asks.
        max_depth: the most questions on the way to a leaf.
        min_samples_leaf: positions that have to come to a leaf, so that it is no chance.
        balance: whether questions are chosen as if the positions where the assistant is right were
            as many as those where the base model is. What a leaf says goes by the positions as they
            are, either way.
        cost_weight: nats per unit of an assistant's cost (:attr:`multicolm.Views.costs`). Above 0
            only those leaves replace whose log-odds are ``cost_weight * cost`` or more.
        made_for: the models it was trained with, by name, and what they are; the base model first.

    Source:
        arXiv 2502.08020 (ICML 2025), section 3, tree-based verification: two features, learned
        from three samples. Depth, leaf size, class weights, costs and more than one assistant are
        ours.
    """

    tree: Tree | None = None
    features: tuple[Asked, ...] = Field(
        default=("p_draft", "p_assistant", "assistant"), min_length=1
    )
    max_depth: int = Field(default=3, ge=1, le=MAX_DEPTH)
    min_samples_leaf: int = Field(default=5, ge=1)
    balance: bool = True
    cost_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    made_for: dict[str, str] | None = None

    assistants: ClassVar[When] = "deferred"
    schedule: ClassVar[Schedule] = "block"
    tunable: ClassVar[Mapping[str, Sequence[float]]] = {"cost_weight": COST_WEIGHTS}

    @property
    def _learned(self) -> Tree:
        if self.tree is None:
            raise untrained(self.name)
        return self.tree

    def _assistants(self, models: ModelNames) -> tuple[str, ...]:
        """The assistants' names as the tree knows them; an ensemble may call them otherwise."""
        names = tuple(models if self.made_for is None else self.made_for)[1:]
        for name in {name for group in self._learned.groups for name in group} - set(names):
            raise CapabilityError(
                f"the tree of this '{self.name}' policy asks for assistant '{name}', and the "
                f"assistants are {', '.join(names) or 'none'}; correct the tree, or train another."
            )
        return names

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model, and the assistants that some leaf lets replace it.

        All of them if the tree asks how many agree.

        Raises:
            ArtefactError: if the tree's file is missing or damaged.
            CapabilityError: if nothing was learned yet, or the tree names other assistants.
        """
        tree, names = self._learned, self._assistants(models)
        everyone = "agreement" in tree.used
        used = {k for k, name in enumerate(names, 1) if everyone or tree.can_replace(name)}
        return frozenset({0, *used} & set(range(len(models))))

    def needs(self, models: ModelNames) -> Needs:
        """What the tree asks about, and the most likely token of those in use.

        Raises:
            MulticolmError: see :meth:`uses`.
        """
        used = self._learned.used
        base, others = (
            frozenset[Signal]({"top1"}).union(
                number.signal for name in used if (number := _number_of(name, role))
            )
            for role in ("draft", "assistant")
        )
        return Needs({0: base}, dict.fromkeys(sorted(self.uses(models) - {0}), others))

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
        return self.models_at(views).any(-1)

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """Which assistants could replace it; all where one could, if the tree asks who agrees."""
        import torch

        tree, names = self._learned, self._assistants(views.models)
        known: dict[str, Tensor] = {
            name: number.of_view(views.base)
            for name in tree.used
            if (number := _number_of(name, "draft"))
        }
        if "position" in tree.used:
            known["position"] = views.place.float()
        device, prices = views.base.top1_ids.device, self._prices(views).tolist()
        shape = views.n_positions, len(views.models)
        reached = torch.zeros(shape, dtype=torch.bool, device=device)
        # Assistants that the tree does not distinguish, and that cost the same, are one question.
        found: dict[object, Tensor] = {}
        for k in sorted(self.uses(views.models) - {0}):
            name = names[k - 1]
            alike = tuple(name in group for group in tree.groups), prices[k]
            if alike not in found:
                found[alike] = tree.may_replace(
                    known, views.n_positions, device, assistant=name, least=prices[k]
                )
            reached[:, k] = found[alike]
        if "agreement" in tree.used:
            reached[:, 1:] = reached.any(-1, keepdim=True)
        return reached

    def _prices(self, views: Views) -> Float[Tensor, "models"]:
        """What the log-odds for each model have to come to, in nats; no matter without costs."""
        prices = views.costs * self.cost_weight
        return prices if self.cost_weight else prices.fill_(float("-inf"))

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The candidate with the most probable leaf, its cost taken off; else the base model."""
        import torch

        if not views.assistants:
            return torch.zeros(views.n_positions, dtype=torch.long)
        decided = self._learned.decide(self._seen(views))
        ids = views.stack(lambda view: view.top1_ids)
        prices = self._prices(views)[views.assistants, None]
        candidate = decided.replace & (ids[1:] != ids[0]) & (decided.log_odds >= prices)
        value = decided.log_odds - prices if self.cost_weight else decided.log_odds
        value = value.masked_fill(~candidate, float("-inf"))
        first = candidate & (value == value.max(0).values)
        sureness = torch.stack([views[k].top1_logprobs for k in views.assistants])
        best = best_assistant(views, sureness.masked_fill(~first, float("-inf")))
        return best.masked_fill(~candidate.any(0), 0)

    def _seen(self, views: Views) -> Float[Tensor, "assistants positions columns"]:
        """What the tree asks about, of every assistant."""
        import torch

        tree, names = self._learned, self._assistants(views.models)
        device = views.base.top1_ids.device
        seen = []
        for k in views.assistants:
            columns = [_from_views(name, views, k) for name in tree.used]
            columns += [
                torch.full((views.n_positions,), float(names[k - 1] not in group), device=device)
                for group in tree.groups
            ]
            empty = torch.zeros(views.n_positions, 0, device=device)
            seen.append(torch.stack(columns, -1) if columns else empty)
        return torch.stack(seen)

    def fit(self, table: ScoreTable, training: Training | None = None) -> CosdTreePolicy:
        """The same policy with a tree that was learned from a score table.

        It learns from each position and assistant whose most likely token differs from the base
        model's, where one of the two is right: whether it is the assistant. One tree is learned
        for all assistants, which may ask who it is. If it is always the same one that is right, or
        no question separates them, the tree is a single leaf.

        Args:
            table: of the ensemble's models.
            training: takes no options; what was measured, on the same positions, goes into its
                report.

        Raises:
            ConfigError: if the training has options.
            TrainingError: if there is no such position.
        """
        from multicolm.policy.tree_learning import examples, learn_tree, tree_report

        if training is not None:
            training.settings(Strict)
        numbers = tuple(name for name in self.features if name != "assistant")
        learnt_from = examples(table, numbers, partial(_from_table, table=table))
        if not len(learnt_from):
            raise TrainingError(
                f"policy '{self.name}' finds nothing to learn from: at no position of this score "
                f"table do base model '{table.models[0]}' and an assistant have different first "
                "choices, one of them right; score texts that one of them gets right."
            )
        tree = learn_tree(
            learnt_from,
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            balance=self.balance,
            ask_who="assistant" in self.features,
        )
        if training is not None:
            training.report |= tree_report(tree, learnt_from)
        made_for = dict(zip(table.models, table.identities or [""] * table.n_models, strict=True))
        return replace(self, tree=tree, made_for=made_for)


def _from_views(feature: Feature, views: Views, k: int) -> Float[Tensor, "positions"]:
    if feature == "position":
        return views.place.float()
    if feature == "agreement":
        return _agreement(views.stack(lambda view: view.top1_ids), k)
    if number := _number_of(feature, "draft"):
        return number.of_view(views.base)
    name = feature.partition("_")[0]
    return _NUMBERS[name].of_view(views[k])


def _from_table(feature: Feature, k: int, *, table: ScoreTable) -> Float[Tensor, "positions"]:
    if feature == "position":
        return table.place.float()
    if feature == "agreement":
        return _agreement(table.top1_ids.T, k)
    if number := _number_of(feature, "draft"):
        return number.of_table(table)[:, 0]
    name = feature.partition("_")[0]
    return _NUMBERS[name].of_table(table)[:, k]
