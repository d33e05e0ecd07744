"""Learns who should write as a plain classification: who would have written the right token."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from multicolm.learning.networks import NetworkKind, shifted
from multicolm.learning.positions import Positions
from multicolm.learning.problem import Features, Stage
from multicolm.learning.reliability import reliability
from multicolm.learning.router import (
    NetworkSettings,
    Shape,
    fit_stages,
    network_scores,
    usable_parts,
)
from multicolm.learning.training import Training
from multicolm.score_table import ScoreBlocks, ScoreTable

__all__ = [
    "ClassifierSettings",
    "fit_classifier",
    "threshold_for_recall",
    "threshold_for_right_tokens",
]

Ways: TypeAlias = Literal["each", "binary"]


class ClassifierSettings(NetworkSettings):
    """How a classifier is trained.

    Attributes:
        network: ``mlp`` is about CITER's, with one hidden layer; ``residual`` R2R's, which has 6
            blocks of width 1,024. Of 3,000 to 24,000 positions with 576 to 4,096 features neither a
            ``mlp`` of width 1,024 nor a ``residual`` network learned more in held-out nats than a
            ``mlp`` of width 256 or less, in 3 to 8 times the time. More data is not measured.
        balance: how many times more a rare hand-over may weigh than a common token while it is
            learned. The probabilities are corrected for that.
        recall: the part of the tokens to be handed over, on held-out texts, that the threshold has
            to find, as in R2R; 0, or no held-out text, leaves the threshold as it is. If not given,
            the threshold is that of :func:`threshold_for_right_tokens`.
    """

    network: NetworkKind = "mlp"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    balance: float = Field(default=1.0, ge=1)
    recall: float | None = Field(default=None, ge=0, le=1)


def fit_classifier(
    table: ScoreBlocks, features: Features, ways: Ways, training: Training
) -> tuple[dict[str, Tensor], float | None]:
    """Train a classifier on the positions where some model is right.

    One output per assistant learns how likely it is right where the base model is not: several can
    be at once, so they are no classes of which one is true. Positions where nobody is right are
    left out: which writer is less wrong there takes the rest of the text to say.

    Args:
        table: of frozen models.
        features: what the classifier sees of each position.
        ways: ``each`` has one output per assistant, ``binary`` one for all of them together.
        training: options, see :class:`ClassifierSettings`.

    Returns:
        Tensors of a network for raw features, and the threshold on the probability of handing
        over; ``None`` if it is to stay as it is.

    Raises:
        TrainingError: if there is nothing to learn from, or training diverges.
    """
    settings = training.settings(ClassifierSettings)
    parts = usable_parts(
        table,
        settings,
        lambda part: part.right.any(-1),
        "at no position of this score table is any model's first choice the token of the text.",
    )
    odds = _prior_odds(parts.learnt, ways)
    weights = (1 / odds).clamp(1.0, settings.balance)
    # Training begins at the base rate, not at one half: of a rare hand-over the first epochs would
    # teach nothing else.
    prior = (odds * weights).log()

    def losses(scores: Tensor, part: ScoreTable) -> Tensor:
        wanted = _rescues(part, ways).to(scores)
        return nn.functional.binary_cross_entropy_with_logits(
            scores[:, 1:] + prior, wanted, pos_weight=weights, reduction="none"
        ).sum(-1)

    shape = Shape(settings.network, len(weights))
    stages = [Stage("classification", settings.epochs, losses)]
    tensors = fit_stages(parts, features, shape, settings, stages, losses, training)
    tensors = shifted(tensors, odds.log().cpu())  # without the weights, which only taught
    log_odds = network_scores(tensors, parts.measured, features)[:, 1:]
    part = parts.measured.scores_only()
    handed, chosen = torch.sigmoid(log_odds.amax(-1)), _chosen(log_odds, part, ways)
    recall = settings.recall if len(parts.judged) or settings.recall is None else 0.0
    threshold = _threshold(handed, chosen, part, recall)
    at = 0.5 if threshold is None else threshold
    training.report |= _report(handed, chosen, part, at)
    return tensors, threshold


def _rescues(part: ScoreTable, ways: Ways) -> Bool[Tensor, "positions outputs"]:
    """Where an assistant, or any of them, is right and the base model is not."""
    rescues = part.right[:, 1:] & ~part.right[:, :1]
    return rescues if ways == "each" else rescues.any(-1, keepdim=True)


def _prior_odds(positions: Positions, ways: Ways) -> Float[Tensor, "outputs"]:
    """By output, of how many positions to one an assistant is right and the base model not."""
    counts = torch.zeros(1, device=positions.device)
    for part in positions.in_order(features=False):
        counts = counts + _rescues(part, ways).sum(0)
    return (counts + 0.5) / (len(positions) - counts + 0.5)


def _chosen(log_odds: Tensor, part: ScoreTable, ways: Ways) -> Int[Tensor, "positions"]:
    """The assistant that would write: the likeliest one, or the surest."""
    if ways == "each":
        return log_odds.argmax(-1) + 1
    sureness = part.top1_logprobs[:, 1:].masked_fill(~part.known[:, 1:], float("-inf"))
    return sureness.argmax(-1) + 1


def _threshold(
    handed: Tensor, chosen: Tensor, part: ScoreTable, recall: float | None
) -> float | None:
    if recall is None:
        is_right = part.right.gather(1, chosen[:, None])[:, 0]
        return threshold_for_right_tokens(handed, part.right[:, 0], is_right)
    if not recall:
        return None
    return threshold_for_recall(handed, ~part.right[:, 0], recall)


def threshold_for_right_tokens(
    handed: Float[Tensor, "positions"],
    base_right: Bool[Tensor, "positions"],
    assistant_right: Bool[Tensor, "positions"],
) -> float:
    """The threshold on the probability of handing over with which most tokens are right.

    With p the probability that the assistant is right where the base model is not, handing over
    gains p and loses (1 - p) h, where h is how often that assistant is wrong where the base model
    is right. It pays where p > h / (1 + h). All hand-overs of a text have to come true, so a part
    of them that is to be found would be a part of the texts to the power of their number.

    What h is matters where p decides, and it is not the same everywhere: where the network is sure
    of the base model assistants are often wrong, and nobody asks them. So positions count by
    p (1 - p), the variance of what p predicts, as in the Fisher information of a logistic model.
    The threshold that had most held-out tokens right is no rival: a maximum over a few hundred
    tokens follows chance.

    Args:
        handed: p.
        base_right: whether the base model is right.
        assistant_right: whether the assistant is that would write there.
    """
    harmed = (base_right & ~assistant_right).double()
    everywhere = (harmed.sum() + 1) / (base_right.sum() + 2)
    weights = (handed * (1 - handed)).double()
    # Of few positions the estimate is that of all of them: it counts as one more.
    here = ((weights * harmed).sum() + everywhere) / ((weights * base_right).sum() + 1)
    return float(here / (1 + here))


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


def _report(handed: Tensor, chosen: Tensor, part: ScoreTable, threshold: float) -> dict[str, Any]:
    """What comes of the decisions, where some model is right."""
    base, assistant = part.right[:, 0], part.right.gather(1, chosen[:, None])[:, 0]
    goes = handed > threshold
    return {
        "right_tokens": float(torch.where(goes, assistant, base).float().mean()),
        "right_tokens_base": float(base.float().mean()),
        "threshold": threshold,
        "share_handed_over": float(goes.float().mean()),
        "share_to_hand_over": float((~base).float().mean()),
    } | reliability(handed, (assistant & ~base).float())
