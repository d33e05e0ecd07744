"""Learns who writes from a score table by marginal likelihood, and what every router shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Annotated, Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from multicolm.config.wording import Strict
from multicolm.errors import TrainingError
from multicolm.learning.decision import hand_over
from multicolm.learning.lbfgs import fit_linear
from multicolm.learning.loop import Schedule, fit_networks
from multicolm.learning.losses import (
    class_weights,
    cross_entropy,
    marginal_loss,
    usable,
    weak_labels,
)
from multicolm.learning.networks import NetworkKind, build, fold, from_tensors, router_scores
from multicolm.learning.positions import Parts, Positions, device_named, divide
from multicolm.learning.problem import (
    Features,
    Fitted,
    Losses,
    Problem,
    Stage,
    check_numbers,
    standardise,
)
from multicolm.learning.reliability import reliability
from multicolm.learning.training import Training
from multicolm.score_table import ScoreBlocks, ScoreTable

__all__ = [
    "NetworkSettings",
    "RouterSettings",
    "Shape",
    "balanced_weights",
    "fit_marginal",
    "fit_stages",
    "network_scores",
    "raw_scores",
    "usable_parts",
]

_FORMAT = 2
"""Of the states of unfinished trainings; those of another version are not taken up."""

_FEW = 100
"""Held-out tokens below which a part of them is off by 5 points and more, by chance alone."""

Seed: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
"""Of a random generator."""

Solver: TypeAlias = Literal["lbfgs", "adamw"]

_OF_ADAMW = ("lr", "batch_size", "seeds")
_OF_NETWORK = {
    "linear": ("width", "n_blocks", "dropout"),
    "mlp": ("n_blocks",),
    "residual": (),
}
"""Settings that do not apply."""


class NetworkSettings(Strict):
    """How any router is trained.

    Attributes:
        solver: ``lbfgs`` trains a ``linear`` network on the whole table at once, with a ridge
            penalty: nothing but the penalty has to be found, and it is what is used if no setting
            of ``adamw`` is given (``lr``, ``batch_size``, ``seeds``). ``adamw`` trains any network
            on shuffled batches; its rate rises over the first 100 steps, and falls when the
            held-out loss does not.
        width: of the inner layers of networks that have some.
        n_blocks: of a residual network.
        dropout: part of the inner activations that is dropped while training.
        epochs: passes over the table, at most; of ``lbfgs`` iterations for each penalty. Training
            stops by itself before, and the report says if it was cut off.
        lr: peak learning rate of AdamW; the best on held-out texts of three that suit the number
            of features if not given, trained side by side.
        batch_size: positions per step.
        l2: strength of the penalty on the weights for standardised features: l2 / 2 times their
            squared norm for ``lbfgs``, in nats; AdamW's weight decay for ``adamw``. The best on
            held-out texts if not given: for ``lbfgs`` 0.1 times features per position, or powers
            of ten of it and half steps that are better by more than a standard error; for
            ``adamw`` 0.01 or 1.
        held_out: part of the texts that nothing is learnt from, by which settings and the best
            epoch are chosen.
        patience: epochs without a better held-out loss before a penalty of ``lbfgs`` is finished,
            or the rate of ``adamw`` is lowered to 30 % (three times; the fourth time training
            stops). 0 never does.
        balance: how many times more a rare class may weigh than the most common one.
        seeds: one training each; the one with the best held-out loss is kept.
        device: to train on, such as ``cpu`` or ``cuda:1``; a CUDA device if there is one.
    """

    solver: Solver | None = None
    network: NetworkKind = "linear"
    width: int = Field(default=256, ge=1)
    n_blocks: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    epochs: int = Field(default=100, ge=1)
    lr: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=512, ge=1)
    l2: float | None = Field(default=None, ge=0)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=5, ge=0)
    balance: float = Field(default=8.0, ge=1)
    # Not strict, so that it may be a list, as YAML has no tuples; the seeds themselves are.
    seeds: tuple[Seed, ...] = Field(default=(0,), strict=False)
    device: str | None = None

    @field_validator("seeds")
    @classmethod
    def _one_at_least(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("must hold 1 or more, got 0.")
        return seeds

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> NetworkSettings:
        ignored = [name for name in _OF_NETWORK[self.network] if name in self.model_fields_set]
        if ignored:
            raise ValueError(
                f"a {self.network} network has no {' and no '.join(ignored)}; leave it out, or "
                "set network to residual or mlp."
            )
        if self.solver == "lbfgs":
            if self.network != "linear":
                raise ValueError(
                    f"solver lbfgs trains linear networks, and network is {self.network}; set "
                    "solver to adamw."
                )
            foreign = [name for name in _OF_ADAMW if name in self.model_fields_set]
            if foreign:
                raise ValueError(f"solver lbfgs has no {' and no '.join(foreign)}; use adamw.")
        return self

    @property
    def uses_lbfgs(self) -> bool:
        """Whether the network is trained on the whole table at once."""
        if self.solver is not None:
            return self.solver == "lbfgs"
        return self.network == "linear" and not self.model_fields_set & set(_OF_ADAMW)

    def schedule(self, n_features: int, searches: bool, save_every: float) -> Schedule:
        """Of AdamW.

        Args:
            n_features: of the network. A step changes a score by about the rate times the root of
                their number, so the rates to try go with it.
            searches: whether there are held-out texts to choose by.
            save_every: seconds between two states.
        """
        usual = (0.1 if self.network == "linear" else 0.03) / n_features**0.5
        rates = [usual / 3, usual, usual * 3] if searches else [usual]
        decays = [0.01, 1.0] if searches else [0.01]
        return Schedule(
            rates if self.lr is None else [self.lr],
            decays if self.l2 is None else [self.l2],
            self.batch_size,
            self.patience,
            save_every,
        )


class RouterSettings(NetworkSettings):
    """How a router is trained by marginal likelihood.

    Attributes:
        network: ``linear`` is the published head.
        weak_epochs: passes with weak labels before, which bring the head near a good optimum.
        cost_weight: nats that one unit of expected cost weighs against the likelihood. The base
            model is run anyway, so what counts is the cost of the assistant that is chosen. The
            policy's own ``cost_weight`` needs no training of its own.
    """

    weak_epochs: int = Field(default=5, ge=0)
    cost_weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _balance_needs_weak_labels(self) -> RouterSettings:
        if not self.weak_epochs and "balance" in self.model_fields_set:
            raise ValueError("balance is of the weak labels, and weak_epochs is 0; leave it out.")
        return self


Writers: TypeAlias = Callable[
    [Float[Tensor, "positions models"], Float[Tensor, "models"]],
    Float[Tensor, "positions models"],
]
"""From log pi in nats and the models' costs: the probability that each model writes."""


