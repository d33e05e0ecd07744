"""Names of 0.1 that are called otherwise now: whoever still uses one is given the new one.

Without this, what a policy or a backend of 0.1 says under an old name would be lost silently:
Python accepts an attribute that nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from multicolm.errors import MulticolmError

__all__ = ["Renamed", "forbid_old_names"]


class Renamed:
    """An attribute that had this name in 0.1: reading or setting it says what it is called now.

    Args:
        new: its name.
        error: what is raised.

    Raises:
        MulticolmError: as ``error``, where an object's attribute of this name is read or set.
    """

    def __init__(self, new: str, error: type[MulticolmError]) -> None:
        self._new, self._error = new, error

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else self._refuse(type(instance))

    def __set__(self, instance: object, value: object) -> None:
        self._refuse(type(instance))

    def _refuse(self, owner: type) -> NoReturn:
        raise self._error(f"{owner.__name__}: `{self._old}` of 0.1 is called `{self._new}` now.")


def forbid_old_names(cls: type, new_names: Mapping[str, str], error: type[MulticolmError]) -> None:
    """Refuse a class that defines something under a name of 0.1.

    Args:
        cls: the class.
        new_names: old name -> new name.
        error: what is raised.

    Raises:
        MulticolmError: as ``error``.
    """
    for old, new in new_names.items():
        if old in cls.__dict__:
            raise error(f"{cls.__name__}: `{old}` of 0.1 is called `{new}` now; rename it.")
