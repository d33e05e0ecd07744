"""Learns who writes from a score table: the marginal likelihood, and plain classification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Annotated, Any, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from multicolm.config.wording import Strict
from multicolm.errors import TrainingError
from multicolm.learning.loop import Fitted, Problem, Schedule, Stage, fit_network
from multicolm.learning.losses import (
    class_weights,
    marginal_loss,
    responsibilities,
    usable,
    weak_labels,
)
from multicolm.learning.networks import (
    NetworkKind,
    build,
    fold,
    from_tensors,
    router_scores,
    standardisation,
)
from multicolm.learning.reliability import reliability
from multicolm.learning.training import Training
from multicolm.score_table import ScoreTable

__all__ = [
    "NetworkSettings",
    "RouterSettings",
    "Shape",
    "cross_entropy",
    "fit_marginal",
    "fit_stages",
    "raw_scores",
    "usable_parts",
]

_JUDGED_AT_ONCE = 65536  # positions

Seed: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
"""Of a random generator."""


class NetworkSettings(Strict):
    """How any router is trained.

    Attributes:
        width: of the inner layers of networks that have some.
        n_blocks: of a residual network.
        dropout: part of the inner activations that is dropped while training.
        epochs: passes over the table, at most.
        lr: learning rate of AdamW.
        batch_size: positions per step.
        l2: weight decay.
        held_out: part of the texts that is kept for early stopping.
        patience: epochs without a better held-out loss before training stops; 0 never stops.
        balance: how many times more a rare class may weigh than the most common one.
        seeds: one training each; the one with the best held-out loss is kept.
    """

    width: int = Field(default=256, ge=1)
    n_blocks: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    epochs: int = Field(default=40, ge=1)
    lr: float = Field(default=1e-2, gt=0)
    batch_size: int = Field(default=512, ge=1)
    l2: float = Field(default=0.0, ge=0)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=10, ge=0)
    balance: float = Field(default=8.0, ge=1)
    # Not strict, so that it may be a list, as YAML has no tuples; the seeds themselves are.
    seeds: tuple[Seed, ...] = Field(default=(0,), strict=False)

    @field_validator("seeds")
    @classmethod
    def _one_at_least(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("must hold 1 or more, got 0.")
        return seeds


class RouterSettings(NetworkSettings):
    """How a router is trained by marginal likelihood.

    Attributes:
        network: ``linear`` is the published head.
        weak_epochs: passes with weak labels before, which bring the head near a good optimum.
        cost_weight: nats that one unit of expected cost weighs against the likelihood. The base
            model is run anyway, so what counts is the cost of the assistant that is chosen.
    """

    network: NetworkKind = "linear"
    weak_epochs: int = Field(default=5, ge=0)
    cost_weight: float = Field(default=0.0, ge=0)


def fit_marginal(
    table: ScoreTable, features: Callable[[ScoreTable], Tensor], training: Training
) -> dict[str, Tensor]:
    """Train a router by marginal likelihood, after some epochs of weak labels.

    Args:
        table: of frozen models.
        features: what the router sees of each position.
        training: options, see :class:`RouterSettings`; the report gets losses in nats per token.

    Returns:
        Tensors of a network for raw features; see :mod:`multicolm.learning.networks`.

    Raises:
        TrainingError: if there is nothing to learn from, or the loss is no number.
    """
    settings = training.settings(RouterSettings)
    learnt, judged = usable_parts(table, settings)
    labels = weak_labels(learnt)
    weights = class_weights(labels, settings.balance)
    costs = torch.tensor([0.0, *(table.costs or [1.0] * table.n_models)[1:]])

    def weak(scores: Tensor, which: Tensor) -> Tensor:
        return cross_entropy(scores, labels[which], weights)

    def marginal(scores: Tensor, which: Tensor) -> Tensor:
        loss = marginal_loss(scores, learnt.gold_logprobs[which], learnt.known[which]).mean()
        if settings.cost_weight:
            loss = loss + settings.cost_weight * (scores.softmax(-1) @ costs).mean()
        return loss

    def judge(scores: Tensor, part: ScoreTable) -> Tensor:
        loss = marginal_loss(scores, part.gold_logprobs, part.known)
        if settings.cost_weight:
            loss = loss + settings.cost_weight * (scores.softmax(-1) @ costs)
        return loss

    stages = [
        Stage("weak labels", settings.weak_epochs, weak),
        Stage("marginal likelihood", settings.epochs, marginal),
    ]
    shape = Shape(settings.network, learnt.n_models - 1)
    tensors = fit_stages(learnt, judged, features, shape, settings, stages, judge, training)
    part = judged if len(judged) else learnt
    scores = raw_scores(tensors, features(part))
    training.report |= _likelihoods(part, scores) | _tokens(part, scores.argmax(-1))
    # Of handing over, against the posterior once the token is known.
    known = scores.masked_fill(~part.known, float("-inf"))
    found = responsibilities(scores, part.gold_logprobs, part.known)
    training.report |= reliability(1 - known.softmax(-1)[:, 0], 1 - found[:, 0])
    return tensors


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a network.

    Attributes:
        kind: of network.
        n_outputs: one per assistant, or one for all of them.
    """

    kind: NetworkKind
    n_outputs: int


