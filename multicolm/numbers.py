"""Numbers as users give them: Python's own, NumPy's, or a tensor of one number.

Booleans and texts are no numbers. No library is imported to find that out.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

from multicolm.errors import InputError

__all__ = ["as_python", "check_number", "check_seed", "check_whole"]


def as_python(value: Any) -> Any:
    """A NumPy scalar, or an array or tensor without axes, as Python's own; also within containers.

    Everything else is returned as it is, arrays and tensors with axes included.
    """
    if type(value) in (list, tuple):
        return type(value)(as_python(part) for part in value)
    if type(value) is dict:
        return {key: as_python(part) for key, part in value.items()}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def check_whole(
    name: str, value: Any, *, least: int | None = None, below: int | None = None
) -> int:
    """A whole number that is in range.

    Args:
        name: of the argument, for messages.
        value: whatever stands for a whole number (:func:`operator.index`).
        least: the smallest that is allowed.
        below: the smallest that is too large.

    Raises:
        InputError: if it is no whole number, or out of range.
    """
    plain = as_python(value)
    allowed = "a whole number" if least is None or least < 0 else f"a whole number, {least} or more"
    number = None
    # A tensor of one number with axes would pass for a number, too.
    if not isinstance(plain, bool) and not getattr(plain, "shape", ()):
        with contextlib.suppress(TypeError):
            number = operator.index(plain)
    if number is None:
        raise InputError(f"{name} must be {allowed}, got {_shown(value)}.")
    if least is not None and number < least:
        raise InputError(f"{name} must be {least} or more, got {number}.")
    if below is not None and number >= below:
        raise InputError(f"{name} must be less than {below}, got {_shown(number)}.")
    return number


def check_seed(value: Any) -> int:
    """A seed: any whole number of 64 bits with a sign, as OpenAI's interface has it.

    Raises:
        InputError: if it is none.
    """
    return check_whole("seed", value, least=-(2**63), below=2**63)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> float:
    """A finite number that is in range.

    Args:
        name: of the argument, for messages.
        value: whatever stands for a number.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        above: it has to be more than this.

    Raises:
        InputError: if it is no finite number, or out of range.
    """
    plain = as_python(value)
    number = math.nan
    if not isinstance(plain, bool | str | bytes | bytearray) and not getattr(plain, "shape", ()):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(plain)
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, got {_shown(value)}.")
    if number <= above:
        raise InputError(f"{name} must be more than {above:g}, got {number:g}.")
    if not least <= number <= most:
        bound = f"{least:g} or more" if number < least else f"at most {most:g}"
        raise InputError(f"{name} must be {bound}, got {number:g}.")
    return number


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