def _published(log_pi: Tensor, costs: Tensor) -> Tensor:
    """1 - pi_0 > 1/2, and the likeliest assistant."""
    score, assistant = hand_over(log_pi, costs)
    chosen = assistant * (score > 0.5)
    return nn.functional.one_hot(chosen, log_pi.shape[1]).to(log_pi)


def fit_marginal(
    table: ScoreBlocks,
    features: Features,
    training: Training,
    writers: Writers = _published,
    *,
    wanted: Callable[[ScoreTable], Tensor] = usable,
) -> dict[str, Tensor]:
    """Train a router by marginal likelihood, after some epochs of weak labels.

    Args:
        table: of frozen models, in memory or on disk.
        features: what the router sees of each position.
        training: options, see :class:`RouterSettings`; the report gets losses in nats per token.
        writers: how the policy decides, for the report.
        wanted: which positions count, besides being usable.

    Returns:
        Tensors of a network for raw features; see :mod:`multicolm.learning.networks`.

    Raises:
        TrainingError: if there is nothing to learn from, or the loss is no number.
    """
    settings = training.settings(RouterSettings)
    parts = usable_parts(table, settings, wanted)
    device = parts.learnt.device
    weights = balanced_weights(parts.learnt, weak_labels, settings.balance)
    known_costs = table.costs or (1.0,) * len(table.models)
    costs = torch.tensor([0.0, *known_costs[1:]], device=device)

    def weak(scores: Tensor, part: ScoreTable) -> Tensor:
        return cross_entropy(scores, weak_labels(part), weights)

    def marginal(scores: Tensor, part: ScoreTable) -> Tensor:
        loss = marginal_loss(scores, part.writer_logprobs, part.known)
        if settings.cost_weight:
            loss = loss + settings.cost_weight * (scores.softmax(-1) @ costs)
        return loss

    stages = [
        Stage("weak labels", settings.weak_epochs, weak),
        Stage("marginal likelihood", settings.epochs, marginal),
    ]
    shape = Shape(settings.network, len(table.models) - 1)
    tensors = fit_stages(parts, features, shape, settings, stages, marginal, training)
    part = parts.measured.scores_only()
    scores = network_scores(tensors, parts.measured, features)
    writing = writers(scores.log_softmax(-1), torch.tensor(known_costs))
    training.report |= _likelihoods(part, scores) | _tokens(part, writing)
    training.report |= calibration(part, scores)
    return tensors


