"""How much of everything: of training, medicines and questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

TEXTS: Final = 48
"""Answered together."""


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained.

    Attributes:
        steps: optimiser steps; each sees `rows` rows of `row_tokens` tokens.
        rank: of the adapter.
        peak: highest learning rate, after `warm_up` steps; a cosine goes down to a twentieth.
    """

    steps: int
    rows: int = 6
    row_tokens: int = 64
    rank: int = 16
    peak: float = 2e-3
    warm_up: int = 20
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        done = step / self.steps
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
        return self.peak * min(1.0, (step + 1) / self.warm_up) * fall


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        medicines: invented, in all splits.
        steps: of training, per adapter.
        per_kind: questions of each of the three kinds, per split.
        grid: values that are tried for the rules, per param.
    """

    medicines: int
    steps: dict[str, int]
    per_kind: dict[str, int]
    grid: dict[str, tuple[str, ...]]


RULES: Final = {
    "cosd-rule": ("alpha=0.5,0.9,1.1", "beta=0.5,1.0"),
    "confidence": ("threshold=0.5,0.8,0.95",),
}
SMALL: Final = Size(
    medicines=24,
    steps={"everything": 390, "maths": 170, "facts": 220},
    per_kind={"train": 20, "dev": 4, "test": 16},
    grid=RULES,
)
FULL: Final = Size(
    medicines=80,
    steps={"everything": 1400, "maths": 800, "facts": 600},
    per_kind={"train": 80, "dev": 16, "test": 80},
    grid=RULES,
)
