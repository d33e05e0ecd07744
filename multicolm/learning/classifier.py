"""Learns who should write as a plain classification: who would have written the right token."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from multicolm.learning.losses import cross_entropy, weak_labels
from multicolm.learning.networks import NetworkKind
from multicolm.learning.problem import Features, Stage
from multicolm.learning.reliability import reliability
from multicolm.learning.router import (
    NetworkSettings,
    Shape,
    balanced_weights,
    fit_stages,
    network_scores,
    usable_parts,
)
from multicolm.learning.training import Training
from multicolm.score_table import ScoreBlocks, ScoreTable

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
    recall: float = Field(default=0.95, ge=0, le=1)


def fit_classifier(
    table: ScoreBlocks,
    features: Features,
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
    parts = usable_parts(
        table,
        settings,
        lambda part: part.right.any(-1),
        "at no position of this score table is the first choice of any model the token that stands "
        "there.",
    )

    def labels_of(part: ScoreTable) -> Tensor:
        labels = weak_labels(part)
        return labels if ways == "models" else _two_ways(labels)

    weights = balanced_weights(parts.learnt, labels_of, settings.balance)

    def losses(scores: Tensor, part: ScoreTable) -> Tensor:
        return cross_entropy(scores, labels_of(part), weights)

    shape = Shape(settings.network, len(table.models) - 1 if ways == "models" else 1)
    stages = [Stage("classification", settings.epochs, losses)]
    tensors = fit_stages(parts, features, shape, settings, stages, losses, training)
    if not len(parts.judged):
        return tensors, None
    handed = 1 - network_scores(tensors, parts.judged, features).softmax(-1)[:, 0]
    wanted = labels_of(parts.judged.scores_only())[:, 0] < 0.5
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
