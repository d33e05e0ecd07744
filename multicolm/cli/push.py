"""``multicolm push``."""

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


@click.command(
    epilog=examples(
        "push runs/co-llm organisation/router",
    )
)
@click.argument("path")
@click.argument("repository")
@click.option("--public", is_flag=True, help="Make a new repository public; private otherwise.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to.")
@click.option("--message", help="Commit message.")
@click.option("--with-models", is_flag=True, help="Push an ensemble's local models too.")
@click.option(
    "--results",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Comparison whose table an ensemble's card shows.",
)
@click.option("--license", "license_", default="", help="License of an ensemble or a score table.")
@json_option
def command(
    path: str,
    repository: str,
    public: bool,
    revision: str | None,
    message: str | None,
    with_models: bool,
    results: Path | None,
    license_: str,
    as_json_: bool,
) -> None:
    """Push PATH to REPOSITORY on the Hugging Face Hub, with a card.

    PATH is a router (a folder that `multicolm train` wrote), a score table (that `multicolm score`
    wrote), or an ensemble: its file, its folder, or its name. `hf auth login` says who you are.
    """
    quiet_transfers()
    from multicolm.hub.kinds import push

    done = push(
        path,
        repository,
        private=not public,
        revision=revision,
        message=message,
        with_models=with_models,
        results=results,
        license=license_,
    )
    if as_json_:
        click.echo(as_json({"kind": done.kind, "url": done.place}))
    else:
        click.echo(f"{path}: {done.noun}, now at {done.place}")
