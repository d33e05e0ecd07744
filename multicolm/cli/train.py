"""``multicolm train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from multicolm.cli.options import as_json, json_option, parameters, policy_options
from multicolm.errors import ConfigError

__all__ = ["command"]


@click.command
@click.argument("ensemble")
@click.argument("scores")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The checkpoint.")
@policy_options
@click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="Of the training, such as lr=0.003 or seeds=[0,1,2]. Repeatable.",
)
@click.option("--license", "license_", default="", help="Of the checkpoint, for its card.")
@json_option
def command(
    ensemble: str,
    scores: str,
    out: Path,
    policy: str | None,
    pairs: tuple[str, ...],
    options: tuple[str, ...],
    license_: str,
    as_json_: bool,
) -> None:
    """Train a policy of ENSEMBLE on SCORES, a folder that `multicolm score` wrote.

    No model is loaded. The checkpoint is used as `--policy ./CHECKPOINT`, or in an ensemble file
    as `policy: ./CHECKPOINT`. The same command goes on where it was stopped.
    """
    from multicolm.cli.console import print_table, work_bar
    from multicolm.config import load_ensemble
    from multicolm.policy.resolve import resolve_policy
    from multicolm.training.identities import identities
    from multicolm.training.train import report_lines, train

    config = load_ensemble(ensemble)
    if policy is None:
        raise ConfigError("which policy? Give one that learns with --policy, such as co-llm.")
    chosen = resolve_policy(policy, parameters(pairs))
    with work_bar("steps") as bar:
        checkpoint = train(
            chosen,
            scores,
            out,
            models=identities(config),
            options=parameters(options),
            license=license_,
            on_progress=bar,
        )
    facts: dict[str, Any] = checkpoint.provenance["train"]
    if as_json_:
        click.echo(as_json({"out": str(out), "kind": checkpoint.policy.name, **facts["report"]}))
        return
    print_table(["measured on held-out texts", ""], report_lines(facts["report"]))
    click.echo(f"{out}: a {checkpoint.policy.name} policy; use it with --policy {_as_path(out)}")


def _as_path(folder: Path) -> str:
    """As one writes a folder where a name could stand too."""
    text = str(folder)
    return text if "/" in text else f"./{text}"
