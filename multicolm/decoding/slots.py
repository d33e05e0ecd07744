"""Places for texts, and the sessions in which they are places."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from multicolm.backend.base import Model, Session
from multicolm.backend.checked import open_session

__all__ = ["Slots"]


class Slots:
    """Places for texts, and for each model a session in which they are places.

    Several loops may share them; a place belongs to one text at a time.

    Args:
        models: the ensemble's.
        n: how many places there are.

    Attributes:
        n: how many places there are.
        free: those that nobody has, ascending.
    """

    def __init__(self, models: Sequence[Model], n: int) -> None:
        self.n = n
        self.free = list(range(n))
        self._models = models

    def take(self) -> int:
        """A free place, for whoever asks.

        Raises:
            IndexError: if there is none.
        """
        return self.free.pop(0)

    def give(self, slot: int) -> None:
        """A place is free again."""
        insort(self.free, slot)

    def open(self, k: int) -> Session:
        """A session of model ``k``; what a row holds when its place is taken is to be cut off."""
        return open_session(self._models[k], self.n)
