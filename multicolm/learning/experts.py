"""Learns which assistant to name, where the base model is none of the choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from multicolm.errors import TrainingError
from multicolm.learning.problem import Features
from multicolm.learning.router import RouterSettings, fit_marginal
from multicolm.learning.training import Training
from multicolm.score_table import ScoreBlocks, ScoreTable
from multicolm.views import ModelNames

__all__ = ["fit_experts"]

_OF_THE_BASE = ("right_tokens_base", "calibration", "calibration_error", "calibration_positions")


def fit_experts(table: ScoreBlocks, features: Features, training: Training) -> dict[str, Tensor]:
    """Train a router over the assistants by marginal likelihood.

    Args:
        table: of frozen models, the base model first; in memory or on disk.
        features: what the router sees of each position.
        training: options, see :class:`multicolm.learning.router.RouterSettings`, without weak
            labels unless ``weak_epochs`` says so; the report gets losses in nats per token.

    Returns:
        Tensors of a network for raw features with one score per assistant.

    Raises:
        TrainingError: if there is nothing to learn from, or the loss is no number.
    """
    if len(table.models) < 2:
        raise TrainingError("this score table has one model, and no assistant to be named.")
    if len(table.models) == 2:
        training.settings(RouterSettings)  # which may be wrong all the same
        width = features(next(iter(table.blocks(1, [0])))).shape[1]
        return {"0.weight": torch.zeros(1, width), "0.bias": torch.zeros(1)}
    inner = replace(training, options={"weak_epochs": 0, **training.options}, report={})
    tensors = fit_marginal(_WithoutBase(table), features, inner, _likeliest)
    training.report |= {k: v for k, v in inner.report.items() if k not in _OF_THE_BASE}
    return _with_first(tensors)


def _likeliest(log_pi: Tensor, costs: Tensor) -> Tensor:
    return nn.functional.one_hot(log_pi.argmax(-1), log_pi.shape[1]).to(log_pi)


class _WithoutBase:
    """The assistants' columns of a score table; its features stay the base model's."""

    def __init__(self, table: ScoreBlocks) -> None:
        self._table = table
        self.models = ModelNames(table.models[1:])
        self.costs = tuple(table.costs[1:])
        self.identities = tuple(table.identities[1:])
        self.digest = table.digest

    def __len__(self) -> int:
        return len(self._table)

    def n_blocks(self, size: int) -> int:
        """See :meth:`multicolm.score_table.ScoreBlocks.n_blocks`."""
        return self._table.n_blocks(size)

    def blocks(self, size: int, order: Sequence[int] | None = None) -> Iterator[ScoreTable]:
        """See :meth:`multicolm.score_table.ScoreBlocks.blocks`."""
        for block in self._table.blocks(size, order):
            columns: dict[str, Any] = {
                name: values[:, 1:] for name, values in block.columns().items() if values.ndim == 2
            }
            yield replace(
                block,
                **columns,
                models=self.models,
                costs=self.costs,
                identities=self.identities,
            )


def _with_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network that gives a score to the first model too: zero, as the others were learned by."""
    last = max(int(name.split(".")[0]) for name in tensors)
    changed = {}
    for name in (f"{last}.weight", f"{last}.bias"):
        changed[name] = torch.cat([torch.zeros_like(tensors[name][:1]), tensors[name]])
    return {**tensors, **changed}
