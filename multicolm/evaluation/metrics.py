"""How good an answer is, 0 to 1, beside the right one.

A metric is a frozen dataclass with ``score(text, gold)``; its fields are the ``params`` of a task
file. More of them come by an entry point in the group ``multicolm.metrics``, or as a Python
function that a task file names, ``package.module:function`` or ``file.py:function``, which is
called with the text, the right answer and the record.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeFloat, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from multicolm.errors import ConfigError, InputError, UnknownNameError, unknown

__all__ = [
    "ContainsMetric",
    "ExactMatchMetric",
    "FunctionMetric",
    "Metric",
    "NumericMetric",
    "load_function",
]

# No sign where it would be a minus between two numbers, as in "7-3".
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)])[-+])?(?<!\d)\.\d+(?:[eE][-+]?\d+)?"
)
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Metric(ABC):
    """Compares an answer with the right one."""

    @abstractmethod
    def score(self, text: str, gold: str) -> float:
        """How good ``text`` is, 0 to 1, where ``gold`` is right."""


class _WithPattern:
    """A metric that may read the answer from a part of the text."""

    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            compiled = re.compile(pattern or "()")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}.") from error
        if not compiled.groups:
            raise ValueError("needs a group, such as 'Answer: (.*)', that holds the answer.")
        return pattern

    def read(self, text: str) -> str | None:
        """The first group of the pattern's last match, all without a pattern, ``None`` if none."""
        if self.pattern is None:
            return text
        found = None
        for match in re.finditer(self.pattern, text, re.MULTILINE):
            found = match[1]
        return found


@pydantic_dataclass(frozen=True, config=_STRICT)
class ExactMatchMetric(_WithPattern, Metric):
    """1 if the answer is the right one to the letter, else 0.

    Attributes:
        pattern: a regular expression (Python's, with ``^`` and ``$`` at every line) whose first
            group, in its last match, is the answer; no match is wrong. The whole text without one.
        ignore_case: whether capitals are as good as small letters.
        strip: whether white space around the answer is nothing.
    """

    pattern: str | None = None
    ignore_case: bool = False
    strip: bool = True

    def score(self, text: str, gold: str) -> float:
        """See :meth:`Metric.score`."""
        answer = self.read(text)
        return float(answer is not None and self._plain(answer) == self._plain(gold))

    def _plain(self, text: str) -> str:
        stripped = text.strip() if self.strip else text
        return stripped.casefold() if self.ignore_case else stripped


@pydantic_dataclass(frozen=True, config=_STRICT)
class ContainsMetric(Metric):
    """1 if the right answer is anywhere in the text, else 0.

    Attributes:
        ignore_case: whether capitals are as good as small letters.
    """

    ignore_case: bool = False

    def score(self, text: str, gold: str) -> float:
        """See :meth:`Metric.score`."""
        if self.ignore_case:
            text, gold = text.casefold(), gold.casefold()
        return float(gold in text)


@pydantic_dataclass(frozen=True, config=_STRICT)
class NumericMetric(_WithPattern, Metric):
    """1 if the last number is the right one, else 0; thousands may have commas.

    Attributes:
        pattern: where to look for it; see :class:`ExactMatchMetric`. The whole text without one.
        tolerance: how far off it may be, absolutely.
    """

    pattern: str | None = None
    tolerance: NonNegativeFloat = 0.0

    def score(self, text: str, gold: str) -> float:
        """See :meth:`Metric.score`.

        Raises:
            InputError: if the right answer holds no number.
        """
        right = _last_number(gold)
        if right is None:
            raise InputError(f"the right answer {gold!r} holds no number to compare with.")
        answer = _last_number(self.read(text) or "")
        # repr of a float is the shortest text that means it: 0.1 is a tenth here.
        near = answer is not None and abs(answer - right) <= Decimal(repr(self.tolerance))
        return float(near)


@dataclass(frozen=True)
class FunctionMetric:
    """A Python function as a metric.

    Attributes:
        function: called with the text, the right answer and the record; gives 0 to 1.
        name: as the task file has it.
    """

    function: Callable[[str, str, Mapping[str, Any]], float]
    name: str

    @classmethod
    def load(cls, name: str, base_dir: Path) -> FunctionMetric:
        """The function of ``package.module:function`` or ``file.py:function``, which is run.

        Args:
            name: what the user wrote.
            base_dir: the folder that a file's relative path starts from.

        Raises:
            ConfigError: if the file or module is not there.
            UnknownNameError: if it has no such function.
        """
        return cls(load_function(name, base_dir), name)


def load_function(name: str, base_dir: Path) -> Callable[..., Any]:
    """What a task file names as ``package.module:function`` or ``file.py:function``.

    Raises:
        ConfigError: if the file or module is not there.
        UnknownNameError: if it has no such function.
    """
    place, _, function = name.rpartition(":")
    module = _run_file(base_dir / place, name) if place.endswith(".py") else _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UnknownNameError(f"{name}: {unknown('function', function, known)}")
    result: Callable[..., Any] = found
    return result


def _last_number(text: str) -> Decimal | None:
    found = None
    for match in _NUMBER.finditer(text):
        found = match[0]
    return None if found is None else Decimal(found.replace(",", ""))


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: {error.msg}; is its package installed?") from error


def _run_file(path: Path, name: str) -> object:
    if not path.is_file():
        raise ConfigError(f"{name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"multicolm_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
