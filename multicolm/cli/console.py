"""What the terminal shows: coloured traces, their legend, and tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from multicolm.types import MIXTURE, Answer, Piece, Trace, Usage

__all__ = ["Screen", "console", "print_table", "print_usage", "visible"]

# The base model keeps the terminal's own colour, so that what was handed over stands out.
_COLOURS = ("default", "cyan", "magenta", "yellow", "green", "blue", "red")
_MIXTURE_COLOUR = "bright_black"

_SHORT = 16  # characters of a cell that is kept on one line

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def console(*, stderr: bool = False) -> Console:
    """A console that is as wide as its lines wherever it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 10_000
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def visible(text: str) -> str:
    r"""Text with control characters as escapes, so that a terminal does not act on them.

    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Screen:
    """Shows texts on stdout while they are written, and who wrote what if that is wanted.

    With colours the writers have one each, and a legend follows the text. Without them every
    stretch begins with its writer's name, ``[facts] willow``.

    Args:
        models: the ensemble's names, the base model first.
        trace: whether to show who wrote what.
    """

    def __init__(self, models: Sequence[str], *, trace: bool) -> None:
        self.trace = trace
        self._console = console()
        self._terminal = self._console.is_terminal
        self._styles = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(models)}
        self._styles[MIXTURE] = _MIXTURE_COLOUR
        self._writer: str | None = None

    @property
    def coloured(self) -> bool:
        """Whether the trace shows by colours: not in a file, and not where NO_COLOR is set."""
        console = self._console
        return console.is_terminal and not console.no_color and console.color_system is not None

    def show(self, piece: Piece) -> None:
        """Append a piece of text."""
        text = visible(piece.text) if self._terminal else piece.text
        if self.trace and self.coloured:
            shown = Text(text, style=self._styles[piece.model])
            self._console.print(shown, end="", soft_wrap=True)
        else:
            if self.trace and piece.model != self._writer:
                text = f"[{piece.model}]{text}"
            self._console.file.write(text)
        self._console.file.flush()
        self._writer = piece.model

    def text(self, trace: Trace) -> Text:
        """A finished text, every token in its writer's colour."""
        shown = Text()
        for token in trace:
            shown.append(visible(token.text), style=self._styles[token.model])
        return shown

    def end(self, answer: Answer | None) -> None:
        """End the text, with the legend if there are colours; ``None`` if it was broken off."""
        self._console.file.write("\n")
        self._writer = None
        if answer is not None and self.trace and self.coloured:
            self._console.print(self.legend([answer]), soft_wrap=True)

    def legend(self, answers: Sequence[Answer]) -> Text:
        """Each writer in its colour, with how many of the tokens it wrote."""
        parts = [Text("tokens by", style="dim")]
        for name, style in self._styles.items():
            n_written = sum(token.model == name for answer in answers for token in answer.trace)
            if n_written:
                parts.append(Text(f"{name} {n_written}", style=style))
        return Text("  ").join(parts)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, stderr: bool = False
) -> None:
    """A plain table; columns of numbers are right-aligned, and nothing trails a line."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    cells = [[visible(str(cell)) for cell in row] for row in rows]
    for column, heading in enumerate(headings):
        numbers = bool(cells) and all(row[column][:1].isdigit() for row in cells)
        longest = max((len(row[column]) for row in cells), default=0)
        table.add_column(
            heading,
            justify="right" if numbers else "left",
            no_wrap=column == 0,
            min_width=longest if longest <= _SHORT else None,  # only its heading may be broken
        )
    for row in cells:
        table.add_row(*map(Text, row))
    screen = console(stderr=stderr)
    with screen.capture() as caught:
        screen.print(table)
    screen.file.writelines(f"{line.rstrip()}\n" for line in caught.get().splitlines())


def print_usage(usage: Mapping[str, Usage], n_mixed: int = 0) -> None:
    """On stderr: per model what it did, and all of them together.

    Args:
        usage: by model name.
        n_mixed: tokens that several models wrote together.
    """
    total = sum(usage.values(), Usage())
    rows = dict(usage)
    if n_mixed:
        rows[MIXTURE] = Usage(tokens_written=n_mixed)
    rows["all"] = total + Usage(tokens_written=n_mixed)
    n_written = max(1, rows["all"].tokens_written)
    headings = ["model", "tokens written", "share", "forward passes", "tokens read", "seconds"]
    calls = ["calls"] if total.calls else []  # of models in this process there are none
    print_table(
        headings + calls,
        [
            [
                name,
                used.tokens_written,
                f"{100 * used.tokens_written / n_written:.0f} %",
                used.forwards,
                used.tokens_read,
                f"{used.seconds:.3f}",
                *([used.calls] if calls else []),
            ]
            for name, used in rows.items()
        ],
        stderr=True,
    )
