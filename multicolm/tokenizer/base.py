"""What a tokenizer adapter is: one model's tokens, as bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from multicolm.types import Message

__all__ = ["TokenizerAdapter"]


class TokenizerAdapter(ABC):
    """Turns one model's tokens into bytes and back.

    Law: ``decode(encode(text)) == text.encode()`` for every text that the tokenizer covers, and
    decoding in pieces equals decoding at once.

    Attributes:
        n_tokens: number of ids, 0..n_tokens-1; ids without a token have no bytes and no name.
        end_ids: tokens with which this model ends a text.
    """

    n_tokens: int
    end_ids: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer puts at the start of a text."""

    @abstractmethod
    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues another; nothing is put in front, no special tokens."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat in this model's own template, ready for the reply.

        Raises:
            InputError: if there is no template, or the template refuses the messages.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for special tokens."""

    @abstractmethod
    def special_name(self, token_id: int) -> str | None:
        """The name of a special token, such as ``"<|end|>"``; ``None`` for tokens of text."""

    def is_added(self, token_id: int) -> bool:
        """Whether the token was added to a vocabulary that was already there.

        Models of one family have one vocabulary and may have different added tokens.
        """
        return False

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of a text; special tokens leave no trace."""
        return b"".join(self.token_bytes(token_id) for token_id in ids)

    @abstractmethod
    def piece(self, token_id: int) -> str | None:
        """The token as its vocabulary spells it; ``None`` for an id without a token.

        Two ids may have the same bytes (``"A"`` and ``"<0x41>"``) and never the same piece.
        """
