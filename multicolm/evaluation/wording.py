"""Numbers and texts as readers of a comparison see them: in tables, on the page, in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["markup", "p_value", "percent", "plain", "points", "short_percent", "visible"]

# Controls, zero-width and direction marks, and halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_MARKUP = re.compile(r"[\\`*_\[\]<>|~#$]")


def visible(text: str) -> str:
    r"""Text in which control characters and direction marks are seen instead of obeyed.

    >>> visible("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(value: Any) -> Any:
    """The same value as JSON has it everywhere: tuples as lists, infinities and no-numbers as text.

    >>> plain({"threshold": float("inf"), "ids": (1, 2)})
    {'threshold': 'inf', 'ids': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def percent(value: float) -> str:
    """A share or a quality in percent, with one digit.

    >>> percent(0.7419)
    '74.2'
    """
    return f"{100 * value:.1f}"


def short_percent(value: float) -> str:
    """A share or a quality in percent, with a digit after the point only where there is one.

    >>> short_percent(0.35), short_percent(0.7419)
    ('35', '74.2')
    """
    return percent(value).removesuffix(".0")


def points(value: float) -> str:
    """A difference in percentage points, with its sign.

    >>> points(-0.0831) == "\N{MINUS SIGN}8.3", points(0.0)
    (True, '+0.0')
    """
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """A p-value as papers print it.

    >>> p_value(0.0004), p_value(0.0213), p_value(None)
    ('p < 0.001', 'p = 0.021', '')
    """
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def markup(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(lambda match: "\\" + match[0], visible(text.replace("\n", " ")))