def calibration(part: ScoreTable, scores: Float[Tensor, "positions models"]) -> dict[str, Any]:
    """How far the probability of handing over is from how often an assistant was the one right.

    Measured where that can be told: where the base model is right and no assistant is, or an
    assistant is and the base model is not. There 1 - pi_0 is compared with whether it was an
    assistant. (Against the posterior of who wrote, which contains pi, any router that is sure of
    itself would be without error.)

    Args:
        part: of the score table.
        scores: of the router.

    Returns:
        See :func:`multicolm.learning.reliability.reliability`; and ``calibration_positions``, at
        how many positions it could be told.
    """
    base, assistant = part.right[:, 0], part.right[:, 1:].any(-1)
    told = base != assistant
    known = scores.masked_fill(~part.known, float("-inf"))
    handed = 1 - known.softmax(-1)[:, 0]
    found = reliability(handed[told], assistant[told].float())
    return {**found, "calibration_positions": int(told.sum())}


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
    parts: Parts,
    features: Features,
    shape: Shape,
    settings: NetworkSettings,
    stages: Sequence[Stage],
    judge: Losses,
    training: Training,
) -> dict[str, Tensor]:
    """Train a network with some stages, and keep the best settings, epoch and seed.

    Args:
        parts: positions to learn from, and held-out ones; see :func:`usable_parts`.
        features: what the network sees of each position.
        shape: of the network.
        settings: how.
        stages: of the training.
        judge: the losses that settings and epochs are ranked by.
        training: takes progress, state and report.

    Returns:
        Tensors of a network for raw features.

    Raises:
        TrainingError: if a feature or the loss is no number.
    """
    centre, scale = standardise(parts.learnt, features)
    check_numbers(parts.judged, features)
    n_features = len(centre)

    def make(generator: torch.Generator) -> nn.Sequential:
        return build(
            shape.kind,
            n_features,
            shape.n_outputs,
            width=settings.width,
            n_blocks=settings.n_blocks,
            dropout=settings.dropout,
            generator=generator,
        )

    problem = Problem(parts, features, centre, scale, judge)
    table = parts.learnt.source
    facts = (_FORMAT, table.digest, table.models, table.identities, len(parts.learnt), n_features)
    snapshots = training.snapshots(*facts, shape, settings)
    searches = len(parts.judged) > 0
    if settings.uses_lbfgs:
        network = make(torch.Generator().manual_seed(0))
        fitted = [
            fit_linear(
                network,
                problem,
                stages,
                settings.l2,
                settings.patience,
                training.save_every,
                snapshots,
                training.on_progress,
            )
        ]
    else:
        schedule = settings.schedule(n_features, searches, training.save_every)
        fitted = fit_networks(
            make, problem, stages, schedule, settings.seeds, snapshots, training.on_progress
        )
    best = min(fitted, key=lambda one: one.loss)
    training.report |= _report(fitted, best, parts, settings)
    network = make(torch.Generator())
    network.load_state_dict(best.tensors)
    return fold(network, centre.cpu(), scale.cpu())


