"""The tokenizer that a GGUF file brings along, as bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from multicolm.backend.llama_cpp.library import Weights, library
from multicolm.errors import VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.chats import hidden_in, plain_template, rendered, strings_in
from multicolm.types import Message

__all__ = ["LlamaCppTokenizer", "vocabulary_pieces"]

_PRIVATE = 0xF0000  # the first of the characters that stand for nothing in Unicode
_PROBES = ("What is 2 * x + 15?", "two  blanks,\ttabs and\nnew lines ", "café, 你好, 😀", " x")


class LlamaCppTokenizer(TokenizerAdapter):
    """Adapter of the vocabulary in a GGUF file, cut into tokens by llama.cpp.

    Args:
        name: the model's name, for messages.
        path: the file.
        weights: the opened file.
        chat_template: jinja text, instead of the file's own.

    Raises:
        VocabularyError: if llama.cpp would have to guess how the file's tokenizer cuts texts, or
            texts do not come back from its tokens.
    """

    def __init__(
        self, name: str, path: Path, weights: Weights, chat_template: str | None = None
    ) -> None:
        lib = library()
        self._name = name
        self._path = path
        self._weights = weights
        self._template = chat_template
        if weights.metadata("tokenizer.ggml.model") == "gpt2" and weights.metadata(
            "tokenizer.ggml.pre"
        ) in (None, "default"):
            raise VocabularyError(
                f"model '{name}': {path.name} does not say how its tokenizer cuts texts "
                "(tokenizer.ggml.pre); name the model's own tokenizer, `tokenizer: folder or Hub "
                "id`."
            )
        vocabulary = weights.vocabulary
        self._pieces = vocabulary_pieces(weights)
        self.n_tokens = len(self._pieces)
        attributes = [int(lib.llama_vocab_get_attr(vocabulary, i)) for i in range(self.n_tokens)]
        special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        self._special = [bool(attribute & special) for attribute in attributes]
        strips = lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP
        self._drops_blanks = any(attribute & strips for attribute in attributes)
        self._added = [bool(a & lib.LLAMA_TOKEN_ATTR_USER_DEFINED) for a in attributes]
        self._bytes = [
            b"" if piece is None or self._special[i] else _bytes(vocabulary, i)
            for i, piece in enumerate(self._pieces)
        ]
        self.end_ids = frozenset(
            i for i in range(self.n_tokens) if lib.llama_vocab_is_eog(vocabulary, i)
        )
        self._bos = self._named("bos", int(lib.llama_vocab_bos(vocabulary)))
        self._eos = self._named("eos", int(lib.llama_vocab_eos(vocabulary)))
        self._front = self._bos if lib.llama_vocab_get_add_bos(vocabulary) else []
        for probe in _PROBES:
            if not self.covers_text(probe):
                raise VocabularyError(
                    f"model '{name}': {probe!r} does not come back from the tokens of {path.name}; "
                    "name the model's own tokenizer, `tokenizer: folder or Hub id`."
                )

    def _named(self, role: str, token_id: int) -> list[int]:
        """The token of a role, where the file has one; llama.cpp makes one up where it has not."""
        is_given = self._weights.metadata(f"tokenizer.ggml.{role}_token_id") is not None
        is_token = 0 <= token_id < self.n_tokens
        return [token_id] if is_token and (is_given or self._special[token_id]) else []

    @property
    def dropped_bytes(self) -> bytes | None:
        """Those without a token, in the kinds of tokenizers that normalise nothing."""
        kind = self._weights.metadata("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama") or self._drops_blanks:
            return None
        return bytes({*range(256)} - {content[0] for content in self._bytes if len(content) == 1})

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, after the one beginning-of-text token that the file asks for."""
        return self._front + _tokenize(self._weights.vocabulary, text)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a prompt in which names of special tokens stand for these tokens."""
        ids = _tokenize(self._weights.vocabulary, text, read_specials=True)
        return ids if ids[:1] == self._front else self._front + ids

    @property
    def start_ids(self) -> list[int]:
        """What the file puts at the start of a text, or else its first or last token of texts."""
        return self._front or self._bos or self._eos or super().start_ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues another."""
        return _tokenize(self._inner.vocabulary, text)

    @cached_property
    def _inner(self) -> Weights:
        """The vocabulary for text in mid-text, which gets no space in front."""
        vocabulary = self._weights.vocabulary
        if b"".join(_bytes(vocabulary, i) for i in _tokenize(vocabulary, "a")) == b"a":
            return self._weights
        return Weights(self._name, self._path, vocabulary_only=True, space_prefix=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat in the file's template, ready for the reply.

        Special tokens are those that the template writes; their names in a message are text.

        Raises:
            InputError: if the template refuses the messages.
        """
        # What stands at the start of a text is in the template if it should be there.
        vocabulary, ids = self._weights.vocabulary, self._special_ids
        texts = strings_in(messages)
        if not any(self._special_pattern.search(text) for text in texts):
            text = rendered(self._name, self._in_template, messages)
            return _tokenize(vocabulary, text, read_specials=True)
        used = set().union(*texts)
        free = (chr(code) for code in range(_PRIVATE, 0x110000) if chr(code) not in used)
        stand_ins = dict(zip(ids, free, strict=False))
        meant = {ord(stand_in): name for name, stand_in in stand_ins.items()}
        encoded: list[int] = []
        text = rendered(self._name, self._in_template, hidden_in(messages, stand_ins), stand_ins)
        for part in self._special_pattern.split(text):
            if part in ids:
                encoded.append(ids[part])
            elif part:
                encoded += _tokenize(vocabulary, part.translate(meant))
        return encoded

    @cached_property
    def chat_template(self) -> str | None:
        """The user's template or the file's own, if there is one."""
        if self._template is not None:
            return self._template
        own = library().llama_model_chat_template(self._weights.pointer, None)
        return str(own.decode("utf-8", "replace")) if own else None

    @cached_property
    def _plain_template(self) -> str:
        return plain_template(self._name)

    def _in_template(self, messages: list[dict[str, Any]], args: Mapping[str, Any]) -> Any:
        """A chat as the template writes it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        ids = {"bos_token": self._bos, "eos_token": self._eos, "start_of_text": self._front}
        names: dict[str, Any] = {role: self._pieces[i[0]] if i else "" for role, i in ids.items()}
        result: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.chat_template or self._plain_template,
            add_generation_prompt=True,
            **{**names, **self.template_args, **args},
        )
        return result[0][0]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for special tokens and ids without a token."""
        return self._bytes[token_id]

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token; ``None`` for tokens of text."""
        return self._pieces[token_id] if self._special[token_id] else None

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; ``None`` for padding of the vocabulary."""
        return self._pieces[token_id]

    def is_added(self, token_id: int) -> bool:
        """Whether the file says that the token was added to the vocabulary."""
        return self._added[token_id] or self._special[token_id]


def vocabulary_pieces(weights: Weights) -> list[str | None]:
    """The tokens of a GGUF file by id, as it spells them; ``None`` for padding."""
    lib, vocabulary = library(), weights.vocabulary
    pieces: list[str | None] = []
    for i in range(lib.llama_vocab_n_tokens(vocabulary)):
        unused = lib.llama_vocab_get_attr(vocabulary, i) & lib.LLAMA_TOKEN_ATTR_UNUSED
        text = None if unused else lib.llama_vocab_get_text(vocabulary, i)
        pieces.append(None if text is None else text.decode("utf-8", "surrogateescape"))
    return pieces


def _bytes(vocabulary: Any, token_id: int) -> bytes:
    buffer = ctypes.create_string_buffer(64)
    n = library().llama_token_to_piece(vocabulary, token_id, buffer, len(buffer), 0, False)
    if n < 0:
        buffer = ctypes.create_string_buffer(-n)
        n = library().llama_token_to_piece(vocabulary, token_id, buffer, len(buffer), 0, False)
    return buffer.raw[:n]


def _tokenize(vocabulary: Any, text: str, *, read_specials: bool = False) -> list[int]:
    """Tokens of a text, with nothing special in front."""
    lib, content = library(), text.encode()
    size = len(content) + 8
    ids = (lib.llama_token * size)()
    n = lib.llama_tokenize(vocabulary, content, len(content), ids, size, False, read_specials)
    return [int(token_id) for token_id in ids[:n]]
