"""``multicolm version``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import click

from multicolm.cli.options import (
    as_json,
    examples,
    json_option,
)
from multicolm.version import __version__

__all__ = ["command", "versions"]

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic")


def versions() -> dict[str, str | None]:
    """Version by name of what decides how multicolm behaves; ``None`` for what is missing."""
    found: dict[str, str | None] = {"multicolm": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            # Reading what pip wrote down is a thousand times faster than importing torch.
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@click.command(
    epilog=examples(
        "version --json",
    )
)
@json_option
def command(as_json_: bool) -> None:
    """Print the versions of multicolm and of its dependencies."""
    found = versions()
    if as_json_:
        click.echo(as_json(found))
        return
    for name, number in found.items():
        click.echo(f"{name:<13} {number or 'not installed'}")
