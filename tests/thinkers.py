"""Models that think before they answer, written by hand."""

from __future__ import annotations

from typing import Any

from multicolm.backend.table import TableModel

__all__ = ["SETTINGS", "WHOLE", "thinker"]

TOKENS = ["<think>", "</think>", "\n\n", *"abcd", "2", ".", "Q", "<end>"]
THINKS = {
    "": {"<end>": 1.0},
    "Q": {"<think>": 1.0},
    "<think>": {"a": 0.6, "b": 0.4},
    "a": {"b": 1.0},
    "b": {"c": 1.0},
    "c": {"d": 1.0},
    "d": {"</think>": 1.0},
    "</think>": {"\n\n": 1.0},
    "\n\n": {"2": 1.0},
    "2": {".": 1.0},
}
WHOLE = "<think>abcd</think>\n\n2."
SETTINGS: Any = {"think_end_token": "</think>", "max_new_tokens": 20}


def thinker(name: str, **changed: Any) -> TableModel:
    return TableModel(name, TOKENS, {**THINKS, **changed}, ends=["<end>"])
