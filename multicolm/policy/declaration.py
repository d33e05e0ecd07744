"""What the class of a policy declares, checked as soon as Python has read it.

Python accepts a class variable that nobody reads: a misspelt one would silently be another policy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from inspect import get_annotations
from types import FunctionType
from typing import Any, get_args

from multicolm.errors import PolicyError, unknown
from multicolm.renamed import forbid_old_names
from multicolm.types import Signal

__all__ = ["check_declaration", "check_method"]

_SIGNALS = ("base_signals", "assistant_signals")
_OLD_SIGNALS = {"given": "token_logprobs"}  # of 0.1


def check_declaration(cls: type, policy: type, choices: Mapping[str, Any]) -> None:
    """Refuse a class whose declarations would not be read, or mean nothing.

    Args:
        cls: the class.
        policy: the class of all policies.
        choices: per class variable, the ``Literal`` of its values.

    Raises:
        PolicyError: naming the class and the variable.
    """
    forbid_old_names(cls, {"seams": "reads_boundaries"}, PolicyError)
    declared = vars(cls)
    for field, kind in choices.items():
        if field in declared and declared[field] not in get_args(kind):
            raise PolicyError(
                f"{cls.__name__}.{field}: {unknown('value', str(declared[field]), get_args(kind))}"
            )
    for field in _SIGNALS:
        if field in declared:
            _check_signals(f"{cls.__name__}.{field}", declared[field])
    # What has a type is a param, with a name of its own.
    own = {name for name in declared if not name.startswith("_")} - get_annotations(cls).keys()
    for name in sorted(own):
        known = getattr(policy, name, None)
        is_method = isinstance(known, FunctionType)
        if is_method and not hasattr(declared[name], "__get__"):
            raise PolicyError(
                f"{cls.__name__}.{name} is a method, and was given a value; the signals that a "
                "policy reads are declared in `base_signals` and `assistant_signals`."
            )
        if known is None and not callable(declared[name]) and not hasattr(cls.__mro__[1], name):
            _check_spelling(cls, name, {n for n in vars(policy) if not n.startswith("_")} - own)


def _check_signals(where: str, signals: object) -> None:
    allowed = get_args(Signal)
    if isinstance(signals, property):
        return
    if isinstance(signals, str) or not isinstance(signals, set | frozenset | list | tuple):
        raise PolicyError(f"{where} is a set of signals, such as {{'top1'}}; got {signals!r}.")
    for signal in signals:
        if signal in _OLD_SIGNALS:
            raise PolicyError(
                f"{where}: the signal '{signal}' of 0.1 is called '{_OLD_SIGNALS[signal]}' now; "
                "rename it."
            )
        if signal not in allowed:
            raise PolicyError(f"{where}: {unknown('signal', str(signal), allowed)}")


def _check_spelling(cls: type, name: str, known: set[str]) -> None:
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        raise PolicyError(
            f"{cls.__name__}.{name}: no policy has this; did you mean '{near[0]}'? A param of your "
            "own has a type: `name: float = 0.5`."
        )


def check_method(policy: object, kind: type, method: str) -> None:
    """Refuse a policy without the method that its kind is asked by.

    Args:
        policy: the policy.
        kind: the class that declares the method.
        method: its name.

    Raises:
        PolicyError: naming the class, and what it may have called the method.
    """
    cls = type(policy)
    if getattr(cls, method) is not getattr(kind, method):
        return
    own = [name for name, value in vars(cls).items() if isinstance(value, FunctionType)]
    near = difflib.get_close_matches(method, own, n=1, cutoff=0.7)
    hint = f"; is '{near[0]}' meant to be it?" if near else "."
    raise PolicyError(f"{cls.__name__}: a {kind.__name__} must define `{method}`{hint}")
