"""Texts of bytes: 256 of them, and the end, which every model can read and write."""

from __future__ import annotations

from multicolm.tokenizer.vocabulary import Outcomes
from multicolm.views import ModelNames

__all__ = ["END", "ByteVocabulary"]

END = 256
"""The end of a text, after the 256 bytes."""


class ByteVocabulary(Outcomes):
    """257 outcomes: the support of policies that mix bytes.

    Models follow such a text through :class:`multicolm.exact.byte_session.ByteSession`.

    Args:
        models: the names.
    """

    def __init__(self, models: ModelNames) -> None:
        super().__init__(models, END + 1, END)

    def token_bytes(self, token: int) -> bytes:
        """The byte; nothing for the end."""
        return bytes([token]) if token < END else b""

    def name(self, token: int) -> str:
        """How a byte is shown alone."""
        if token == END:
            return "<end>"
        return bytes([token]).decode("utf-8", errors="backslashreplace")
