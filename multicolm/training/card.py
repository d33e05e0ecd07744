"""The README of a checkpoint: a model card that says where it is from and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from multicolm.training.report import report_title

__all__ = ["card"]

_NO_PAIRS = ("history", "calibration", "search", "note")
_CALIBRATION = (
    "Calibration: the predicted probability of handing over, and how often an assistant was the "
    "one that was right"
)


def card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        config: summary, kind and params, as in ``policy.yaml``.
        provenance: see :func:`multicolm.training.provenance.read_provenance`.
    """
    models = provenance.get("models") or []
    front: dict[str, Any] = {
        "library_name": "multicolm",
        "tags": ["multicolm", "token-level-routing"],
        "license": provenance.get("license") or "unknown",
    }
    hub = [m["identity"][4:].split("@")[0] for m in models if m["identity"].startswith("hub:")]
    if hub:
        front["base_model"] = hub
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# A `{config['kind']}` policy for multicolm\n",
    ]
    if config.get("summary"):
        parts.append(f"{config['summary']}\n")
    if "train_base" in provenance.get("train", {}):
        parts.append(
            "The folder is an ensemble: `ensemble.yaml` names its models, and the trained base "
            "model is beside it:\n\n"
            '```console\n$ multicolm generate ./FOLDER "PROMPT" --trace\n```\n'
        )
    else:
        parts.append(
            "Says at every token which model of an ensemble writes. Use it as `policy: ./FOLDER` "
            "in an ensemble file, or with `--policy ./FOLDER`:\n\n"
            '```console\n$ multicolm generate ENSEMBLE "PROMPT" --policy ./FOLDER --trace\n```\n'
        )
    if models:
        rows = [[str(k), m["name"], m["identity"] or "unknown"] for k, m in enumerate(models)]
        parts.append("## Made for\n\n" + _table(["", "name", "what it is"], rows))
        parts.append("Other models, or another order of them, are refused.\n")
    parts.append("## Params\n\n" + _pairs(config["params"]))
    for part, title in (("train", "Training"), ("tune", "Tuning")):
        if part in provenance:
            parts.append(_section(title, provenance[part]))
    parts.append(
        f"## Licence\n\nOf this policy: {provenance.get('license') or 'not stated'}. The models "
        "have their own.\n"
    )
    return "\n".join(parts)


def _section(title: str, facts: Mapping[str, Any]) -> str:
    named = {
        key: value
        for key, value in facts.items()
        if key not in ("report", "prompts", "options", "curve") and value not in ("", None)
    }
    named["prompts seen"] = len(facts.get("prompts", ()))
    text = f"## {title}\n\n" + _pairs(named)
    if facts.get("options"):
        text += "\nOptions:\n\n" + _pairs(facts["options"])
    report = {k: v for k, v in facts.get("report", {}).items() if k not in _NO_PAIRS}
    if report:
        text += f"\n{report_title(report).capitalize()} (nats per token, parts of 1):\n\n"
        text += _pairs(report)
    note = facts.get("report", {}).get("note")
    if note:
        text += f"\n{note}\n"
    calibration = facts.get("report", {}).get("calibration")
    for what, rows in ((_CALIBRATION, calibration), ("The curve", facts.get("curve"))):
        if rows:
            names = list(rows[0])
            shown = [[_show(row[name]) for name in names] for row in rows]
            text += f"\n{what}:\n\n" + _table(names, shown)
    return text


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(["", ""], [[f"`{key}`", _show(value)] for key, value in values.items()])


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_show, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
