"""Small ensembles, prompts and settings for texts that are written beside others."""

from __future__ import annotations

from typing import Any

from tables import random_table
from tiny_models import PROMPTS as LONG_PROMPTS
from tiny_models import model

from multicolm import Answer, Ensemble

__all__ = [
    "LONG_PROMPTS",
    "MIXED_PROMPTS",
    "PROMPTS",
    "SETTINGS",
    "cached",
    "mixed",
    "shown",
    "tables",
]

PROMPTS = ["a", "b c", "a c", "f", "b", "d e", "d"]
MIXED_PROMPTS = ["a", "b c", "f", "ab"]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_new_tokens": 9},
    {"temperature": 1.0, "max_new_tokens": 12},
    {"temperature": 0.7, "top_k": 3, "max_new_tokens": 7},
    {"temperature": 1.3, "top_p": 0.8, "max_new_tokens": 11, "stop": "ab"},
]


def tables() -> Ensemble:
    """Of one vocabulary; for PROMPTS."""
    return Ensemble([random_table(name, seed) for seed, name in enumerate(("base", "l", "r"))])


def mixed() -> Ensemble:
    """Of different vocabularies; for MIXED_PROMPTS."""
    base = ("a", "b", "c", " ", "d", " c", "f", ".")
    left = ("a", "b", "c", " ", "d", "f", "ab", "bc", "<stop>")
    return Ensemble([random_table("base", 1, base), random_table("left", 2, left)])


def cached() -> Ensemble:
    """With caches that rows share; for LONG_PROMPTS."""
    return Ensemble([model("llama", "base", 0), model("gemma3", "left", 1)])


def shown(answer: Answer) -> list[object]:
    """What must not depend on the other texts."""
    tokens = [(token.id, token.model) for token in answer.trace]
    return [answer.text, tokens, answer.finish_reason, answer.seed]
