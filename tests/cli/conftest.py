"""The command line, called in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import multicolm
from multicolm.backend.table import TableModel
from multicolm.cli import main
from multicolm.ensemble import Ensemble

TOKENS = ["a", "b", "\x1b[31m", "[bold]", "\n", "<end>"]


@dataclass(frozen=True)
class Result:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command with arguments, and with bytes on standard input."""

    def call(*args: str, stdin: bytes = b"") -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main(args)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny() -> Ensemble:
    return multicolm.load("tiny")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny: Ensemble) -> Ensemble:
    """The embedded ensemble, loaded once for all tests."""
    monkeypatch.setattr(multicolm, "load", lambda source: tiny)
    return tiny


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch) -> Ensemble:
    """An ensemble under the name of the embedded one, whose text a terminal would act on."""
    loud = {"": {"a": 1.0}, "a": {"\x1b[31m": 1.0}, "\x1b[31m": {"[bold]": 1.0}}
    loud |= {"[bold]": {"b": 1.0}, "b": {"<end>": 1.0}}
    silent = {"": {"<end>": 1.0}}
    tables = {"generalist": loud, "facts": silent, "math": silent}
    ensemble = Ensemble(
        [TableModel(name, TOKENS, table, ["<end>"]) for name, table in tables.items()]
    )
    monkeypatch.setattr(multicolm, "load", lambda source: ensemble)
    return ensemble


@pytest.fixture
def interrupted() -> type[Interrupted]:
    return Interrupted


class Interrupted:
    """A stream that Ctrl-C breaks off after some pieces."""

    def __init__(self, pieces: list[multicolm.Piece], answers: list[multicolm.Answer]) -> None:
        self._pieces = pieces
        self.answers = answers

    def __iter__(self):
        yield from self._pieces
        raise KeyboardInterrupt

    def finished(self):
        yield from enumerate(self.answers)
        raise KeyboardInterrupt
