"""A tokenizer whose tokens are written down one by one; for exact tables and for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from multicolm.errors import InputError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.cuts import Cuts, GreedyCuts
from multicolm.types import Message

__all__ = ["LiteralTokenizer"]


class LiteralTokenizer(TokenizerAdapter):
    """Text is cut into the longest token that fits, from left to right.

    Args:
        tokens: the tokens in the order of their ids.
        specials: those among them that are special and stand for no text.
        ends: those among the special ones that end a text.
        name: the model's name, for messages.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        specials: Iterable[str] = (),
        ends: Iterable[str] = (),
        name: str = "table",
    ) -> None:
        self._tokens = list(tokens)
        self._specials = frozenset(specials) | frozenset(ends)
        self._name = name
        self.n_tokens = len(self._tokens)
        self.end_ids = frozenset(self._tokens.index(end) for end in ends)
        texts = [token for token in self._tokens if token not in self._specials]
        self._longest_first = sorted(texts, key=len, reverse=True)
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._cuts = GreedyCuts(texts)

    @property
    def dropped_bytes(self) -> bytes:
        """None: it refuses what it has no token for."""
        return b""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: if no token fits at some place.
        """
        ids: list[int] = []
        place = 0
        while place < len(text):
            fits = (token for token in self._longest_first if text.startswith(token, place))
            token = next(fits, None)
            if token is None:
                raise InputError(
                    f"model '{self._name}' has no token for {text[place]!r} at character {place}; "
                    f"its tokens are {', '.join(self._tokens)}."
                )
            ids.append(self._ids[token])
            place += len(token)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """The same as :meth:`encode`: nothing is put in front of a text."""
        return self.encode(text)

    @property
    def cuts(self) -> Cuts:
        """Behind every token that no longer one could have replaced."""
        return self._cuts

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The messages' contents, one after another."""
        return "".join(message["content"] for message in messages)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of :meth:`chat_text`."""
        return self.encode(self.chat_text(messages))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text."""
        token = self._tokens[token_id]
        return b"" if token in self._specials else token.encode()

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token; ``None`` for tokens of text."""
        token = self._tokens[token_id]
        return token if token in self._specials else None

    def piece(self, token_id: int) -> str | None:
        """The token itself."""
        return self._tokens[token_id]
