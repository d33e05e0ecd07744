"""What long work says on stderr: a bar or a clock on a terminal, lines in a file."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from multicolm.cli.console import visible

if TYPE_CHECKING:
    from multicolm.evaluation.answering import Progress as Row

__all__ = ["MinuteLog", "Pace", "Step", "row_step", "say", "text_bar", "work_bar", "working"]

Step = Callable[[float, float, str], None]
"""Called with how much is done, of how much, and what is being worked at."""

_PATIENCE_S = 2.0
"""How long work may be silent in a file."""

_drawing: list[Console] = []
"""Consoles on which something moves now, the innermost last."""


def say(text: str) -> None:
    """A line on stderr, above whatever moves there."""
    line = visible(text)
    # stderr may be closed, and then there is nobody to tell.
    with contextlib.suppress(OSError):
        if _drawing:
            _drawing[-1].print(Text(line))
        else:
            click.echo(line, err=True)


@contextmanager
def _drawn(*columns: Any) -> Iterator[Progress]:
    """Something that moves on the terminal, and is gone when it ends."""
    screen = Console(stderr=True, highlight=False)
    with Progress(*columns, console=screen, transient=True) as progress:
        _drawing.append(screen)
        try:
            yield progress
        finally:
            _drawing.pop()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is done while it lasts: with a clock on a terminal; in a file if it takes long."""
    if sys.stderr.isatty():
        with _drawn(SpinnerColumn(), TextColumn(what), TimeElapsedColumn()) as progress:
            progress.add_task("", total=None)
            yield
        return
    timer = threading.Timer(_PATIENCE_S, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def text_bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar for texts that are written, where it disturbs nothing.

    Not for a single text, and not where the texts themselves go to a terminal.

    Args:
        total: how many texts there will be.

    Yields:
        What to call whenever one is done.
    """
    if total < 2 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda: None
        return
    pace, done = Pace("texts"), 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with _drawn(*columns) as progress:
        task = progress.add_task("", total=total, pace="")

        def advance() -> None:
            nonlocal done
            done += 1
            progress.update(task, completed=done, pace=pace(done, total))

        yield advance


@contextmanager
def work_bar(unit: str, label: str = "") -> Iterator[Step]:
    """A bar for long work, with its rate and the time that is left; in a file a line a minute.

    Args:
        unit: what is counted, such as ``tokens``.
        label: what is being worked at until that is said.

    Yields:
        What to call whenever something is done. Of a total of 0 there is no bar, only the label.
    """
    if not sys.stderr.isatty():
        yield MinuteLog(unit, say)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=8 if Console(stderr=True).width < 100 else 20),
        TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
    )
    pace = Pace(unit)
    with _drawn(*columns) as progress:
        task = progress.add_task(visible(label), total=None, pace="")

        def step(done: float, total: float, label: str) -> None:
            said = f"{100 * done / total:.0f} %  {pace(done, total)}" if total else ""
            progress.update(
                task,
                completed=done,
                total=total or None,
                description=visible(label),
                pace=said.rstrip(),
            )

        yield step


def row_step(step: Step) -> Callable[[Row], None]:
    """Shows rows of a table by a bar: which of how many, and the time that all of them take.

    What an earlier run had answered already counts in no rate.
    """
    before = kept = 0

    def show(row: Row) -> None:
        nonlocal before, kept
        if not row.total:
            step(0, 0, row.row)
            return
        name = f"row {row.number} of {row.of}" if row.of else f"row {row.number}"
        done = (row.number - 1) * row.total + row.done
        if done > before + 1:
            kept += done - before
        before = done
        if row.of:
            step(done - kept, row.of * row.total - kept, f"{name}, {row.row}")
        else:
            step(row.done, row.total, f"{name}, {row.row}")

    return show


class Pace:
    """How fast work goes, and how long it will take.

    Args:
        unit: what is counted.
        clock: current time in seconds.
    """

    def __init__(self, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._unit = unit
        self._clock = clock
        self._begun_at = clock()
        self._begun_with = self._before = 0.0

    def __call__(self, done: float, total: float) -> str:
        """``12.1 questions/s, 2 min left``; empty as long as nothing is done."""
        now = self._clock()
        if done < self._before:  # The next one of several pieces of work.
            self._begun_at, self._begun_with = now, 0.0
        self._before = done
        if done <= self._begun_with or now <= self._begun_at:
            return ""
        rate = (done - self._begun_with) / (now - self._begun_at)
        left = (total - done) / rate
        ahead = f"{left / 60:,.0f} min" if left >= 60 else f"{left:.0f} s"
        return f"{rate:,.3g} {self._unit}/s, {ahead} left"


class MinuteLog:
    """Says in lines how far long work is, where a bar would fill a file.

    Args:
        unit: what is counted.
        write: takes a line.
        first: seconds until the first line, at least.
        every: seconds between two lines, at least.
        clock: current time in seconds.
    """

    def __init__(
        self,
        unit: str,
        write: Callable[[str], None],
        first: float = 5.0,
        every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit = unit
        self._write = write
        self._every = every
        self._clock = clock
        self._next = clock() + first
        self._pace = Pace(unit, clock)
        self._said = ""

    def __call__(self, done: float, total: float, label: str) -> None:
        """How much is done, of how much, and what is being worked at."""
        if not total:
            if label != self._said:
                self._write(f"{label} ...")
            self._said = label
            return
        pace = self._pace(done, total)
        if self._clock() < self._next or not pace:
            return
        self._next = self._clock() + self._every
        self._write(f"{label}: {done:,.0f} of {total:,.0f} {self._unit}, {pace}")
