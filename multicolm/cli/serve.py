"""``multicolm serve``."""

from __future__ import annotations

import json
import os
import shlex
import textwrap
from shutil import get_terminal_size

import click

from multicolm.cli.options import (
    Real,
    Whole,
    ensemble_argument,
    examples,
    load,
)
from multicolm.errors import ConfigError
from multicolm.keys import check_key

__all__ = ["command"]

_KEY_VARIABLE = "MULTICOLM_API_KEY"


@click.command(
    epilog=examples(
        "serve tiny",
        "serve duo.yaml --port 8080 --allow-policy mine=./runs/co-llm",
    )
)
@ensemble_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=Whole(0, 65536))
@click.option(
    "--name", help="Model name for clients. [default: ENSEMBLE without folder and ending]"
)
@click.option(
    "--allow-policy",
    "allowed",
    metavar="NAME[=SOURCE]",
    multiple=True,
    help="A policy that clients may choose: a preset, or NAME=FOLDER for one of yours; `default` "
    "allows only the ensemble's own. Repeatable. [default: every preset that fits]",
)
@click.option(
    "--api-key",
    help="API key that clients must send. Other users of this machine can read it here; prefer the "
    f"environment variable {_KEY_VARIABLE}.",
)
@click.option(
    "--max-body",
    type=Whole(1),
    default=1_000_000,
    show_default=True,
    help="Maximum bytes of a request body.",
)
@click.option(
    "--max-new-tokens",
    type=Whole(1),
    default=1024,
    show_default=True,
    help="Maximum new tokens of a text.",
)
@click.option(
    "--max-concurrent",
    type=Whole(1, 1 << 16),
    default=16,
    show_default=True,
    help="Texts decoded together.",
)
@click.option(
    "--max-waiting",
    type=Whole(0, 1 << 24),
    default=64,
    show_default=True,
    help="Requests that may wait; further ones get 429.",
)
@click.option(
    "--grace",
    type=Real(least=0, most=86_400),
    default=10.0,
    show_default=True,
    help="Seconds that running texts get at shutdown.",
)
@click.option(
    "--access-log/--no-access-log",
    default=True,
    show_default=True,
    help="Print a line for each request.",
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
    access_log: bool,
) -> None:
    """Serve ENSEMBLE over HTTP with an OpenAI-compatible API, and a web page for trying it.

    Clients choose a policy by the model's name: NAME, NAME:confidence, or NAME:confidence@0.3 with
    another threshold. Ctrl-C ends it.
    """
    try:
        from multicolm.serving.limits import Limits
        from multicolm.serving.server import Server, Settings
    except ImportError as error:
        raise ConfigError(
            f"`multicolm serve` needs the library {error.name}: pip install 'multicolm[serve]'."
        ) from error
    api_key = _checked_key(api_key)
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
        click.echo(f"page: {server.address}/", err=True)
        click.echo(f"try:  {_curl(server.address, served, api_key is not None)}", err=True)
        models = f"models: {', '.join(server.catalog.ids())}"
        # A name that is cut in two cannot be copied.
        lines = textwrap.wrap(models, get_terminal_size().columns, break_on_hyphens=False)
        click.echo("\n".join(lines), err=True)
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("Anybody who reaches this address may ask: set MULTICOLM_API_KEY.", err=True)

    if access_log:
        _log_requests()
    closing = server.run(ready)
    click.echo(
        f"ended; finished meanwhile: {closing.finished}, broken off: {closing.broken_off}.",
        err=True,
    )


def _curl(address: str, model: str, needs_key: bool) -> str:
    """A command that asks the server for a chat completion."""
    message = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    key = f' -H "Authorization: Bearer ${_KEY_VARIABLE}"' if needs_key else ""
    return (
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(message))}"
    )


def _log_requests() -> None:
    """Print a line for each request: when, from where, what, and the status."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def _checked_key(option: str | None) -> str | None:
    """The key of the option or else of the variable; ``None`` only where neither is there.

    Click takes an empty variable for none, and then anybody could ask.

    Raises:
        ConfigError: if it is empty, or no key.
    """
    if option is not None:
        return check_key(option, "--api-key", "leave it out to let anybody ask")
    key = os.environ.get(_KEY_VARIABLE)
    if key is None:
        return None
    return check_key(
        key, f"the environment variable {_KEY_VARIABLE}", "unset it to let anybody ask"
    )


def _name(source: str) -> str:
    """``tiny``, ``./runs/duo.yaml`` and ``runs/duo/`` as clients call them."""
    from pathlib import Path

    path = Path(source).expanduser().absolute()
    return path.parent.name if path.name == "ensemble.yaml" else path.name.removesuffix(".yaml")
