"""``multicolm validate``."""

from __future__ import annotations

import click

from multicolm.cli.options import as_json, json_option

__all__ = ["command"]


@click.command
@click.argument("sources", metavar="FILE_OR_NAME...", nargs=-1, required=True)
@json_option
@click.pass_context
def command(ctx: click.Context, sources: tuple[str, ...], as_json_: bool) -> None:
    """Check ensembles and policies without loading a model.

    What was checked is printed. Nothing is fetched, so models of the Hub are not looked up.
    """
    from multicolm.config import validate

    reports = [validate(source) for source in sources]
    for report in reports:
        if as_json_:
            click.echo(as_json(report.as_json()))
            continue
        click.echo(f"{report.source}: {'not right' if report.errors else 'right'}")
        for sign, lines in (
            ("checked", report.checked),
            ("warning", report.warnings),
            ("error", report.errors),
        ):
            for line in lines:
                click.echo(f"  {sign}  {line}")
    if any(report.errors for report in reports):
        ctx.exit(2)
