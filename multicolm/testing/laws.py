"""What a broken law is."""

from __future__ import annotations

__all__ = ["LawBroken"]


class LawBroken(AssertionError):
    """A plug-in does not keep a law; the message says which and what was seen."""

    def __init__(self, law: str, seen: str) -> None:
        super().__init__(f"law broken: {law}. {seen}")
        self.law = law
