"""``multicolm serve``."""

from __future__ import annotations

import click

from multicolm.cli.options import load
from multicolm.errors import ConfigError, InputError

__all__ = ["command"]


@click.command
@click.argument("ensemble")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--name", help="What clients call it. [default: ENSEMBLE without folder and ending]")
@click.option(
    "--allow-policy",
    "allowed",
    metavar="NAME[=SOURCE]",
    multiple=True,
    help="A policy that clients may choose: a preset, or NAME=FOLDER for one of yours; `default` "
    "allows no other than the ensemble's own. Repeatable. [default: every preset that fits]",
)
@click.option(
    "--api-key",
    envvar="MULTICOLM_API_KEY",
    show_envvar=True,
    help="What clients must show. Others on this machine can read it here; the variable is better.",
)
@click.option("--max-body", default=1_000_000, show_default=True, help="Bytes of a request.")
@click.option("--max-new-tokens", default=1024, show_default=True, help="The most of a text.")
@click.option(
    "--max-concurrent", default=16, show_default=True, help="Texts that are written at a time."
)
@click.option(
    "--max-waiting", default=64, show_default=True, help="More of them that may wait; then 429."
)
@click.option(
    "--grace", default=10.0, show_default=True, help="Seconds to finish what runs at the end."
)
def command(
    ensemble: str,
    host: str,
    port: int,
    name: str | None,
    allowed: tuple[str, ...],
    api_key: str | None,
    max_body: int,
    max_new_tokens: int,
    max_concurrent: int,
    max_waiting: int,
    grace: float,
) -> None:
    """Serve ENSEMBLE over HTTP, as OpenAI's interface does, and with a page to try it on.

    Clients choose a policy by the model's name: NAME, NAME:confidence, or NAME:confidence@0.3 with
    another threshold. Ctrl-C ends it.
    """
    try:
        from multicolm.serving.app import Limits
        from multicolm.serving.server import Server, Settings
    except ImportError as error:
        raise ConfigError(
            f"`multicolm serve` needs the library {error.name}: pip install 'multicolm[serve]'."
        ) from error
    if api_key == "":
        raise InputError("the API key is empty; give a long random one, or none at all.")
    if not 0 <= grace < 86_400:
        raise InputError(f"--grace must be 0 seconds or more, and less than a day; got {grace:g}.")
    settings = Settings(
        host,
        port,
        api_key,
        allowed or None,
        Limits(max_body, max_new_tokens),
        max_concurrent,
        max_waiting,
        grace,
    )
    loaded, _ = load(ensemble, None, ())
    served = _name(ensemble) if name is None else name

    server = Server(loaded, served, settings)

    def ready() -> None:
        click.echo(f"{served} is served at {server.address}; Ctrl-C ends it.", err=True)
        click.echo(f"models: {', '.join(server.menu.ids())}", err=True)
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("Anybody who reaches this address may ask: set MULTICOLM_API_KEY.", err=True)

    closing = server.run(ready)
    click.echo(
        f"ended; finished meanwhile: {closing.finished}, broken off: {closing.broken_off}.",
        err=True,
    )


def _name(source: str) -> str:
    """``tiny``, ``./runs/duo.yaml`` and ``runs/duo/`` as clients call them."""
    from pathlib import Path

    path = Path(source).expanduser().absolute()
    return path.parent.name if path.name == "ensemble.yaml" else path.name.removesuffix(".yaml")
