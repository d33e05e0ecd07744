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
        if name == "note" or name in _WITH_RIGHT_TOKENS or _repeats(name, report):
            continue
        if name == "right_tokens":
            shown.append(("right tokens", _right_tokens(report)))
            continue
        if isinstance(value, Mapping):
            parts = [f"{k} {_number(v)}" for k, v in value.items()]
            shown.append((name.replace("_", " "), ", ".join(parts)))
        elif isinstance(value, int | float | str):
            shown.append((name.replace("_", " "), _number(value)))
    return shown


_WITH_RIGHT_TOKENS = ("right_tokens_base", "right_tokens_oracle")


def _right_tokens(report: Mapping[str, Any]) -> str:
    """``95.0 % (base alone 84.5 %, best possible 95.3 %)``."""
    base, oracle = _WITH_RIGHT_TOKENS
    beside = [("base alone", report.get(base)), ("best possible", report.get(oracle))]
    parts = [f"{name} {100 * value:.1f} %" for name, value in beside if value is not None]
    right = f"{100 * report['right_tokens']:.1f} %"
    return f"{right} ({', '.join(parts)})" if parts else right


def _repeats(name: str, report: Mapping[str, Any]) -> bool:
    """Whether a loss is the negative log-likelihood that is shown anyway."""
    loss, nll = report.get("loss_nats"), report.get("nll_nats")
    return name == "loss_nats" and None not in (loss, nll) and f"{loss:.4g}" == f"{nll:.4g}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
