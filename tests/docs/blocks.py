"""Code blocks of README and docs/, and how each kind of them is run.

A page's blocks run in their order, in a folder of the page's own:

- ``console``: lines that begin with ``$`` are commands; what follows one is what it prints, ``...``
  for what differs from run to run. ``multicolm serve`` runs on until the page ends, and later
  blocks reach it at the address that it got.
- ``python``: run in one namespace per page.
- a block with a title is written into a file of that name, and YAML in it is validated.
- a block after ``<!-- not run: REASON -->`` is only read.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import tomllib
import yaml

__all__ = ["PAGES", "ROOT", "Block", "Runner", "blocks_of"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_READ = {"console", "json", "jsonl", "python", "sh", "text", "yaml"}
_SERVED = "http://127.0.0.1:8000"
_SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Attributes:
        place: page and line, for messages.
        kind: what is written after the fence.
        title: the file that it is, if any.
        text: without the fences.
        reason: why it is not run; empty if it is.
    """

    place: str
    kind: str
    title: str
    text: str
    reason: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command with what it is said to print; a backslash carries on a line."""
        found: list[tuple[str, str]] = []
        for line in self.text.replace("\\\n", "").splitlines(keepends=True):
            if line.startswith("$ "):
                found.append((line[2:].strip(), ""))
            else:
                assert found, f"{self.place}: output before any command"
                found[-1] = (found[-1][0], found[-1][1] + line)
        return found


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    found = []
    for match in _BLOCK.finditer(text):
        place = f"{name}:{text.count(chr(10), 0, match.start('kind')) + 1}"
        groups = match.groupdict(default="")
        block = Block(place, groups["kind"], groups["title"], groups["text"], groups["reason"])
        assert block.kind in _READ, f"{place}: a block of kind '{block.kind}'"
        found.append(block)
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{name}: a block without a kind, or an indented one"
    return found


class Runner:
    """Runs the blocks of one page in a folder."""

    def __init__(self, folder: Path, page: Path) -> None:
        self._folder = folder
        self._served = _SERVED
        self._open = ExitStack()
        # Where classes of the page say that they are from.
        self._module = types.ModuleType(f"docs_{page.stem.replace('-', '_')}")
        sys.modules[self._module.__name__] = self._module

    def run(self, block: Block) -> None:
        """Do what the block says, or fail."""
        text = block.text.replace(_SERVED, self._served)
        if block.title:
            self._write(block)
        elif block.kind == "json":
            json.loads(text)
        elif block.kind == "yaml":
            yaml.safe_load(text)
        elif block.reason or block.kind == "text":
            return
        elif block.kind == "python":
            exec(compile(text, block.place, "exec"), self._module.__dict__)
        elif block.kind == "console":
            for command, shown in block.commands:
                self._command(command.replace(_SERVED, self._served), shown, block.place)
        else:
            raise AssertionError(f"{block.place}: say why it is not run")

    def close(self) -> None:
        """End the page's server."""
        self._open.close()
        del sys.modules[self._module.__name__]

    def _write(self, block: Block) -> None:
        file = self._folder / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, encoding="utf-8")
        if block.kind == "yaml" and not block.reason:
            done = forked.command(["validate", block.title], self._folder)
            assert done.returncode == 0, (block.place, done.stderr)
        if block.kind == "jsonl":
            for line in block.text.splitlines():
                json.loads(line)

    def _command(self, command: str, shown: str, place: str) -> None:
        words = shlex.split(command)
        if words[:2] == ["multicolm", "serve"]:
            self._served = self._open.enter_context(_server(words[1:], self._folder))
        elif words[0] == "multicolm":
            done = forked.command(words[1:], self._folder)
            assert done.returncode == 0, (place, command, done.stderr)
            _check(shown, done.stdout, f"{place}: {command}")
        elif words[0] == "curl":
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, (place, done.stderr)
            _check(shown, done.stdout, f"{place}: {command}")
        elif words[0] == "python":
            done = forked.program(ROOT / words[1], *words[2:])
            assert done.returncode == 0, (place, command, done.stderr)
        else:
            _CHECKED[words[0]](words)


def _check(shown: str, printed: str, place: str) -> None:
    assert printed.strip(), place
    same = doctest.OutputChecker().check_output(shown, printed, _SAME)
    assert not shown.strip() or same, f"{place}\nshown:\n{shown}\nprinted:\n{printed}"


@contextmanager
def _server(arguments: list[str], folder: Path) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    server = forked.start([*arguments, "--port", "0"], folder)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", server.complaints)):
            assert not server.has_ended and time.monotonic() < end, server.complaints
            time.sleep(0.05)
        yield found.group()
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.end()


def _make(words: list[str]) -> None:
    """A target that exists; tests of their own run what it does."""
    done = subprocess.run([*words, "-n"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _script(words: list[str]) -> None:
    """A script that is there; `test_examples.py` runs it."""
    assert (ROOT / words[1]).is_file(), words


def _pip(words: list[str]) -> None:
    """Extras that pyproject.toml has."""
    extras = _project()["optional-dependencies"]
    for name in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(name.split(",")) <= set(extras), words


def _project() -> Mapping[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


_CHECKED = {"make": _make, "sh": _script, "pip": _pip}


def checkout(folder: Path) -> Path:
    """A folder like a checkout, but for what is written, and every eighth training question."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "policies").symlink_to(ROOT / "policies")
    registry = folder / "registry"
    for path in sorted((ROOT / "registry/tiny").iterdir()):
        if path.name != "questions":
            (registry / "tiny").mkdir(parents=True, exist_ok=True)
            (registry / "tiny" / path.name).symlink_to(path)
    questions = registry / "tiny/questions"
    shutil.copytree(ROOT / "registry/tiny/questions", questions)
    lines = (questions / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (questions / "train.jsonl").write_text("".join(lines[::8]), encoding="utf-8")
    return folder
