"""What a tokenizer adapter is: one model's tokens, as bytes and back."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from multicolm.errors import InputError
from multicolm.tokenizer.cuts import Cuts
from multicolm.types import Message

__all__ = ["TokenizerAdapter"]

# Bytes that are no UTF-8, as `surrogateescape` shows them.
_BROKEN = re.compile("([\udc80-\udcff]+)")


class TokenizerAdapter(ABC):
    """Turns one model's tokens into bytes and back.

    Law: ``decode(encode_continuation(text)) == text.encode()`` for every text that the tokenizer
    covers (:meth:`covers_text`), and decoding in pieces equals decoding at once.

    Attributes:
        n_tokens: number of ids, 0..n_tokens-1; ids without a token have no bytes and no name.
        end_ids: tokens with which this model ends a text.
        template_args: variables of its chat template, unless a chat sets them itself.
    """

    n_tokens: int
    end_ids: frozenset[int]
    template_args: Mapping[str, Any] = MappingProxyType({})

    @property
    def settings(self) -> dict[str, object] | None:
        """How continuations are cut, as a ``tokenizer.json`` says it; ``None`` if that is unknown.

        :mod:`multicolm.exact.canonical` works out from them which tokens may follow which.
        """
        return None

    @property
    def dropped_bytes(self) -> bytes | None:
        """Bytes of texts that are in none of their tokens; ``None`` if there may be others."""
        return None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer puts at the start of a text.

        Names of special tokens in the text are text, and nothing is put after it.
        """

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a prompt in which names of special tokens stand for these tokens.

        Such is what a chat template has rendered. If the text begins with what the tokenizer puts
        at the start of a text, it is not put there again.
        """
        start = self.encode("")
        ids: list[int] = []
        for number, part in enumerate(self._special_pattern.split(text)):
            if number % 2:
                ids.append(self._special_ids[part])
            elif part:
                ids += self.encode_continuation(part) if ids else self.encode(part)[len(start) :]
        return ids if start and ids[: len(start)] == start else [*start, *ids]

    def special_in(self, text: str) -> str | None:
        """The first name of a special token that a text holds; ``None`` if it holds none."""
        found = self._special_pattern.search(text)
        return None if found is None else found.group()

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        """Special tokens by name."""
        named = ((self.special_name(i), i) for i in reversed(range(self.n_tokens)))
        return {name: i for name, i in named if name}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Finds names of special tokens, of those that begin alike the longest."""
        names = sorted(self._special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @abstractmethod
    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues another; nothing is put in front, no special tokens."""

    @property
    def start_ids(self) -> list[int]:
        """What a model reads so that it can predict the first token of a text too.

        What the tokenizer puts at the start of a text; if that is nothing, a token of the
        beginning, or else of the end, of texts; nothing if there is none of them.
        """
        return self.encode("") or sorted(self.end_ids)[:1]

    def encode_bytes(self, content: bytes) -> list[int]:
        """Token ids of bytes that continue a text, be they UTF-8 or not.

        Law: for valid UTF-8, those of :meth:`encode_continuation`. Bytes that are none, such as a
        part of a character at the end, are written byte by byte where the vocabulary has a token
        for each; else they are encoded as U+FFFD, together with the text around them.

        Raises:
            InputError: if there is no token for something in it.
        """
        ids: list[int] = []
        pending = ""
        for part in _BROKEN.split(content.decode("utf-8", "surrogateescape")):
            broken = part.encode("utf-8", "surrogateescape") if _BROKEN.match(part) else b""
            if not all(byte in self._broken_byte_ids for byte in broken):
                pending += broken.decode("utf-8", "replace")
            elif broken:
                ids += self.encode_continuation(pending) if pending else []
                ids += [self._broken_byte_ids[byte] for byte in broken]
                pending = ""
            else:
                pending += part
        return ids + (self.encode_continuation(pending) if pending else [])

    @cached_property
    def _broken_byte_ids(self) -> dict[int, int]:
        """The first token of each byte that is no character of its own."""
        ids: dict[int, int] = {}
        for token_id in range(self.n_tokens):
            content = self.token_bytes(token_id)
            if len(content) == 1 and content[0] >= 0x80:
                ids.setdefault(content[0], token_id)
        return ids

    def covers_text(self, text: str) -> bool:
        """Whether a text comes back as it was when its tokens are decoded.

        It does not where the tokenizer puts characters together or replaces them (Unicode
        normalisation; U+2581 in SentencePiece), or has no token for one, or if it is no Unicode.
        """
        try:
            content = text.encode()
            return self.decode(self.encode_continuation(text)) == content
        except (InputError, UnicodeEncodeError):
            return False

    @property
    def cuts(self) -> Cuts | None:
        """Where texts can be cut; ``None`` if not known, so that they are encoded as a whole."""
        return None

    @property
    def chat_template(self) -> str | None:
        """The jinja text of the model's author or of the user that chats go through, if any."""
        return None

    def chat_text(self, messages: Sequence[Message]) -> str | None:
        """A chat in this model's own template, with names of special tokens; ``None``: not known.

        Raises:
            InputError: if there is no template, or the template refuses the messages.
        """
        return None

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
