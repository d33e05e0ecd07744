"""``multicolm completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from multicolm.cli.options import examples

__all__ = ["command"]


@click.command(
    epilog=examples(
        "completion bash >> ~/.bashrc",
        "completion zsh >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/multicolm.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what makes SHELL complete verbs, options, and names of the catalogue.

    Add it to the file that your shell reads when it starts, and open a new shell. Bash 4.4 or newer
    is needed.
    """
    from multicolm.cli import COMPLETE, cli

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(cli, {}, "multicolm", COMPLETE).source())
