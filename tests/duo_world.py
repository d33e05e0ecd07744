"""Two tables and four questions, small enough to work out what every policy makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multicolm import Ensemble
from multicolm.backend.table import TableModel

TOKENS = ["1", "2", "3", "4", "x", "y", "<end>"]
# Question 1 is the base's, 2 the helper's, 3 takes both in turn, 4 nobody can answer.
QUESTIONS = [
    {"id": "one", "ask": "1", "answer": "x"},
    {"id": "two", "ask": "2", "answer": "y"},
    {"id": "three", "ask": "3", "answer": "xy"},
    {"id": "four", "ask": "4", "answer": "yy"},
]
BASE: Mapping[Any, Mapping[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"x": 0.9, "y": 0.1},
    "2": {"x": 0.6, "y": 0.4},
    "3": {"x": 0.9, "y": 0.1},
    "4": {"x": 1.0},
    "x": {"<end>": 0.9, "y": 0.1},
    ("3", "x"): {"<end>": 0.6, "y": 0.4},
}
HELPER: Mapping[Any, Mapping[str, float]] = {
    "": {"<end>": 1.0},
    "1": {"y": 1.0},
    "2": {"y": 0.9, "x": 0.1},
    "3": {"y": 0.8, "x": 0.2},
    "4": {"x": 1.0},
    ("3", "x"): {"y": 1.0},
}


def duo_ensemble() -> Ensemble:
    """The base model and its helper."""
    tables = {"base_": BASE, "helper": HELPER}
    return Ensemble([TableModel(name, TOKENS, table, ["<end>"]) for name, table in tables.items()])
