"""The command ``multicolm``: one file per verb, imported when its verb is used.

Whatever a user can mend ends in one sentence on stderr and exit code 1 or 2; ``--debug`` adds the
traceback. Bugs keep theirs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click
from click.shell_completion import shell_complete

from multicolm.errors import MulticolmError, MulticolmWarning, unknown
from multicolm.version import __version__

__all__ = ["COMPLETE", "cli", "main"]

_VERBS = {
    "generate": "Write a text for each prompt.",
    "chat": "Talk with an ensemble.",
    "serve": "Serve an ensemble with an OpenAI-compatible API.",
    "score": "Keep the log-probabilities that every model gives to texts.",
    "rollout": "Label a score table by what becomes of the texts.",
    "compare": "Compare policies with each other and with every model alone.",
    "eval": "Evaluate policies on tasks of the lm-evaluation-harness.",
    "train": "Train a policy on a score table.",
    "tune": "Find the thresholds of a policy from data.",
    "push": "Push a router, an ensemble or a score table to the Hub.",
    "pull": "Pull one of them from the Hub.",
    "show": "Show what a checkpoint holds, its decision tree as text.",
    "ls": "List ensembles, policies and tasks that can be named.",
    "validate": "Check ensemble and policy files without loading a model.",
    "init": "Write an ensemble, a task and a policy to begin with.",
    "env": "Print what a bug report needs.",
    "version": "Print versions.",
    "completion": "Print what makes a shell complete verbs, options and names.",
}
"""Every verb and what it does, so that the help needs to import none of them."""

COMPLETE = "_MULTICOLM_COMPLETE"
"""The variable by which a shell asks for completions; click's convention."""

_ELSEWHERE = "; choose a place where you may write"
_NEXT = {
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EEXIST: "; choose another folder, or move away what is there",
    errno.ENOTDIR: "; choose another folder, or move away what is there",
    errno.ENOENT: "; check the path",
    errno.ENOSPC: "; make room, and repeat the command",
}
"""What to do next, by what the system says of a file."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def _debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and context.obj is not None:
        context.obj["debug"] = True


# Before the verb or after it: one adds it when something has gone wrong.
_DEBUG = click.Option(
    ["--debug"],
    is_flag=True,
    expose_value=False,
    callback=_debug,
    help="Show the traceback of an error.",
)


class _Verbs(click.Group):
    """The verbs, each in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"multicolm.cli.{cmd_name}").command
        command.name = cmd_name  # not that of the function, which is the same in every module
        if _DEBUG not in command.params:
            command.params.append(_DEBUG)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _VERBS:
            ctx.fail(f"{unknown('verb', args[0], _VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(
    cls=_Verbs,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`multicolm VERB --help` says more about each.",
)
@click.version_option(__version__, prog_name="multicolm", message="%(prog)s %(version)s")
def cli() -> None:
    """Several language models write one text together, token by token."""


cli.params.append(_DEBUG)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows ``multicolm``; the process's own arguments if not given.

    Returns:
        The exit code: 0, 1 or 2 for an error, 130 for Ctrl-C, 141 for a closed pipe.
    """
    _print_anything()
    state: dict[str, Any] = {"debug": False}
    try:
        with _warnings_in_one_line():
            code = _run(args, state)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _complain("Interrupted.", _INTERRUPTED)
    except MulticolmError as error:
        if state["debug"]:
            raise
        code = _complain(f"Error: {error}", error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            code = _BROKEN_PIPE
        elif state["debug"]:
            raise
        else:
            reason = error.strerror or str(error)
            place = f"{error.filename}: " if error.filename else ""
            advice = _NEXT.get(error.errno or 0, "")
            code = _complain(f"Error: {place}{reason[:1].lower()}{reason[1:]}{advice}.", 1)
        _forget_output()
    except Exception as error:
        from multicolm.cli.own_code import sentence_of

        sentence = None if state["debug"] else sentence_of(error)
        if sentence is None:
            raise
        code = _complain(f"Error: {sentence} (--debug shows more.)", 1)
    return code


def _run(args: Sequence[str] | None, state: dict[str, Any]) -> int:
    """Parse and call; everything but click's own complaints goes through to the caller."""
    try:
        shell = os.environ.get(COMPLETE, "")
        if shell:
            return shell_complete(cli, {"obj": state}, "multicolm", COMPLETE, shell)
        given = list(sys.argv[1:] if args is None else args)
        with cli.make_context("multicolm", given, obj=state) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings that are meant for users come without the place in the code."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, MulticolmWarning):
                _complain(f"Warning: {message}", 0)
            else:
                plain(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _complain(text: str, code: int) -> int:
    from multicolm.cli.progress import say

    say(text)
    return code


def _print_anything() -> None:
    """A terminal that cannot show a character shows its escape instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Drop what cannot be written, or Python complains of it once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
