"""Random tables for tests: exact distributions, small enough to work out what they must give."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from multicolm.backend.table import TableModel
from multicolm.plugins import policies

UNTAUGHT = {kind for kind in policies if hasattr(policies.get(kind), "made_for")}
"""Policies that are nothing before they are trained."""

READY = [
    kind
    for kind in policies
    if kind not in UNTAUGHT and policies.get(kind).support not in ("bytes", "characters")
]
"""Policies that need no training. Those that do, and those that write bytes or characters, have
their laws in their own test files."""

TOKENS = ("a", "b", " c", "d", " e", "f", ".")
"""The last one ends a text; two begin a word."""


def random_table(name: str, seed: int, tokens: Sequence[str] = TOKENS) -> TableModel:
    """A table that remembers two tokens; some of its distributions are flat, some peaked."""
    chance = random.Random(seed)
    *words, end = tokens
    rows: dict[Any, Mapping[str, float]] = {}
    for context in ["", *words, *((a, b) for a in words for b in words)]:
        weights = [chance.random() ** chance.choice([1, 3, 8]) + 1e-4 for _ in tokens]
        weights[-1] *= 0.2
        rows[context] = {t: w / sum(weights) for t, w in zip(tokens, weights, strict=True)}
    return TableModel(name, tokens, rows, ends=[end])
