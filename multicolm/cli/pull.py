"""``multicolm pull``."""

from __future__ import annotations

from pathlib import Path

import click

from multicolm.cli.options import (
    as_json,
    examples,
    json_option,
    quiet_transfers,
)

__all__ = ["command"]

_USES = {
    "router": "use it with --policy {0}",
    "ensemble": 'use it: multicolm generate {0} "PROMPT"',
    "score table": "learn from it: multicolm train ENSEMBLE {0} --policy co-llm --out ROUTER",
}


@click.command(
    epilog=examples(
        "pull organisation/router runs/router",
    )
)
@click.argument("repository")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", help="Commit, tag or branch.")
@json_option
def command(repository: str, folder: Path, revision: str | None, as_json_: bool) -> None:
    """Fetch a router, an ensemble or a score table from REPOSITORY on the Hub into FOLDER.

    Only declarations, cards, weights and tokenizers are fetched: nothing that could run. What is
    fetched is read through, and refused if it is not whole.
    """
    quiet_transfers()
    from multicolm.cli.console import visible
    from multicolm.hub.kinds import pull

    done = pull(repository, folder, revision=revision)
    for warning in done.warnings:
        click.echo(visible(f"Warning: {warning}"), err=True)
    if as_json_:
        click.echo(as_json({"kind": done.kind, "folder": done.place}))
        return
    where = done.place if "/" in done.place else f"./{done.place}"
    click.echo(f"{repository}: {done.noun}, now in {where}; {_USES[done.kind].format(where)}")
