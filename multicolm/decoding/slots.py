"""Places for the texts that are being written."""

from __future__ import annotations

from bisect import insort

__all__ = ["Slots"]


class Slots:
    """Places for texts; one belongs to one text at a time.

    Args:
        n: how many there are.

    Attributes:
        n: how many there are.
        free: those that nobody has, ascending.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.free = list(range(n))

    def take(self) -> int:
        """A free place, for whoever asks.

        Raises:
            IndexError: if there is none.
        """
        return self.free.pop(0)

    def give(self, slot: int) -> None:
        """A place is free again."""
        insort(self.free, slot)
