"""Trains networks by AdamW: shuffled batches, a rate that warms up and decays, early stopping.

Several candidates (learning rates and weight decays) are trained side by side on the same batches
and ranked by their loss on held-out texts; the worse half is dropped after 1, 2, 4 ... epochs. A
training may be stopped at any moment and ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from multicolm.errors import TrainingError
from multicolm.learning.networks import router_scores
from multicolm.learning.problem import Fitted, Problem, Stage
from multicolm.learning.snapshots import Snapshots, load_optimizer, optimizer_tensors

__all__ = ["Schedule", "fit_networks"]

_N_DECAYS = 3
"""How often a rate is lowered before its candidate is finished."""

_DECAY = 0.3
"""By how much: after 3 times it is 2.7 % of what it was."""

_WARM_UP = 100
"""Steps in which the rate rises in a line; those of one epoch if there are fewer."""

_PART_FOR_STATES = 0.05
"""Of the time: the state of a large network takes long to write."""


@dataclass(frozen=True)
class Schedule:
    """How the loop goes.

    Attributes:
        rates: peak learning rates to try.
        decays: weight decays to try, each with each rate.
        batch_size: positions per step.
        patience: epochs of the last stage without a better held-out loss before the rate is
            lowered and training goes on from the best epoch; the fourth time it stops. 0 never
            lowers it and never stops.
        save_every: seconds between two states, at least; 0 keeps every state.
    """

    rates: Sequence[float]
    decays: Sequence[float]
    batch_size: int
    patience: int
    save_every: float


def fit_networks(
    build: Callable[[torch.Generator], nn.Module],
    problem: Problem,
    stages: Sequence[Stage],
    schedule: Schedule,
    seeds: Sequence[int],
    snapshots: Snapshots,
    on_progress: Callable[[float, float, str], None],
) -> list[Fitted]:
    """Train one network per seed, the best of the candidates.

    A stopped training resumes from its last state and ends with the same bytes.

    Args:
        build: makes a network from a seeded generator.
        problem: what it learns from.
        stages: one after the other; the last one's best epoch is kept.
        schedule: how.
        seeds: of weights and shuffling.
        snapshots: keeps the state.
        on_progress: called after each epoch.

    Raises:
        TrainingError: if the loss of every candidate is no number, or grows without bound.
    """
    total = len(seeds) * sum(stage.epochs for stage in stages)
    loop = _Loop(build, problem, list(stages), schedule, snapshots)
    done: list[Fitted] = []
    state = snapshots.load()
    for number, seed in enumerate(seeds):
        if state is not None and number < state[1]["number"]:
            done.append(Fitted.restored(f"fitted.{number}.", state[0], state[1]["fitted"][number]))
            continue
        loop.start(seed, done, number)
        if state is not None and number == state[1]["number"] and state[1]["at"] is not None:
            loop.resume(*state)
        before = number * sum(stage.epochs for stage in stages)
        while loop.step():
            on_progress(before + loop.n_epochs, total, f"seed {seed}: {loop.stage.name}")
        done.append(loop.best)
        loop.save(done, number + 1, between_seeds=True)
        on_progress(before + total // len(seeds), total, f"seed {seed}: done")
    return done


@dataclass
class _Candidate:
    """A network in training.

    Attributes:
        network: with its present weights.
        optimizer: of them.
        rate: peak learning rate.
        fitted: the best epoch so far.
        factor: by which the rate has been lowered.
        waited: epochs without a better held-out loss since the last one, or since it was lowered.
        steps: of this stage.
        first_loss: of the stage's first batch, untrained, or of a better epoch since; a loss that
            is far above has diverged.
        epoch_loss: sum over this epoch's positions so far, in nats.
        alive: whether it is still trained.
    """

    network: nn.Module
    optimizer: optim.AdamW
    rate: float
    fitted: Fitted
    factor: float = 1.0
    waited: int = 0
    steps: int = 0
    first_loss: float | None = None
    epoch_loss: float = 0.0
    alive: bool = True

    _KEPT = ("factor", "waited", "steps", "first_loss", "epoch_loss", "alive")

    def facts(self) -> dict[str, Any]:
        """What is no tensor, for a state."""
        return {name: getattr(self, name) for name in self._KEPT}

    def keep(self, loss: float, epoch: int) -> None:
        """Note the present weights as the best ones."""
        self.fitted.loss, self.fitted.epoch, self.waited = loss, epoch, 0
        self.fitted.tensors = _copied(self.network)


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
        self._saved_at, self._save_took = time.monotonic(), 0.0

    def start(self, seed: int, done: Sequence[Fitted], number: int) -> None:
        """Fresh candidates."""
        self._seed, self._done, self._number = seed, done, number
        self._at = (0, 0, 0)  # stage, epoch, and shuffle of the epoch that come next
        self._candidates = [
            self._candidate(rate, decay)
            for rate in self._schedule.rates
            for decay in self._schedule.decays
        ]

    def _candidate(self, rate: float, decay: float) -> _Candidate:
        network = self._build(torch.Generator().manual_seed(self._seed))
        network = network.to(self._problem.device)
        optimizer = optim.AdamW(
            network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=decay
        )
        settings = {"lr": rate, "l2": decay}
        return _Candidate(network, optimizer, rate, Fitted(self._seed, settings))

    @property
    def _alive(self) -> list[_Candidate]:
        return [candidate for candidate in self._candidates if candidate.alive]

    @property
    def best(self) -> Fitted:
        """The candidate with the least loss, and what became of the others."""
        best = min((c.fitted for c in self._candidates), key=lambda fitted: fitted.loss)
        best.search = [c.fitted.summary for c in self._candidates]
        return best

    @property
    def stage(self) -> Stage:
        """The stage at work."""
        return self._stages[min(self._at[0], len(self._stages) - 1)]

    @property
    def n_epochs(self) -> int:
        """Epochs that are done."""
        number, epoch, _ = self._at
        return sum(stage.epochs for stage in self._stages[:number]) + epoch

    def step(self) -> bool:
        """Train one epoch; false if there is none left."""
        if self._at[0] >= len(self._stages):
            return False
        at, epoch, first = self._at
        for candidate in self._alive if first == 0 else ():
            candidate.epoch_loss = 0.0
        seed = (self._seed * 1_000_003 + at * 10_007 + epoch) & 0x7FFFFFFF
        for number, (table, order) in enumerate(
            self._problem.parts.learnt.shuffled(seed, first), first
        ):
            self._train_on(table, order, seed + number)
            self._at = (at, epoch, number + 1)
            self._save_now_and_then()
        self._end_epoch(at, epoch)
        self._save_now_and_then()
        return self._at[0] < len(self._stages)

    def _train_on(self, table: Any, order: Tensor, seed: int) -> None:
        """The steps of some blocks; batches of about equal size, none of them tiny."""
        n_batches = -(-len(order) // self._schedule.batch_size)
        n_warm = min(_WARM_UP, -(-len(self._problem.parts.learnt) // self._schedule.batch_size))
        devices = [self._problem.device] if self._problem.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for number, which in enumerate(torch.tensor_split(order, n_batches)):
                batch = table.rows(which)
                features = self._problem.inputs(batch)
                for candidate in self._alive:
                    # Of dropout: that of a candidate does not depend on how many there are.
                    torch.manual_seed(seed * 4099 + number)
                    candidate.network.train(True)
                    scores = router_scores(candidate.network, features)
                    loss = self.stage.losses(scores, batch).mean()
                    if candidate.first_loss is None:
                        candidate.first_loss = float(loss.detach())
                    candidate.optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    candidate.steps += 1
                    warmth = min(1.0, candidate.steps / n_warm)
                    candidate.optimizer.param_groups[0]["lr"] = (
                        candidate.rate * candidate.factor * warmth
                    )
                    candidate.optimizer.step()
                    candidate.epoch_loss += float(loss.detach()) * len(batch)

    def _end_epoch(self, at: int, epoch: int) -> None:
        last = at == len(self._stages) - 1
        losses = {
            number: c.epoch_loss / len(self._problem.parts.learnt)
            for number, c in enumerate(self._candidates)
            if c.alive
        }
        sound = [k for k, loss in losses.items() if not self._has_diverged(k, loss, epoch)]
        judged = [losses[number] for number in sound]
        if last and len(self._problem.parts.judged):
            networks = [self._candidates[number].network for number in sound]
            judged = self._problem.held_out_losses(networks)
        for number, loss in zip(sound, judged, strict=True):
            candidate = self._candidates[number]
            told = loss if last else None
            candidate.fitted.history.append(
                {"stage": self.stage.name, "loss": losses[number], "held_out": told}
            )
            if last:
                self._judge(candidate, loss, epoch)
        if last:
            self._drop_the_worse_half(epoch)
        if epoch + 1 < self.stage.epochs and self._alive:
            self._at = (at, epoch + 1, 0)
            return
        self._at = (at + 1, 0, 0) if self._alive else (len(self._stages), 0, 0)
        for candidate in self._alive:
            # The stages have different losses; what AdamW knows of one misleads it in the next.
            candidate.optimizer.state.clear()
            candidate.first_loss, candidate.steps = None, 0

    def _judge(self, candidate: _Candidate, loss: float, epoch: int) -> None:
        """Keep the weights, or lower the rate, or stop."""
        fitted, patience = candidate.fitted, self._schedule.patience
        if loss < fitted.loss or not fitted.tensors:
            candidate.keep(loss, epoch + 1)
            fitted.stopped = "epochs"
            return
        candidate.waited += 1
        if not patience or candidate.waited < patience:
            return
        candidate.waited = 0
        candidate.factor *= _DECAY
        if candidate.factor < 0.999 * _DECAY**_N_DECAYS:
            candidate.alive = False
            fitted.stopped = "held-out loss"
            return
        candidate.network.load_state_dict(fitted.tensors)
        candidate.optimizer.state.clear()

    def _drop_the_worse_half(self, epoch: int) -> None:
        """After 1, 2, 4 ... epochs of the last stage."""
        alive = self._alive
        if len(alive) < 2 or (epoch + 1) & epoch:
            return
        for candidate in sorted(alive, key=lambda c: c.fitted.loss)[(len(alive) + 1) // 2 :]:
            candidate.alive = False
            candidate.fitted.stopped = "others were better"

    def _has_diverged(self, number: int, loss: float, epoch: int) -> bool:
        """Give one up whose loss is no number or grows without bound.

        Raises:
            TrainingError: if there is no other.
        """
        candidate = self._candidates[number]
        first = candidate.first_loss if candidate.first_loss is not None else math.inf
        if math.isfinite(loss) and loss <= 10 * first + 10:
            candidate.first_loss = min(first, loss)
            return False
        candidate.alive = False
        candidate.fitted.stopped = "diverged"
        if any(c.alive or c.fitted.tensors for c in self._candidates):
            return True
        raise TrainingError(
            f"the loss is {loss:.3g} in epoch {epoch + 1} of '{self.stage.name}' (it was "
            f"{first:.3g}); training diverges: lower lr ({candidate.rate})."
        )

    def _save_now_and_then(self) -> None:
        wanted = self._schedule.save_every
        wait = max(wanted, self._save_took / _PART_FOR_STATES) if wanted else 0.0
        if time.monotonic() - self._saved_at >= wait:
            self.save(self._done, self._number)

    def save(self, done: Sequence[Fitted], number: int, between_seeds: bool = False) -> None:
        """Keep the state, so that a stopped training resumes from here."""
        begun = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for k, candidate in enumerate([] if between_seeds else self._candidates):
            if candidate.alive:
                state = candidate.network.state_dict()
                tensors |= {f"{k}.network.{name}": v for name, v in state.items()}
                optimizer = optimizer_tensors(candidate.optimizer)
                tensors |= {f"{k}.{name}": v for name, v in optimizer.items()}
            tensors |= {f"{k}.best.{name}": v for name, v in candidate.fitted.tensors.items()}
        for n, fitted in enumerate(done):
            tensors |= {f"fitted.{n}.{name}": v for name, v in fitted.tensors.items()}
        facts = {
            "number": number,
            "at": None if between_seeds else self._at,
            "candidates": [{**c.facts(), "best": c.fitted.facts()} for c in self._candidates],
            "fitted": [fitted.facts() for fitted in done],
        }
        self._snapshots.save(tensors, facts)
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - begun

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on after a state of the same seed."""
        self._at = (facts["at"][0], facts["at"][1], facts["at"][2])
        for k, (candidate, kept) in enumerate(
            zip(self._candidates, facts["candidates"], strict=True)
        ):
            candidate.fitted = Fitted.restored(f"{k}.best.", tensors, kept.pop("best"))
            for name, value in kept.items():
                setattr(candidate, name, value)
            if candidate.alive:
                mine = {
                    name.removeprefix(f"{k}."): value
                    for name, value in tensors.items()
                    if name.startswith(f"{k}.")
                }
                network = {
                    name.removeprefix("network."): value
                    for name, value in mine.items()
                    if name.startswith("network.")
                }
                candidate.network.load_state_dict(network)
                load_optimizer(candidate.optimizer, mine)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
