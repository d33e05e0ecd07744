"""Errors in a user's own policies, metrics and backends, in one line instead of a traceback."""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from pathlib import Path
from types import CodeType, FrameType

__all__ = ["sentence_of"]

_OURS = str(Path(__file__).resolve().parents[1])


def sentence_of(error: BaseException) -> str | None:
    """Where in a user's own code an error was raised, and what it is.

    Args:
        error: as it was caught.

    Returns:
        ``file.py:17, Mine.select: View has no 'entropy'; did you mean 'entropy_nats'?``, the last
        line of own code that was reached; ``None`` if there is none, so that the error is ours.
    """
    own = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_own(frame.f_code)
    ]
    if not own:
        return None
    frame, line = own[-1]
    path = os.path.relpath(frame.f_code.co_filename)
    path = frame.f_code.co_filename if path.startswith("..") else path
    return f"{path}:{line}, {_name(frame)}: {_reason(error)}"


def _is_own(code: CodeType) -> bool:
    """Whether a function is neither multicolm's nor a library's."""
    places = (_OURS, *(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")))
    inside = (os.path.join(place, "") for place in places)
    return os.path.isfile(code.co_filename) and not code.co_filename.startswith(tuple(inside))


def _name(frame: FrameType) -> str:
    """The method or function of a frame."""
    name = frame.f_code.co_name
    owner = frame.f_locals.get("self")
    return name if owner is None else f"{type(owner).__name__}.{name}"


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split()) or "no message"
    if not isinstance(error, AttributeError) or error.obj is None or not error.name:
        return f"{type(error).__name__}: {said}"
    known = [name for name in dir(error.obj) if not name.startswith("_")]
    near = difflib.get_close_matches(error.name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"{type(error.obj).__name__} has no '{error.name}'{hint}"