def fit_stages(
    learnt: ScoreTable,
    judged: ScoreTable,
    features: Callable[[ScoreTable], Tensor],
    shape: Shape,
    settings: NetworkSettings,
    stages: Sequence[Stage],
    judge: Callable[[Tensor, ScoreTable], Tensor],
    training: Training,
) -> dict[str, Tensor]:
    """Train a network with some stages, once per seed, and keep the best.

    Args:
        learnt: positions to learn from.
        judged: positions of held-out texts; may be none.
        features: what the network sees of each position.
        shape: of the network.
        settings: how.
        stages: of the training, over the positions of ``learnt``.
        judge: the loss of each position of a part, from the network's scores.
        training: takes progress, state and report.

    Returns:
        Tensors of a network for raw features.

    Raises:
        TrainingError: if a feature or the loss is no number.
    """
    raw = features(learnt)
    _refuse_no_numbers(raw)
    centre, scale = standardisation(raw.float().clamp_min(-1e4))

    def make(generator: torch.Generator) -> nn.Sequential:
        return build(
            shape.kind,
            raw.shape[1],
            shape.n_outputs,
            width=settings.width,
            n_blocks=settings.n_blocks,
            dropout=settings.dropout,
            generator=generator,
        )

    held_out: Callable[[nn.Module], float] | None = None
    if len(judged):
        beheld = features(judged)
        _refuse_no_numbers(beheld)

        def held_out(network: nn.Module) -> float:
            return float(judge(_scores(network, beheld, centre, scale), judged).mean())

    schedule = Schedule(
        settings.lr, settings.l2, settings.batch_size, settings.patience, training.save_every
    )
    facts = (learnt.digest, learnt.models, learnt.identities, len(learnt), raw.shape, shape)
    fitted = fit_network(
        make,
        Problem(raw, centre, scale, held_out),
        stages,
        schedule,
        settings.seeds,
        training.snapshots(*facts, settings),
        training.on_progress,
    )
    best = min(fitted, key=lambda one: one.loss)
    training.report |= _report(fitted, best, learnt, judged)
    network = make(torch.Generator())
    network.load_state_dict(best.tensors)
    return fold(network, centre, scale)


def _refuse_no_numbers(features: Float[Tensor, "positions features"]) -> None:
    """Refuse what would only make every weight NaN; -inf is a token that cannot come."""
    wrong = (features.isnan() | features.isposinf()).any(-1)
    if bool(wrong.any()):
        raise TrainingError(
            f"the features of the base model are NaN or infinite at {int(wrong.sum())} of "
            f"{len(features)} positions; score the corpus with another `dtype`."
        )


def usable_parts(table: ScoreTable, settings: NetworkSettings) -> tuple[ScoreTable, ScoreTable]:
    """Positions to learn from and held-out ones, without those that cannot teach anything.

    Raises:
        TrainingError: if none is left.
    """
    if table.n_models < 2:
        raise TrainingError("this score table has one model, so there is no choice to learn.")
    rows = table.rows(usable(table))
    if not len(rows):
        raise TrainingError(
            "there is nothing to learn from: at no position is the token known to the base model "
            "and to an assistant, and possible for one of them."
        )
    return rows.split(settings.held_out, seed=0)


def cross_entropy(
    scores: Float[Tensor, "positions models"],
    labels: Float[Tensor, "positions models"],
    weights: Float[Tensor, "models"],
) -> Float[Tensor, ""]:
    """Weighted mean cross-entropy against soft labels, in nats."""
    weighted = labels * weights
    return -(weighted * scores.log_softmax(-1)).sum() / weighted.sum().clamp_min(1e-9)


def raw_scores(
    tensors: Mapping[str, Tensor], features: Float[Tensor, "positions features"]
) -> Float[Tensor, "positions models"]:
    """Scores of a folded network for raw features."""
    width = features.shape[1]
    return _scores(from_tensors(tensors), features, torch.zeros(width), torch.ones(width))


@torch.no_grad()
def _scores(network: nn.Module, features: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    parts = torch.split(features, _JUDGED_AT_ONCE)
    network.train(False)
    return torch.cat(
        [router_scores(network, (p.float().clamp_min(-1e4) - centre) / scale) for p in parts]
    )


def _report(
    fitted: Sequence[Fitted], best: Fitted, learnt: ScoreTable, judged: ScoreTable
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "positions": len(learnt),
        "held_out_positions": len(judged),
        "epochs": best.epoch,
        "loss_nats": best.loss,
        "history": best.history,
    }
    if len(fitted) > 1:
        losses = [one.loss for one in fitted]
        report |= {
            "seed": best.seed,
            "loss_nats_by_seed": {str(one.seed): one.loss for one in fitted},
            "loss_nats_mean": mean(losses),
            "loss_nats_sd": pstdev(losses),
        }
    return report


def _likelihoods(part: ScoreTable, scores: Tensor) -> dict[str, Any]:
    """Negative log-likelihoods in nats per token, before and after."""
    known = part.known
    after = marginal_loss(scores, part.gold_logprobs, known).mean()
    before = marginal_loss(torch.zeros_like(scores), part.gold_logprobs, known).mean()
    everywhere = known.all(-1)
    alone = -part.gold_logprobs[everywhere].mean(0)
    return {
        "nll_nats": float(after),
        "nll_nats_uniform": float(before),
        "nll_nats_alone": dict(zip(part.models, alone.tolist(), strict=True)),
    }


def _tokens(part: ScoreTable, writers: Tensor) -> dict[str, Any]:
    """How often the chosen writer's first choice is the token that stands there."""
    correct = part.correct.float()
    chosen = correct.gather(1, writers[:, None])[:, 0]
    return {
        "right_tokens": float(chosen.mean()),
        "right_tokens_base": float(correct[:, 0].mean()),
        "right_tokens_oracle": float(correct.max(-1).values.mean()),
        "share": {name: float((writers == k).float().mean()) for k, name in enumerate(part.models)},
    }
