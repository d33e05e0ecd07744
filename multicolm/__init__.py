"""Several language models write one text together, routed token by token.

    >>> import multicolm
    >>> ensemble = multicolm.load("tiny")
    >>> [answer] = ensemble.generate(["What is Dulerex made from?"], policy="cosd-rule")
    >>> print(answer.text)

Importing this package imports no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from multicolm.ensemble import Ensemble, load
    from multicolm.errors import MulticolmError
    from multicolm.generative import GenerativeEnsemble, as_transformers
    from multicolm.policy.base import (
        MixPolicy,
        Needs,
        NewTokens,
        Policy,
        SegmentPolicy,
        Segments,
        SelectPolicy,
        VerifyPolicy,
        register_policy,
    )
    from multicolm.streaming import Stream
    from multicolm.types import Alternative, Answer, Message, Piece, Trace, TracedToken, Usage
    from multicolm.views import ModelNames, View, Views

_HOME = {
    "Alternative": "multicolm.types",
    "Answer": "multicolm.types",
    "Ensemble": "multicolm.ensemble",
    "GenerativeEnsemble": "multicolm.generative",
    "Message": "multicolm.types",
    "MixPolicy": "multicolm.policy.base",
    "ModelNames": "multicolm.views",
    "MulticolmError": "multicolm.errors",
    "Needs": "multicolm.policy.base",
    "NewTokens": "multicolm.policy.base",
    "Piece": "multicolm.types",
    "Policy": "multicolm.policy.base",
    "SegmentPolicy": "multicolm.policy.base",
    "Segments": "multicolm.policy.base",
    "SelectPolicy": "multicolm.policy.base",
    "Stream": "multicolm.streaming",
    "Trace": "multicolm.types",
    "TracedToken": "multicolm.types",
    "Usage": "multicolm.types",
    "VerifyPolicy": "multicolm.policy.base",
    "View": "multicolm.views",
    "Views": "multicolm.views",
    "as_transformers": "multicolm.generative",
    "load": "multicolm.ensemble",
    "register_policy": "multicolm.policy.base",
}

__all__ = [
    "Alternative",
    "Answer",
    "Ensemble",
    "GenerativeEnsemble",
    "Message",
    "MixPolicy",
    "ModelNames",
    "MulticolmError",
    "Needs",
    "NewTokens",
    "Piece",
    "Policy",
    "SegmentPolicy",
    "Segments",
    "SelectPolicy",
    "Stream",
    "Trace",
    "TracedToken",
    "Usage",
    "VerifyPolicy",
    "View",
    "Views",
    "__version__",
    "as_transformers",
    "load",
    "register_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'multicolm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