def usable_parts(
    table: ScoreBlocks,
    settings: NetworkSettings,
    wanted: Callable[[ScoreTable], Tensor] = usable,
    nothing: str = (
        "at no position is the token known to the base model and to an assistant, and possible for "
        "one of them."
    ),
) -> Parts:
    """Positions to learn from and held-out ones, without those that cannot teach anything.

    Args:
        table: in memory or on disk.
        settings: how many texts are held out, and on which device the rest is.
        wanted: which positions count, besides being usable.
        nothing: what is to be said if there are none.

    Raises:
        TrainingError: if none is left.
    """
    if len(table.models) < 2:
        raise TrainingError("this score table has one model, so there is no choice to learn.")
    device = device_named(settings.device)
    parts = divide(table, lambda part: wanted(part) & usable(part), settings.held_out, device)
    if not len(parts.learnt):
        raise TrainingError(f"there is nothing to learn from: {nothing}")
    return parts


def balanced_weights(
    positions: Positions, labels: Callable[[ScoreTable], Tensor], cap: float
) -> Float[Tensor, "classes"]:
    """:func:`multicolm.learning.losses.class_weights` whose mean over the positions is 1."""
    counts = torch.zeros(1)
    for part in positions.in_order(features=False):
        counts = counts.to(positions.device) + labels(part).sum(0)
    weights = class_weights(counts, cap)
    return weights * counts.sum() / (counts * weights).sum().clamp_min(1e-9)


def raw_scores(
    tensors: Mapping[str, Tensor], features: Float[Tensor, "positions features"]
) -> Float[Tensor, "positions models"]:
    """Scores of a folded network for raw features."""
    with torch.no_grad():
        return router_scores(from_tensors(tensors), features.float().clamp_min(-1e4))


def network_scores(
    tensors: Mapping[str, Tensor], positions: Positions, features: Features
) -> Float[Tensor, "positions models"]:
    """Scores of a folded network at all of some positions, on the CPU."""
    network = from_tensors(tensors).to(positions.device)
    with torch.no_grad():
        return torch.cat(
            [
                router_scores(network, features(part).float().clamp_min(-1e4)).cpu()
                for part in positions.in_order()
            ]
        )


def _report(
    fitted: Sequence[Fitted], best: Fitted, parts: Parts, settings: NetworkSettings
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "positions": len(parts.learnt),
        "held_out_positions": len(parts.judged),
        "solver": "lbfgs" if settings.uses_lbfgs else "adamw",
        **best.settings,
        "epochs": best.epoch,
        "stopped": best.stopped,
        "loss_nats": best.loss,
        "history": best.history,
        "search": best.search,
    }
    notes = []
    if best.epoch == settings.epochs:
        notes.append(
            f"Training was cut off after {settings.epochs} epochs, while it still improved: raise "
            "the option epochs."
        )
    if 0 < len(parts.judged) < _FEW:
        notes.append(
            f"{len(parts.judged)} held-out tokens: figures of so few say little; score more texts."
        )
    if not len(parts.judged):
        notes.append(
            "No text is held out: the figures are of the tokens that were learnt from, and say "
            "nothing about others."
        )
    if notes:
        report["note"] = " ".join(notes)
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
    after = marginal_loss(scores, part.writer_logprobs, known).mean()
    before = marginal_loss(torch.zeros_like(scores), part.writer_logprobs, known).mean()
    everywhere = known.all(-1)
    alone = -part.writer_logprobs[everywhere].mean(0)
    return {
        "nll_nats": float(after),
        "nll_nats_uniform": float(before),
        "nll_nats_alone": dict(zip(part.models, alone.tolist(), strict=True)),
    }


def _tokens(part: ScoreTable, writing: Float[Tensor, "positions models"]) -> dict[str, Any]:
    """How often the chosen writer is right.

    Args:
        part: of the score table.
        writing: the probability that each model writes.
    """
    right = part.right.float()
    return {
        "right_tokens": float((writing * right).sum(-1).mean()),
        "right_tokens_base": float(right[:, 0].mean()),
        "right_tokens_oracle": float(right.amax(-1).mean()),
        "share": dict(zip(part.models, writing.mean(0).tolist(), strict=True)),
    }
