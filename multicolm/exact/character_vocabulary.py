"""Texts of characters: those that the models' tokens are made of, and two that are no text.

After the characters come :attr:`CharacterVocabulary.null`, with which a token ends, and
:attr:`CharacterVocabulary.end`, with which the text does. Bytes of a token that are no whole
character count as characters of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.vocabulary import Outcomes
from multicolm.views import ModelNames

__all__ = ["CharacterVocabulary", "SortedCharacters", "characters"]


def characters(content: bytes) -> list[bytes]:
    """The characters of some bytes; bytes that are part of none stand alone."""
    text = content.decode("utf-8", "surrogateescape")
    return [character.encode("utf-8", "surrogateescape") for character in text]


class CharacterVocabulary(Outcomes):
    """The outcomes of policies that mix characters.

    Models follow such a text through :class:`multicolm.decoding.character_reader.CharacterReader`.

    Attributes:
        null: the id of the end of a token.

    Args:
        models: the names.
        tokenizers: of each.
    """

    def __init__(self, models: ModelNames, tokenizers: Sequence[TokenizerAdapter]) -> None:
        self._tokenizers = tuple(tokenizers)
        self._ids: dict[bytes, int] = {}
        for tokenizer in tokenizers:
            for token in range(tokenizer.n_tokens):
                for character in characters(tokenizer.token_bytes(token)):
                    self._ids.setdefault(character, len(self._ids))
        self._contents = list(self._ids)
        self.null = len(self._contents)
        super().__init__(models, self.null + 2, self.null + 1)
        self._sorted: dict[int, SortedCharacters] = {}

    def sorted(self, model: int) -> SortedCharacters:
        """A model's tokens of text in the order of their characters."""
        if model not in self._sorted:
            tokenizer = self._tokenizers[model]
            spelled = [
                [self._ids[c] for c in characters(tokenizer.token_bytes(token))]
                for token in range(tokenizer.n_tokens)
            ]
            self._sorted[model] = SortedCharacters(spelled)
        return self._sorted[model]

    def token_bytes(self, token: int) -> bytes:
        """The character; nothing for the end of a token or of the text."""
        return self._contents[token] if token < self.null else b""

    def name(self, token: int) -> str:
        """How a character is shown alone."""
        if token >= self.null:
            return "<end>" if token == self.end else "<null>"
        return self._contents[token].decode("utf-8", errors="backslashreplace")


class SortedCharacters:
    """Tokens in the order of their characters, so that those with one beginning are a range.

    Attributes:
        ids: the tokens, as own ids; those without characters are left out.

    Args:
        spelled: per own id, its characters.
    """

    def __init__(self, spelled: Sequence[Sequence[int]]) -> None:
        texts = [token for token, ids in enumerate(spelled) if ids]
        order = sorted(texts, key=lambda token: tuple(spelled[token]))
        self.ids: Int[np.ndarray, "tokens"] = np.array(order, dtype=np.int64)
        width = max((len(spelled[token]) for token in order), default=0) + 1
        # -1 after the last character, which sorts before all others.
        self._table = np.full((len(order), width), -1, dtype=np.int64)
        for line, token in enumerate(order):
            self._table[line, : len(spelled[token])] = spelled[token]

    def __len__(self) -> int:
        return len(self.ids)

    def narrow(self, low: int, high: int, depth: int, character: int) -> tuple[int, int]:
        """Those of a range, equal up to ``depth``, that have a character there."""
        column = self._table[low:high, depth]
        first = low + int(np.searchsorted(column, character, "left"))
        last = low + int(np.searchsorted(column, character, "right"))
        return first, last

    def next(self, low: int, high: int, depth: int) -> Int[np.ndarray, "tokens"]:
        """The character of each of a range at one depth; -1 for tokens that end before it."""
        column: Int[np.ndarray, "tokens"] = self._table[low:high, depth]
        return column
