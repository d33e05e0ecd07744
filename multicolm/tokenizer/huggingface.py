"""Tokenizers of the transformers library, as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from multicolm.errors import InputError, VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Message

__all__ = ["HuggingFaceTokenizer"]


class HuggingFaceTokenizer(TokenizerAdapter):
    """Adapter of a fast tokenizer whose decoder is byte-level or SentencePiece-like.

    Args:
        tokenizer: a fast tokenizer (one with a ``backend_tokenizer``).
        name: the model's name, for messages.
        end_ids: tokens with which the model ends a text, besides the tokenizer's own.

    Raises:
        VocabularyError: if its tokens cannot be turned into bytes one by one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, end_ids: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        pieces = tokenizer.get_vocab()
        self.n_tokens = max(pieces.values()) + 1
        self._pieces: list[str | None] = [None] * self.n_tokens
        for piece, token_id in pieces.items():
            self._pieces[token_id] = piece
        self._specials = {
            token_id: str(token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = frozenset({*own_end, *end_ids})
        self._bytes = self._byte_table()

    def _byte_table(self) -> list[bytes]:
        spelled = _decoder_of(self._tokenizer, self._name)
        added = self._tokenizer.added_tokens_decoder
        table: list[bytes] = []
        for token_id, piece in enumerate(self._pieces):
            if piece is None or token_id in self._specials:
                table.append(b"")
            elif token_id in added:
                table.append(piece.encode())  # added tokens are written as they are
            else:
                table.append(spelled(piece))
        return table

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own beginning-of-text token if it has one."""
        return list(self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues another."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return list(encoded["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat in the model's own template, ready for the reply.

        Raises:
            InputError: if there is no template, or the template refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise InputError(
                f"model '{self._name}' has no chat template; give a plain text prompt, or set "
                f"`chat_template:` for it in the ensemble file."
            )
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise InputError(
                f"the chat template of model '{self._name}' refuses these messages: {error}"
            ) from error
        return list(encoded["input_ids"])

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for special tokens and ids without a token."""
        return self._bytes[token_id]

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token; ``None`` for tokens of text."""
        return self._specials.get(token_id)

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        return self._pieces[token_id]


def _decoder_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """How the pieces of this tokenizer turn into bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise VocabularyError(
            f"model '{name}' has a tokenizer without a fast backend ({type(tokenizer).__name__}); "
            "its tokens cannot be turned into bytes. Use one with a tokenizer.json."
        )
    decoder = json.loads(backend.to_str()).get("decoder")
    kinds = set(_kinds(decoder))
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _sentencepiece
    raise VocabularyError(
        f"model '{name}' has a tokenizer whose decoder ({' + '.join(sorted(kinds)) or 'none'}) is "
        "not supported; allowed are byte-level BPE and SentencePiece-like tokenizers."
    )


def _kinds(decoder: Mapping[str, Any] | None) -> Iterable[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _kinds(part)
    else:
        yield decoder["type"]


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself, the other bytes for characters from U+0100 on.

    Source: GPT-2's byte-level BPE (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    characters.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return characters


def _byte_level(piece: str) -> bytes:
    table = _bytes_of_characters()
    # A character outside of the table can only come from a token that was added as it is.
    return b"".join(
        bytes([table[char]]) if char in table else char.encode() for char in piece
    )


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
