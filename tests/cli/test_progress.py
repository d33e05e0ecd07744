"""What long work says on a terminal and in a file."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from multicolm.cli import progress
from multicolm.cli.progress import Pace, row_step, say, work_bar, working
from multicolm.evaluation.answering import Progress


@contextmanager
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Let stderr be a terminal of 80 columns; gives what it was sent so far."""
    leader, follower = pty.openpty()
    stream = os.fdopen(follower, "w")
    # In the test itself: between fixtures and tests pytest puts its own stream there.
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    os.set_blocking(leader, False)
    shown = b""

    def read() -> str:
        nonlocal shown
        stream.flush()
        try:
            while part := os.read(leader, 65536):
                shown += part
        except BlockingIOError:
            pass
        return shown.decode()

    yield read
    stream.close()
    os.close(leader)


def left_on(shown: str) -> list[str]:
    """The lines of a terminal after all that it was sent: text, erased lines, moves up."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_lines_stand_above_the_bar_and_nothing_of_it_is_left(monkeypatch) -> None:
    with a_terminal(monkeypatch) as terminal:
        with work_bar("answers", "asking") as step:
            step(3, 12, "row 1 of 2, average")
            say("word " * 20)
            step(9, 12, "row 2 of 2, average")
            say("the second line")
        shown = terminal()
    assert "row 2 of 2, average" in shown and "75 %" in shown
    assert left_on(shown) == [("word " * 16).strip(), ("word " * 4).strip(), "the second line"]


def test_nothing_of_a_bar_is_left_above_an_error(monkeypatch) -> None:
    with a_terminal(monkeypatch) as terminal:
        with pytest.raises(KeyError), work_bar("tokens") as step:
            step(1, 10, "scoring")
            raise KeyError
        assert left_on(terminal()) == []


def test_what_takes_a_while_has_a_clock_on_a_terminal_and_is_gone_after(monkeypatch) -> None:
    with a_terminal(monkeypatch) as terminal:
        with working("loading 3 models"):
            shown = terminal()
        assert "loading 3 models" in shown and "0:00:00" in shown
        assert left_on(terminal()) == []


def test_in_a_file_only_what_is_silent_for_long_says_what_it_does(capfd, monkeypatch) -> None:
    with working("loading 3 models"):
        pass
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    with working("loading 3 models"):
        while not (err := capfd.readouterr().err):
            pass
    assert err == "loading 3 models ...\n"


def test_a_pace_leaves_out_what_was_there_before() -> None:
    now = 0.0
    pace = Pace("texts", lambda: now)
    assert pace(0, 100) == ""
    now = 10.0
    assert pace(20, 100) == "2 texts/s, 40 s left"
    now = 20.0
    assert pace(5, 700) == ""  # the next piece of work
    now = 30.0
    assert pace(10, 700) == "1 texts/s, 12 min left"


def test_rows_are_counted_and_the_time_left_is_that_of_all() -> None:
    seen: list[tuple[float, float, str]] = []
    show = row_step(lambda *step: seen.append(step))
    for number, row in enumerate(("one", "two"), start=1):
        for done in range(3):
            show(Progress(row, done, 2, None, number=number, of=2))
    show(Progress("writing the report", 0, 0, None))
    assert seen[0] == (0, 4, "row 1 of 2, one")
    assert seen[2] == (2, 4, "row 1 of 2, one") and seen[3] == (2, 4, "row 2 of 2, two")
    assert seen[5] == (4, 4, "row 2 of 2, two")
    assert seen[6] == (0, 0, "writing the report")


def test_answers_that_an_earlier_run_kept_are_no_work_of_this_one() -> None:
    seen: list[tuple[float, float, str]] = []
    show = row_step(lambda *step: seen.append(step))
    for row in (
        Progress("one", 8, 8, 1.0, True, 1, 2),
        Progress("two", 4, 8, None, False, 2, 2),
        Progress("two", 5, 8, None, False, 2, 2),
    ):
        show(row)
    assert [step[:2] for step in seen] == [(0, 8), (0, 4), (1, 4)]
