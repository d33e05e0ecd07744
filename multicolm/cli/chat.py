"""``multicolm chat``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from multicolm.cli.options import (
    as_json,
    ensemble_argument,
    examples,
    json_option,
    load,
    policy_options,
    writing_options,
)
from multicolm.errors import InputError, MulticolmError
from multicolm.types import Message

if TYPE_CHECKING:
    from multicolm.decoding.streaming import Stream
    from multicolm.ensemble import Ensemble
    from multicolm.policy.base import Policy

__all__ = ["command"]

_HELP = "/policy NAME changes who writes, /trace shows who wrote what, /reset forgets, /quit ends."


@dataclass
class _Talk:
    """A conversation and how its answers are written."""

    ensemble: Ensemble
    policy: Policy
    settings: dict[str, Any]
    trace: bool
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> Stream:
        """Begin the answer to ``text``; the conversation is as before until it is kept."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        return self.ensemble.stream([asked], self.policy, **self.settings)

    def keep(self, text: str, answer: str) -> None:
        """Make a message and its answer part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        self.messages.append({"role": "assistant", "content": answer})

    def obey(self, line: str) -> bool:
        """Do what a line that begins with ``/`` says; false if it says to end.

        Raises:
            MulticolmError: if there is no such command or policy.
        """
        word, _, rest = line.partition(" ")
        if word == "/policy" and rest.strip():
            self.policy = self.ensemble.resolve(rest.strip())
            click.echo(f"policy: {self.policy.name}")
        elif word == "/trace":
            self.trace = not self.trace
            click.echo(f"trace: {'on' if self.trace else 'off'}")
        elif word == "/reset":
            self.messages.clear()
            click.echo("forgotten")
        elif word == "/help":
            click.echo(_HELP)
        elif word != "/quit":
            raise InputError(f"'{line}' is no command. {_HELP}")
        return word != "/quit"


@click.command(
    epilog=examples(
        "chat tiny --trace",
    )
)
@ensemble_argument
@policy_options
@writing_options
@click.option("--trace", is_flag=True, help="Show which model wrote each token.")
@json_option
def command(
    ensemble: str,
    policy: str | None,
    pairs: tuple[str, ...],
    settings: dict[str, Any],
    trace: bool,
    as_json_: bool,
) -> None:
    """Talk with ENSEMBLE.

    Every model reads the conversation through its own chat template. Ctrl-C stops an answer,
    Ctrl-D or /quit ends. With --json, every line of standard input is one message, and every
    answer one line.
    """
    loaded, chosen = load(ensemble, policy, pairs)
    talk = _Talk(loaded, chosen, settings, trace)
    if as_json_:
        _answer_lines(talk)
    else:
        _converse(talk)


def _answer_lines(talk: _Talk) -> None:
    for text in _lines():
        stream = talk.ask(text)
        for _ in stream:
            pass
        [answer] = stream.answers
        talk.keep(text, answer.content)
        click.echo(as_json(answer.as_json()))


def _lines() -> Iterator[str]:
    """Lines of standard input that are not blank.

    Raises:
        InputError: if one is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"standard input:{number}: not UTF-8 text; convert it first."
            raise InputError(message) from error
        if text:
            yield text


def _converse(talk: _Talk) -> None:
    from multicolm.cli.console import visible

    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none; lines can be edited elsewhere.
            import readline  # noqa: F401
        click.echo(f"{', '.join(talk.ensemble.models)}. {_HELP}")
    while (text := _next(interactive)) is not None:
        try:
            if text.startswith("/"):
                if not talk.obey(text):
                    return
            elif text:
                _answer(talk, text)
        except MulticolmError as error:
            click.echo(visible(f"Error: {error}"), err=True)


def _next(interactive: bool) -> str | None:
    """The next line, ``None`` at the end of the input; Ctrl-C empties the line."""
    try:
        if interactive:
            return input("> ").strip()
        return next(_lines(), None)
    except EOFError:
        click.echo()
        return None
    except UnicodeDecodeError as error:
        raise InputError("that was not UTF-8 text.") from error
    except KeyboardInterrupt:
        click.echo("\n(Ctrl-D or /quit ends.)")
        return ""


def _answer(talk: _Talk, text: str) -> None:
    """Write one answer; Ctrl-C keeps what there is of it."""
    from multicolm.cli.console import Screen

    stream = talk.ask(text)
    screen = Screen(talk.ensemble.models, trace=talk.trace)
    written = []
    try:
        for piece in stream:
            if piece.kind == "answer":  # templates of thinking models leave out what they thought
                written.append(piece.text)
            screen.show(piece)
        screen.end(stream.answers[0])
    except KeyboardInterrupt:
        screen.end(None)
        click.echo("(stopped)")
    talk.keep(text, "".join(written))
