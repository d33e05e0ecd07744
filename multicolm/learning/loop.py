"""Trains a network on features: epochs of shuffled batches, early stopping, a state that is kept.

A training may be stopped at any moment and ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multicolm.errors import TrainingError
from multicolm.learning.networks import router_scores
from multicolm.learning.snapshots import Snapshots, load_optimizer, optimizer_tensors

__all__ = ["Fitted", "Problem", "Schedule", "Stage", "fit_network"]

Loss = Callable[[Float[Tensor, "batch models"], Int[Tensor, "batch"]], Float[Tensor, ""]]
"""The mean loss of some positions, from the network's scores and the positions' numbers."""


@dataclass(frozen=True)
class Stage:
    """Some epochs with one loss.

    Attributes:
        name: for messages.
        epochs: how many.
        loss: of a batch.
    """

    name: str
    epochs: int
    loss: Loss


@dataclass(frozen=True)
class Problem:
    """What a network is trained on.

    Attributes:
        features: raw ones.
        mean: of each feature.
        scale: of each feature.
        held_out: judges the network on texts that it does not learn from: the smaller the better;
            ``None`` if there are none.
    """

    features: Float[Tensor, "positions features"]
    mean: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]
    held_out: Callable[[nn.Module], float] | None

    def batch(self, which: Int[Tensor, "batch"]) -> Float[Tensor, "batch features"]:
        """Standardised features of some positions."""
        return (self.features[which].float().clamp_min(-1e4) - self.mean) / self.scale


@dataclass(frozen=True)
class Schedule:
    """How the loop goes.

    Attributes:
        lr: learning rate of AdamW.
        l2: its weight decay.
        batch_size: positions per step.
        patience: epochs of the last stage without a better held-out loss before it stops; 0 never
            stops.
        save_every: seconds between two states.
    """

    lr: float
    l2: float
    batch_size: int
    patience: int
    save_every: float


@dataclass
class Fitted:
    """What came of one seed.

    Attributes:
        seed: it began with.
        loss: on held-out texts, in nats; on the last epoch's batches if none are held out.
        epoch: of the last stage that it is of.
        tensors: of the network, for standardised features.
        history: per epoch its stage, mean loss and held-out loss.
    """

    seed: int
    loss: float = math.inf
    epoch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def fit_network(
    build: Callable[[torch.Generator], nn.Module],
    problem: Problem,
    stages: Sequence[Stage],
    schedule: Schedule,
    seeds: Sequence[int],
    snapshots: Snapshots,
    on_progress: Callable[[float, float, str], None],
) -> list[Fitted]:
    """Train one network per seed.

    A training that was stopped goes on behind its last state and ends with the same bytes.

    Args:
        build: makes a network from a seeded generator.
        problem: what it learns from.
        stages: one after the other; the last one's best epoch is kept.
        schedule: how.
        seeds: of weights and shuffling.
        snapshots: keeps the state.
        on_progress: told after each epoch.

    Raises:
        TrainingError: if the loss is no number, or grows without bound.
    """
    total = len(seeds) * sum(stage.epochs for stage in stages)
    loop = _Loop(build, problem, list(stages), schedule, snapshots)
    done: list[Fitted] = []
    state = snapshots.load()
    for number, seed in enumerate(seeds):
        loop.start(seed)
        if state is not None and number < state[1]["number"]:
            done.append(_stored(f"fitted.{number}.", state[0], state[1]["fitted"][number]))
            continue
        if state is not None and number == state[1]["number"]:
            loop.resume(*state)
        before = number * sum(stage.epochs for stage in stages)
        while loop.step(done, number):
            on_progress(before + loop.n_epochs, total, f"seed {seed}: {loop.stage.name}")
        done.append(loop.fitted)
        loop.save(done, number + 1)
        on_progress(before + total // len(seeds), total, f"seed {seed}: done")
    return done


class _Loop:
    """The epochs of one seed."""

    def __init__(
        self,
        build: Callable[[torch.Generator], nn.Module],
        problem: Problem,
        stages: list[Stage],
        schedule: Schedule,
        snapshots: Snapshots,
    ) -> None:
        self._build = build
        self._problem = problem
        self._stages = [stage for stage in stages if stage.epochs]
        self._schedule = schedule
        self._snapshots = snapshots
        self._saved_at = time.monotonic()

    def start(self, seed: int) -> None:
        """A fresh network."""
        self.fitted = Fitted(seed)
        self._network = self._build(torch.Generator().manual_seed(seed))
        self._optimizer = self._fresh_optimizer()
        self._at = (0, 0)  # stage and epoch to come
        self._first_loss = math.inf

    @property
    def stage(self) -> Stage:
        """The stage at work."""
        return self._stages[min(self._at[0], len(self._stages) - 1)]

    @property
    def n_epochs(self) -> int:
        """Epochs that are done."""
        number, epoch = self._at
        return sum(stage.epochs for stage in self._stages[:number]) + epoch

    def step(self, done: Sequence[Fitted], number: int) -> bool:
        """Train one epoch; false if there is none left."""
        if self._at[0] >= len(self._stages):
            return False
        at, epoch = self._at
        if math.isinf(self._first_loss):
            self._first_loss = self._untrained_loss(at)
        mean_loss = self._epoch(at, epoch)
        self._refuse_divergence(mean_loss, epoch)
        last = at == len(self._stages) - 1
        judged = None
        if last:
            judged = mean_loss
            if self._problem.held_out is not None:
                self._network.train(False)
                judged = self._problem.held_out(self._network)
            if judged < self.fitted.loss or not self.fitted.tensors:
                self.fitted.loss, self.fitted.epoch = judged, epoch + 1
                self.fitted.tensors = {
                    name: tensor.detach().clone()
                    for name, tensor in self._network.state_dict().items()
                }
        self.fitted.history.append(
            {"stage": self.stage.name, "loss": mean_loss, "held_out": judged if last else None}
        )
        self._advance(last)
        if time.monotonic() - self._saved_at >= self._schedule.save_every:
            self.save(done, number)
        return self._at[0] < len(self._stages)

    def _advance(self, last: bool) -> None:
        at, epoch = self._at
        patience = self._schedule.patience
        tired = last and patience and epoch + 1 - self.fitted.epoch >= patience
        if epoch + 1 < self._stages[at].epochs and not tired:
            self._at = (at, epoch + 1)
            return
        self._at = (at + 1, 0)
        # The stages have different losses; what AdamW knows of one misleads it in the next.
        self._optimizer = self._fresh_optimizer()
        self._first_loss = math.inf

    def _epoch(self, at: int, epoch: int) -> float:
        n = len(self._problem.features)
        mixed = (self.fitted.seed * 1_000_003 + at * 10_007 + epoch) & 0x7FFFFFFF
        order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
        self._network.train(True)
        total = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed)  # of dropout
            for which in torch.split(order, self._schedule.batch_size):
                scores = router_scores(self._network, self._problem.batch(which))
                loss = self._stages[at].loss(scores, which)
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                total += float(loss.detach()) * len(which)
        return total / n

    @torch.no_grad()
    def _untrained_loss(self, at: int) -> float:
        """What a stage begins with; a loss that is far above has diverged."""
        self._network.train(False)
        total = 0.0
        every = torch.arange(len(self._problem.features))
        for which in torch.split(every, self._schedule.batch_size):
            scores = router_scores(self._network, self._problem.batch(which))
            total += float(self._stages[at].loss(scores, which)) * len(which)
        return total / len(every)

    def _refuse_divergence(self, mean_loss: float, epoch: int) -> None:
        self._first_loss = min(self._first_loss, mean_loss)
        if not math.isfinite(mean_loss) or mean_loss > 10 * self._first_loss + 10:
            raise TrainingError(
                f"the loss is {mean_loss:.3g} in epoch {epoch + 1} of '{self.stage.name}' (it was "
                f"{self._first_loss:.3g}); training diverges: lower lr ({self._schedule.lr})."
            )

    def _fresh_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self._network.parameters(),
            lr=self._schedule.lr,
            betas=(0.9, 0.99),
            weight_decay=self._schedule.l2,
        )

    def save(self, done: Sequence[Fitted], number: int) -> None:
        """Keep the state, so that a stopped training goes on from here."""
        self._saved_at = time.monotonic()
        tensors = {f"network.{k}": v for k, v in self._network.state_dict().items()}
        tensors |= optimizer_tensors(self._optimizer)
        tensors |= {f"best.{k}": v for k, v in self.fitted.tensors.items()}
        for n, fitted in enumerate(done):
            tensors |= {f"fitted.{n}.{k}": v for k, v in fitted.tensors.items()}
        facts = {
            "number": number,
            "at": self._at,
            "first_loss": None if math.isinf(self._first_loss) else self._first_loss,
            "best": _facts(self.fitted),
            "fitted": [_facts(fitted) for fitted in done],
        }
        self._snapshots.save(tensors, facts)

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on behind a state of the same seed."""
        if facts["best"]["seed"] != self.fitted.seed:
            return  # The state was taken between two seeds.
        self._network.load_state_dict(_under("network.", tensors))
        load_optimizer(self._optimizer, tensors)
        self._at = (facts["at"][0], facts["at"][1])
        self._first_loss = math.inf if facts["first_loss"] is None else facts["first_loss"]
        self.fitted = _stored("best.", tensors, facts["best"])


def _facts(fitted: Fitted) -> dict[str, Any]:
    loss = None if math.isinf(fitted.loss) else fitted.loss
    return {"seed": fitted.seed, "loss": loss, "epoch": fitted.epoch, "history": fitted.history}


def _stored(prefix: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Fitted:
    loss = math.inf if facts["loss"] is None else facts["loss"]
    return Fitted(
        facts["seed"], loss, facts["epoch"], _under(prefix, tensors), list(facts["history"])
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
