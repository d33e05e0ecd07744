"""Texts of bytes: 256 of them, and the end, which every model can read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.tokenizer.vocabulary import Follower, Vocabulary
from multicolm.views import ModelNames

__all__ = ["END", "ByteVocabulary"]

END = 256
"""The end of a text, behind the 256 bytes."""


class ByteVocabulary(Vocabulary):
    """257 outcomes that are the same for all models: the support of policies that mix bytes.

    Models follow such a text through :class:`multicolm.backend.byte_session.ByteSession`, not as
    tokens.

    Args:
        models: the names.
    """

    def __init__(self, models: ModelNames) -> None:
        self.models = models
        self.size = END + 1
        self.groups = (0,) * len(models)

    def follow(self, model: int, prompt: Sequence[int]) -> Follower:
        """Not by tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a text of bytes is followed by a ByteSession")

    def read(self, model: int, ids: Sequence[int]) -> list[int]:
        """Not by tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a text of bytes is followed by a ByteSession")

    def n_read(self, model: int, token: int) -> int:
        """A byte is one own token at most."""
        return int(token < END)

    def own_ids(self, model: int, ids: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """Bytes are nobody's own tokens."""
        return torch.full_like(ids, -1)

    def logits(
        self, model: int, own: Float[Tensor, "positions own_vocab"]
    ) -> Float[Tensor, "positions vocab"]:
        """What models show of bytes is the same for all."""
        return own

    def token_bytes(self, token: int) -> bytes:
        """The byte; nothing for the end."""
        return bytes([token]) if token < END else b""

    def name(self, token: int) -> str:
        """How a byte is shown alone."""
        if token == END:
            return "<end>"
        return bytes([token]).decode("utf-8", errors="backslashreplace")

    def end_ids(self, model: int | None) -> frozenset[int]:
        """The end is the same for all."""
        return frozenset({END})
