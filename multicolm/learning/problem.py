"""What a network is trained on, and what comes of it: shared by the ways to train one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicolm.errors import TrainingError
from multicolm.learning.networks import router_scores
from multicolm.learning.positions import Parts, Positions
from multicolm.score_table import ScoreTable

__all__ = ["Features", "Fitted", "Losses", "Problem", "Stage", "check_numbers", "standardise"]

Losses: TypeAlias = Callable[[Float[Tensor, "batch models"], ScoreTable], Float[Tensor, "batch"]]
"""The loss of each of some positions, from the network's scores of them and what the table says."""

Features: TypeAlias = Callable[[ScoreTable], Float[Tensor, "batch features"]]
"""What the network sees of some positions, raw; asked of a batch at a time."""

_SMALL = 8_000_000
"""Features of a table that stays in memory: 32 MB."""

_AT_ONCE = 1_000_000
"""Features of one forward pass over all positions: 4 MB."""

_FLOOR = -1e4
"""Of features: a log-probability of -inf as a number."""


@dataclass(frozen=True)
class Stage:
    """Some epochs with one loss.

    Attributes:
        name: for messages.
        epochs: how many, at most.
        losses: of each position of a batch, in nats.
    """

    name: str
    epochs: int
    losses: Losses


@dataclass(frozen=True)
class Problem:
    """What a network is trained on.

    Attributes:
        parts: positions to learn from, and held-out ones.
        features: raw ones.
        centre: of each feature, over the positions that are learnt from.
        scale: of each feature.
        judge: the losses that networks are ranked by; the smaller the better.
    """

    parts: Parts
    features: Features
    centre: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]
    judge: Losses
    _read: dict[int, list[tuple[Tensor, ScoreTable]]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """On which networks are trained."""
        return self.parts.learnt.device

    def inputs(self, part: ScoreTable) -> Float[Tensor, "batch features"]:
        """Standardised features, in float32; those of ``part`` are changed where they lie."""
        values = self.features(part).float().clamp_min_(_FLOOR)
        return values.sub_(self.centre).mul_(self._inverse_scale)

    @cached_property
    def _inverse_scale(self) -> Float[Tensor, "features"]:
        return 1 / self.scale

    def batches(self, positions: Positions) -> Iterator[tuple[Tensor, ScoreTable]]:
        """Standardised features of all of some positions, with the rest of what is known of them.

        A small table is read once. A large one is read each time, so that memory does not grow.
        """
        small = len(positions) * len(self.centre) <= _SMALL
        if small and id(positions) not in self._read:
            self._read[id(positions)] = list(self._batches(positions))
        yield from self._read[id(positions)] if small else self._batches(positions)

    def _batches(self, positions: Positions) -> Iterator[tuple[Tensor, ScoreTable]]:
        # As many as the cache of a processor takes: what follows reads them several times.
        at_once = max(256, _AT_ONCE // len(self.centre))
        for part in positions.in_order(at_once):
            yield self.inputs(part), replace(part, base={})

    @torch.no_grad()
    def held_out_losses(self, networks: Sequence[nn.Module]) -> list[float]:
        """The mean of :attr:`judge` over the held-out positions, in nats, in one pass over them."""
        totals, n = [0.0] * len(networks), 0
        for inputs, part in self.batches(self.parts.judged):
            n += len(part)
            for k, network in enumerate(networks):
                scores = router_scores(network.train(False), inputs)
                totals[k] += float(self.judge(scores, part).sum())
        return [total / n for total in totals]

    @torch.no_grad()
    def held_out_by_text(self, network: nn.Module) -> Float[Tensor, "texts"]:
        """The sum of :attr:`judge` over each held-out text, in nats."""
        texts = self._held_out_texts
        totals = torch.zeros(len(texts), dtype=torch.float64)
        for inputs, part in self.batches(self.parts.judged):
            losses = self.judge(router_scores(network.train(False), inputs), part)
            where = torch.searchsorted(texts, part.example.cpu())
            totals.index_add_(0, where, losses.cpu().double())
        return totals

    @cached_property
    def _held_out_texts(self) -> Tensor:
        parts = self.parts.judged.in_order(features=False)
        found: Tensor = torch.unique(
            torch.cat([torch.unique(part.example).cpu() for part in parts])
        )
        return found


def standardise(
    positions: Positions, features: Features
) -> tuple[Float[Tensor, "features"], Float[Tensor, "features"]]:
    """Mean and scale of each feature, in one pass; a feature that never changes has scale 1.

    Raises:
        TrainingError: if a feature is NaN or infinite.
    """
    n, centre, squares = 0, torch.zeros(0), torch.zeros(0)
    for raw in _numbers(positions, features):
        values = raw.double()
        here = values.mean(0)
        if not n:
            centre, squares = torch.zeros_like(here), torch.zeros_like(here)
        # The update of Chan, Golub and LeVeque, 1979: exact where a mean is far from 0.
        m, away = len(values), here - centre
        squares += (values - here).square().sum(0) + away.square() * (n * m / (n + m))
        centre += away * (m / (n + m))
        n += m
    scale = (squares / n).sqrt()
    scale = torch.where(scale > 1e-6 * (1 + centre.abs()), scale, torch.ones_like(scale))
    return centre.float(), scale.float()


def check_numbers(positions: Positions, features: Features) -> None:
    """Refuse features that would make every weight NaN.

    Raises:
        TrainingError: if a feature is NaN or infinite.
    """
    for _ in _numbers(positions, features):
        pass


def _numbers(positions: Positions, features: Features) -> Iterator[Tensor]:
    n_wrong = 0
    for part in positions.in_order():
        raw = features(part).float()
        n_wrong += int((raw.isnan() | raw.isposinf()).any(-1).sum())
        yield raw.clamp_min(_FLOOR)  # -inf is a token that cannot come
    if n_wrong:
        raise TrainingError(
            f"the features of the base model are NaN or infinite at {n_wrong} of "
            f"{len(positions)} positions; score the corpus with another `dtype`."
        )


@dataclass
class Fitted:
    """What came of one training.

    Attributes:
        seed: it began with.
        settings: those that were found by search, such as ``lr`` and ``l2``.
        loss: on held-out texts, in nats; on the last epoch's batches if none are held out.
        epoch: of the last stage that it is of.
        stopped: why it ended: ``epochs`` ran out while it still improved, the ``held-out loss``
            did not improve any more, or something else.
        tensors: of the network, for standardised features.
        history: per epoch its stage, mean loss and held-out loss.
        search: the settings that were tried, and the loss and epoch of each.
    """

    seed: int
    settings: dict[str, float]
    loss: float = math.inf
    epoch: int = 0
    stopped: str = "epochs"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """Of a candidate, for the report of a search."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {**self.settings, "loss_nats": loss, "epoch": self.epoch, "stopped": self.stopped}

    def facts(self) -> dict[str, Any]:
        """What is no tensor, for a state."""
        facts = {name: value for name, value in vars(self).items() if name != "tensors"}
        return {**facts, "loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def restored(
        cls, prefix: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> Fitted:
        """The reverse of :meth:`facts`, with the tensors whose names begin with a prefix."""
        loss = math.inf if facts["loss"] is None else facts["loss"]
        mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return cls(**{**facts, "loss": loss, "tensors": mine})
