"""YAML that remembers the place of everything.

Files hold plain values only: no tags, no aliases, no key twice. Every complaint is one line,
``file:line:column: place: what is wrong, what was allowed``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from multicolm.config.wording import Place, Problem, show
from multicolm.errors import ConfigError, UnknownNameError

__all__ = ["Document", "check_length", "read_text"]

Mark: TypeAlias = tuple[int, int]
"""Line and column, both from 1."""


@dataclass
class Document:
    """A file's values and where they are.

    Attributes:
        origin: the file, as messages name it.
        data: its values.
    """

    origin: str
    data: dict[str, Any] = field(default_factory=dict)
    _keys: dict[Place, Mark] = field(default_factory=dict)
    _values: dict[Place, Mark] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, origin: str) -> Document:
        """Read YAML text.

        Raises:
            ConfigError: if it is no YAML, no mapping, or uses what is not allowed here.
        """
        document = cls(origin)
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is None:
                raise ConfigError(f"{origin}: the file is empty.")
            document.data = document._value(node, (), loader)
        except yaml.MarkedYAMLError as error:
            where, problem = _place_of(error, text)
            raise ConfigError(f"{origin}{where}: not readable as YAML: {problem}.") from error
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{origin}: not readable as YAML: {reason}.") from error
        except RecursionError as error:
            raise ConfigError(f"{origin}: nested too deeply.") from error
        if not isinstance(document.data, dict):
            shown = show(document.data)
            raise ConfigError(f"{origin}:1:1: must be a mapping (`key: value`), got {shown}.")
        return document

    def error(self, problems: Sequence[Problem]) -> ConfigError:
        """All problems as one error, one per line, in the order of the file."""

        def order(problem: Problem) -> Mark:
            return self._mark(problem) or (0, 0)

        lines = [self._line(problem) for problem in sorted(problems, key=order)]
        only_names = all(problem.unknown_name for problem in problems)
        return (UnknownNameError if only_names else ConfigError)("\n".join(lines))

    def _line(self, problem: Problem) -> str:
        mark = self._mark(problem)
        where = f"{self.origin}:{mark[0]}:{mark[1]}" if mark else self.origin
        dotted = ".".join(map(str, problem.place))
        return f"{where}: {dotted}: {problem.text}" if dotted else f"{where}: {problem.text}"

    def _mark(self, problem: Problem) -> Mark | None:
        place = problem.place
        if problem.at_key and place in self._keys:
            return self._keys[place]
        while place and place not in self._values:
            place = place[:-1]
        return self._values.get(place)

    def _value(self, node: yaml.Node, place: Place, loader: yaml.SafeLoader) -> Any:
        self._values.setdefault(place, _mark(node))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self._key(key_node, place, loader)
                if key in mapping:
                    text = f"this key is in line {self._keys[(*place, key)][0]} already."
                    raise self._refuse(key_node, (*place, key), text)
                self._keys[(*place, key)] = _mark(key_node)
                mapping[key] = self._value(value_node, (*place, key), loader)
            return mapping
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._value(n, (*place, i), loader) for i, n in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            try:
                return loader.construct_object(node)
            except ValueError as error:
                text = f"'{node.value[:40]}' cannot be read: {error}."
                raise self._refuse(node, place, text) from error
        raise self._refuse(node, place, f"the tag {node.tag} is not allowed; write plain values.")

    def _key(self, node: yaml.Node, place: Place, loader: yaml.SafeLoader) -> str:
        if isinstance(node, yaml.ScalarNode) and node.value == "<<":
            raise self._refuse(node, place, "merge keys (`<<`) are not allowed; write them out.")
        key = self._value(node, (*place, "?"), loader)
        del self._values[(*place, "?")]
        if not isinstance(key, str):
            text = f"a key must be text, got {show(key)}; put it in quotes."
            raise self._refuse(node, place, text)
        return key

    def _refuse(self, node: yaml.Node, place: Place, text: str) -> ConfigError:
        line, column = _mark(node)
        dotted = ".".join(map(str, place))
        return ConfigError(
            f"{self.origin}:{line}:{column}: {dotted + ': ' if dotted else ''}{text}"
        )


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases; reads ``1e-3`` as a number, as YAML 1.2 does."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (`*name`) are not allowed; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")} | {
    # Read as a date, so that the complaint can say "put it in quotes".
    "tag:yaml.org,2002:timestamp",
}


def _place_of(error: yaml.MarkedYAMLError, text: str) -> tuple[str, str]:
    """Where a mistake is, as ``:line:column``, and what it is.

    A parser notices what is not closed, or lacks a colon, in a line after it.
    """
    mark, begin, problem = error.problem_mark, error.context_mark, str(error.problem)
    if mark is None:
        return "", problem
    if begin is not None and begin.line < mark.line and "block" not in str(error.context):
        problem = f"what begins here does not end: {problem}"
        return f":{begin.line + 1}:{begin.column + 1}", problem
    lines = text.splitlines()[: mark.line]
    is_first = ":" not in "".join(text.splitlines()[mark.line : mark.line + 1])[: mark.column]
    if problem == "mapping values are not allowed here" and is_first and lines:
        number = max((i for i, line in enumerate(lines) if line.strip()), default=0)
        line = lines[number]
        if ":" not in line:
            column = len(line) - len(line.lstrip())
            return f":{number + 1}:{column + 1}", f"'{line.strip()[:40]}' lacks a colon"
    return f":{mark.line + 1}:{mark.column + 1}", problem


def _mark(node: yaml.Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def check_length(path: Path, noun: str) -> None:
    """Refuse a path that no file system takes; asking one would raise its own error.

    Args:
        path: as it is to be looked up.
        noun: what it should be, such as ``"an ensemble file"``.

    Raises:
        ConfigError: if it, or one of its parts, is too long.
    """
    parts = [len(os.fsencode(part)) for part in path.parts]
    if sum(parts) + len(parts) > 4095 or max(parts, default=0) > 255:
        text = str(path)
        raise ConfigError(
            f"{text[:60]}...: a path of {len(text)} characters is longer than files' are; "
            f"expected {noun}."
        )


def read_text(path: Path, noun: str) -> str:
    """The text of a file that the user named.

    Args:
        path: the file.
        noun: what it should be, such as ``"an ensemble file"``.

    Raises:
        ConfigError: if it is missing, a folder, not readable, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected {noun}.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; expected {noun}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} cannot be read.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
