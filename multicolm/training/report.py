"""What a training measured, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["report_lines", "report_title"]


def report_title(report: Mapping[str, Any]) -> str:
    """On which texts it was measured."""
    if report.get("held_out_positions"):
        return "measured on texts that were held out"
    if report.get("held_out_prompts"):
        return "measured on prompts that were left out of the learning in turn"
    return "measured on the texts that it learned from"


def report_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a training reports, as pairs to print; numbers in nats per token and parts of 1.

    Its ``note`` is no pair: it is said beside them.
    """
    shown = []
    for name, value in report.items():
        if name == "note":
            continue
        if isinstance(value, Mapping):
            parts = [f"{k} {_number(v)}" for k, v in value.items()]
            shown.append((name.replace("_", " "), ", ".join(parts)))
        elif isinstance(value, int | float | str):
            shown.append((name.replace("_", " "), _number(value)))
    return shown


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
