"""Tokenizers of the transformers library, as bytes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from multicolm.errors import InputError, VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.chats import (
    hidden_in,
    no_template,
    plain_template,
    rendered,
    replaced,
    strings_in,
)
from multicolm.tokenizer.cuts import Cuts, cuts_of
from multicolm.types import Message

__all__ = ["HuggingFaceTokenizer"]

_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_PREFIXING = ("normalizer", "pre_tokenizer")
_PRIVATE = range(0x100000, 0x10FFFE)  # the last of Unicode's planes is for private use
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SHORT = 1024  # characters, which are tokens in 2 milliseconds


class HuggingFaceTokenizer(TokenizerAdapter):
    """Adapter of a fast tokenizer whose decoder is byte-level or SentencePiece-like.

    Args:
        tokenizer: a fast tokenizer (one with a ``backend_tokenizer``).
        name: the model's name, for messages.
        end_ids: tokens with which the model ends a text, besides the tokenizer's own.
        n_embeddings: how many tokens the model can read; those after are none of its tokens.

    Raises:
        VocabularyError: if its tokens cannot be turned into bytes one by one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        end_ids: Iterable[int] = (),
        *,
        n_embeddings: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        spelled = _decoder_of(tokenizer, name)
        pieces = tokenizer.get_vocab()
        n_known = max(pieces.values()) + 1
        self.n_tokens = n_known if n_embeddings is None else min(n_known, n_embeddings)
        self._pieces: list[str | None] = [None] * n_known
        for piece, token_id in pieces.items():
            self._pieces[token_id] = piece
        self._specials = {
            token_id: str(token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        own_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.end_ids = frozenset(i for i in {*own_end, *end_ids} if 0 <= i < self.n_tokens)
        own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        self._is_added = [bool(own.get(piece) != i) for i, piece in enumerate(self._pieces)]
        self._bytes = self._byte_table(spelled)

    def _byte_table(self, spelled: Callable[[str], bytes]) -> list[bytes]:
        table: list[bytes] = []
        for token_id, piece in enumerate(self._pieces):
            if piece is None or token_id in self._specials:
                table.append(b"")
            elif spelled is _byte_level and self._is_added[token_id]:
                table.append(piece.encode())  # an added token stands for itself
            else:
                table.append(spelled(piece))
        return table

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own beginning-of-text token if it has one.

        What the tokenizer puts after a text is left off: a prompt goes on.

        Raises:
            InputError: if the text holds a token that the model's weights do not know.
        """
        return self._readable([*self._front, *_encoded(self._outer, text)])

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a prompt in which names of special tokens stand for these tokens.

        Raises:
            InputError: if the text holds a token that the model's weights do not know.
        """
        start = self._specials.get(self._front[0]) if self._front else None
        has_start = start is not None and text.startswith(start)
        ids = self._encode_with_specials(text)
        return self._readable(ids if has_start else [*self._front, *ids])

    @cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts at the start of a text, and not what it puts at the end."""
        # An empty text does not show which of the tokens around it stand in front.
        for text in ("a", "0", ".", " "):
            encoded = self._outer.encode(text, add_special_tokens=True)
            if 0 in (mask := encoded.special_tokens_mask):
                return list(encoded.ids[: mask.index(0)])
        return []

    def _encode_with_specials(self, text: str) -> list[int]:
        return _encoded(self._with_specials, text)

    @cached_property
    def _with_specials(self) -> Any:
        """The tokenizer that reads names of special tokens, a copy that nobody else sets up."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _readable(self, ids: list[int]) -> list[int]:
        for token_id in ids:
            if token_id >= self.n_tokens:
                raise InputError(
                    f"the tokenizer of model '{self._name}' has a token "
                    f"{self._pieces[token_id]!r} (id {token_id}) that its weights do not know "
                    f"(they know {self.n_tokens}); leave it out of the text."
                )
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues another."""
        return self._readable(_encoded(self._inner, text))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What transformers loaded."""
        return self._tokenizer

    @property
    def start_ids(self) -> list[int]:
        """What the tokenizer puts at the start of a text, or else its own first or last token."""
        own = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        named = [i for i in own if isinstance(i, int) and i < self.n_tokens]
        return self.encode("") or named[:1] or super().start_ids

    @cached_property
    def cuts(self) -> Cuts | None:
        """Where texts can be cut; ``None`` for a tokenizer of an unknown manner."""
        pieces = self._tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        return cuts_of(self.settings, pieces)

    @property
    def settings(self) -> dict[str, object]:
        """How continuations are cut: the ``tokenizer.json`` without what is put in front."""
        settings: dict[str, object] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        settings.update({part: _without_prefix(settings[part]) for part in _PREFIXING})
        return settings

    @cached_property
    def _outer(self) -> Any:
        """The tokenizer for text at the start of a prompt, in which no special is seen."""
        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return _without_specials(settings, self._stand_ins)

    @cached_property
    def _inner(self) -> Any:
        """The tokenizer for text in mid-text: no space is put in front, no special is seen."""
        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        if all(settings[part] == _without_prefix(settings[part]) for part in _PREFIXING):
            return self._outer
        return _without_specials(self.settings, self._stand_ins)

    @property
    def chat_template(self) -> str | None:
        """The template for every chat, if it has one."""
        template = self._tokenizer.chat_template
        found = template.get("default") if isinstance(template, dict) else template
        return found or None

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat in the model's own template, ready for the reply.

        Raises:
            InputError: if there are templates for some chats only, or the template refuses these.
        """
        # What the tokenizer puts at the start of a text is in the template if it should be there.
        text, hides = self._rendered(messages)
        if not hides:
            return self._readable(self._encode_with_specials(text))
        # The names that are left are the template's: they and those of the messages change places.
        text = replaced(text, {**self._stand_ins, **self._names})
        return self._readable(_encoded(self._of_stand_ins, text))

    def chat_text(self, messages: Sequence[Message]) -> str:
        """A chat in the model's own template, with names of special tokens.

        Raises:
            InputError: if there are templates for some chats only, or the template refuses these.
        """
        text, hides = self._rendered(messages)
        return replaced(text, self._names) if hides else text

    def _rendered(self, messages: Sequence[Message]) -> tuple[str, bool]:
        """A chat in the template, and whether stand-ins hide names that are text of a message."""
        if not self.chat_template and self._tokenizer.chat_template:
            raise no_template(self._name, self._tokenizer.chat_template)
        stand_ins = self._stand_ins
        if not any(name in text for text in strings_in(messages) for name in stand_ins):
            return rendered(self._name, self._in_template, messages), False
        hidden = hidden_in(messages, stand_ins)
        return rendered(self._name, self._in_template, hidden, stand_ins), True

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name of a special token for each stand-in."""
        return {stand_in: name for name, stand_in in self._stand_ins.items()}

    def _in_template(self, messages: list[dict[str, Any]], args: Mapping[str, Any]) -> Any:
        return self._tokenizer.apply_chat_template(
            messages,
            chat_template=None if self.chat_template else self._plain_template,
            add_generation_prompt=True,
            tokenize=False,
            start_of_text="".join(self._specials.get(i, "") for i in self._front),
            **{**self.template_args, **args},
        )

    @cached_property
    def _plain_template(self) -> str:
        return plain_template(self._name)

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """Per name of a special token, private characters that no text will happen to hold.

        They are drawn anew for every tokenizer: whoever writes a text cannot know them either.
        """
        secret = "".join(chr(secrets.choice(_PRIVATE)) for _ in range(8))
        return {name: secret + chr(_PRIVATE[i]) for i, name in enumerate(self._specials.values())}

    @cached_property
    def _of_stand_ins(self) -> Any:
        """The tokenizer whose special tokens are called by their stand-ins."""
        from tokenizers import Tokenizer

        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        tokenizer = Tokenizer.from_str(json.dumps(_renamed(settings, self._stand_ins)))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for special tokens and ids without a token."""
        return self._bytes[token_id]

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token; ``None`` for tokens of text."""
        return self._specials.get(token_id)

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        return self._pieces[token_id]

    def is_added(self, token_id: int) -> bool:
        """Whether the token is in no merge list or score table, only in the list of added ones."""
        return self._is_added[token_id]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it.

    Other threads run while a long text is read: the library lets go of Python's lock for batches
    only.
    """
    if len(text) <= _SHORT:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    [encoded] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoded.ids)


def _without_specials(settings: Mapping[str, Any], stand_ins: Mapping[str, str]) -> Any:
    """A tokenizer for which names of special tokens are text.

    Args:
        settings: its ``tokenizer.json``.
        stand_ins: what no text holds, for each name; a Unigram model would find the names again.
    """
    from tokenizers import Tokenizer

    unigram = (settings.get("model") or {}).get("type") == "Unigram"
    renamed = _renamed(settings, stand_ins) if unigram else settings
    tokenizer = Tokenizer.from_str(json.dumps(renamed))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _renamed(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a tokenizer some of whose tokens have other names; ids stay."""
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in settings.get("added_tokens") or ()
    ]
    model = dict(settings["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    elif isinstance(vocab, list):  # of pieces and scores, in a Unigram model
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return {**settings, "added_tokens": added, "model": model}


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
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse", "Strip"}:
        return _byte_level
    if kinds & {"Replace", "Metaspace"} and kinds <= _SENTENCEPIECE:
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
    if all(char in table for char in piece):
        return bytes(table[char] for char in piece)
    return piece.encode()  # not written in that alphabet


def _sentencepiece(piece: str) -> bytes:
    if _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text; ``None`` for none."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [p for p in map(_without_prefix, part[key]) if p is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part
