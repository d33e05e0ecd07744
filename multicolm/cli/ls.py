"""``multicolm ls``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from multicolm.cli.options import (
    as_json,
    examples,
    json_option,
)

__all__ = ["command"]


def _models() -> list[dict[str, Any]]:
    from multicolm import catalog
    from multicolm.config import load_model_file

    return [
        {"name": name, **load_model_file(name).model_dump()} for name in catalog.names("models")
    ]


def _ensembles() -> list[dict[str, Any]]:
    from multicolm import catalog
    from multicolm.config import load_ensemble

    entries = []
    for name in catalog.names("ensembles"):
        config = load_ensemble(name)
        entries.append(
            {
                "name": name,
                "summary": config.summary,
                "models": list(config.names),
                "policy": config.policy.kind,
            }
        )
    return entries


def _policies() -> list[dict[str, Any]]:
    from multicolm import catalog
    from multicolm.config import load_policy_file, policy_names

    presets = [*catalog.names("policies"), *catalog.names("trained")]
    plugins = [
        {"name": name, "summary": "no preset: a plug-in", "kind": name, "params": {}, "source": ""}
        for name in policy_names()
        if name not in presets
    ]
    return [
        *({"name": name, **load_policy_file(name).model_dump()} for name in presets),
        *plugins,
    ]


def _tasks() -> list[dict[str, Any]]:
    from multicolm import catalog
    from multicolm.evaluation.task import load_task

    entries = []
    for name in catalog.names("tasks"):
        config = load_task(name).config
        entries.append(
            {
                "name": name,
                "summary": config.summary,
                "splits": list(config.data),
                "metric": config.metric.kind,
                "source": config.source,
            }
        )
    return entries


_KINDS: dict[str, tuple[Callable[[], list[dict[str, Any]]], list[str]]] = {
    "models": (_models, ["name", "parameters", "context_length", "licence", "summary"]),
    "ensembles": (_ensembles, ["name", "models", "policy", "summary"]),
    "policies": (_policies, ["name", "summary", "params"]),
    "tasks": (_tasks, ["name", "splits", "metric", "summary"]),
}


def _cell(value: object) -> object:
    """A value as the table shows it."""
    if isinstance(value, dict):
        # What a trained policy was made for is long, and in the JSON.
        short = {key: v for key, v in value.items() if not isinstance(v, dict)}
        return ", ".join(f"{key}={'none' if v is None else v}" for key, v in short.items())
    return ", ".join(value) if isinstance(value, list) else value


@click.command(
    epilog=examples(
        "ls policies",
        "ls ensembles --json",
    )
)
@click.argument("kind", type=click.Choice(list(_KINDS)))
@json_option
def command(kind: str, as_json_: bool) -> None:
    """List the models, ensembles, policies or tasks known by name."""
    read, columns = _KINDS[kind]
    entries = read()
    if as_json_:
        click.echo(as_json(entries))
        return
    from multicolm.cli.console import print_table

    headings = [column.replace("_length", "") for column in columns]
    rows = [[_cell(entry[column]) for column in columns] for entry in entries]
    print_table(headings, rows)
