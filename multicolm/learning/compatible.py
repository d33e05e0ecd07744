"""Chooses the models that are worth adding up for a task, by their judged answers alone."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from multicolm.config.wording import Strict
from multicolm.errors import TrainingError
from multicolm.learning.queries import JudgedAnswers

__all__ = ["CompatibleSettings", "compatible_models"]


class CompatibleSettings(Strict):
    """How much models may differ from the best one.

    Attributes:
        gap: in mean quality (0 to 1). The paper's is 0.1.
        length_ratio: of the longer to the shorter mean answer, in characters. The paper asks for a
            like style and length; the number is ours.
    """

    gap: float = Field(default=0.1, ge=0, le=1)
    length_ratio: float = Field(default=2.0, ge=1)


def compatible_models(
    answers: JudgedAnswers, settings: CompatibleSettings
) -> tuple[list[str], dict[str, Any]]:
    """The best model and those that are about as good and answer at about the same length.

    Args:
        answers: of every model alone.
        settings: how much they may differ.

    Returns:
        Names of the models, the best one first, and a report: of each model the mean quality and
        the mean length of its answers in characters.

    Raises:
        TrainingError: if there is no answer.

    Source:
        UniTE, arXiv 2410.03777, its "determine" stage.
    """
    if len(answers) == 0:
        raise TrainingError("no judged answers: give at least one question.")
    # Sums of exact tenths are not exact; a gap that is allowed is not exceeded by rounding.
    quality, lengths = answers.quality.double().mean(0), answers.lengths.double().mean(0)
    order = quality.argsort(descending=True, stable=True).tolist()
    best = order[0]
    longer = torch.maximum(lengths, lengths[best])
    shorter = torch.minimum(lengths, lengths[best])
    is_close = quality[best] - quality <= settings.gap + 1e-9
    is_alike = longer <= settings.length_ratio * shorter
    chosen = [answers.models[k] for k in order if is_close[k] and is_alike[k]]
    report: dict[str, Any] = {
        "prompts": len(answers),
        "models": ", ".join(chosen),
        "quality_alone": dict(zip(answers.models, quality.tolist(), strict=True)),
        "mean_length": dict(zip(answers.models, lengths.tolist(), strict=True)),
    }
    if len(chosen) == 1:
        report["note"] = (
            f"No model is close enough to {chosen[0]}, the best one, so it writes alone; options "
            "gap and length_ratio allow more."
        )
    return chosen, report
