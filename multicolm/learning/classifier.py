"""Learns who should write as a plain classification: who would have written the right token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from multicolm.errors import TrainingError
from multicolm.learning.loop import Stage
from multicolm.learning.losses import class_weights, weak_labels
from multicolm.learning.networks import NetworkKind
from multicolm.learning.reliability import reliability
from multicolm.learning.router import (
    NetworkSettings,
    Shape,
    cross_entropy,
    fit_stages,
    raw_scores,
    usable_parts,
)
from multicolm.learning.training import Training
from multicolm.score_table import ScoreTable

__all__ = ["ClassifierSettings", "fit_classifier", "threshold_for_recall"]


class ClassifierSettings(NetworkSettings):
    """How a classifier is trained.

    Attributes:
        network: ``mlp`` is about CITER's, ``residual`` R2R's, which takes many times as long.
        recall: the part of the tokens that should be handed over, on held-out texts, that the
            threshold has to find; 0 leaves the threshold as it is.
    """

    network: NetworkKind = "mlp"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    epochs: int = Field(default=30, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    l2: float = Field(default=5e-4, ge=0)
    recall: float = Field(default=0.95, ge=0, le=1)


def fit_classifier(
    table: ScoreTable,
    features: Callable[[ScoreTable], Tensor],
    ways: Literal["models", "binary"],
    training: Training,
) -> tuple[dict[str, Tensor], float | None]:
    """Train a classifier on the positions where some model's first choice is right.

    Positions where nobody is right are left out: which writer is less wrong there takes the rest
    of the text to say, as R2R and CITER do with roll-outs.

    Args:
        table: of frozen models.
        features: what the classifier sees of each position.
        ways: ``models`` has one class per model, ``binary`` only tells whether to hand over.
        training: options, see :class:`ClassifierSettings`.

    Returns:
        Tensors of a network for raw features, and the threshold on the probability of handing
        over that reaches the wanted recall; ``None`` if none is wanted or nothing is held out.

    Raises:
        TrainingError: if there is nothing to learn from, or training diverges.
    """
    settings = training.settings(ClassifierSettings)
    judgeable = table.rows(table.correct.any(-1))
    if not len(judgeable):
        raise TrainingError(
            "there is nothing to learn from: at no position of this score table is the first "
            "choice of any model the token that stands there."
        )
    learnt, judged = usable_parts(judgeable, settings)

    def labels_of(part: ScoreTable) -> Tensor:
        labels = weak_labels(part)
        return labels if ways == "models" else _two_ways(labels)

    labels, beheld = labels_of(learnt), labels_of(judged)
    weights = class_weights(labels, settings.balance)

    def loss(scores: Tensor, which: Tensor) -> Tensor:
        return cross_entropy(scores, labels[which], weights)

    def judge(scores: Tensor, part: ScoreTable) -> Tensor:
        return -(beheld * weights * scores.log_softmax(-1)).sum(-1)

    shape = Shape(settings.network, learnt.n_models - 1 if ways == "models" else 1)
    stages = [Stage("classification", settings.epochs, loss)]
    tensors = fit_stages(learnt, judged, features, shape, settings, stages, judge, training)
    if not len(judged):
        return tensors, None
    handed = 1 - raw_scores(tensors, features(judged)).softmax(-1)[:, 0]
    wanted = beheld[:, 0] < 0.5
    threshold = threshold_for_recall(handed, wanted, settings.recall) if settings.recall else None
    at = 0.5 if threshold is None else threshold
    training.report |= {
        "right_ways": float(((handed > at) == wanted).float().mean()),
        "share_handed_over": float((handed > at).float().mean()),
        "share_to_hand_over": float(wanted.float().mean()),
    } | reliability(handed, wanted.float())
    return tensors, threshold


def threshold_for_recall(
    handed: Float[Tensor, "positions"], wanted: Bool[Tensor, "positions"], recall: float
) -> float:
    """The greatest of 0.01, 0.02 ... 0.99 above which at least ``recall`` of the wanted ones lie.

    It hands over the fewest tokens. 0.01 if none reaches the recall, 0.5 if nothing is wanted.

    Source:
        R2R, arXiv 2505.21600, its threshold search.
    """
    if not bool(wanted.any()):
        return 0.5
    positive = handed[wanted]
    for percent in range(99, 0, -1):
        if float((positive > percent / 100).float().mean()) >= recall:
            return percent / 100
    return 0.01


def _two_ways(labels: Float[Tensor, "positions models"]) -> Float[Tensor, "positions ways"]:
    """The base model, or anybody else."""
    return torch.stack([labels[:, 0], 1 - labels[:, 0]], dim=-1)
