"""How few tokens a text can have, known without reading it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from multicolm.exact.plan import NotCovered, plan_of
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["least_tokens"]

# How many times shorter NFC makes a text: at most 3, in UTF-8 (Unicode Standard Annex 15, table 9).
_COMPOSED = 3

_longest: WeakKeyDictionary[TokenizerAdapter, int | None] = WeakKeyDictionary()


def least_tokens(tokenizer: TokenizerAdapter, content: bytes) -> int:
    """A number of tokens that a text has in any case; 0 if nothing is known.

    A tokenizer that writes every byte of a text needs a token for each stretch of the longest one,
    be it text or the name of a special token.
    """
    if tokenizer not in _longest:
        _longest[tokenizer] = _most_bytes(tokenizer)
    longest = _longest[tokenizer]
    if longest is None:
        return 0
    return -(-len(content.translate(None, tokenizer.dropped_bytes or b"")) // longest)


def _most_bytes(tokenizer: TokenizerAdapter) -> int | None:
    """How many bytes of a text one token can stand for; ``None`` if that is not known."""
    contents = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.n_tokens)]
    names = (tokenizer.special_name(token_id) or "" for token_id in range(tokenizer.n_tokens))
    longest = max(len(content) for content in (*contents, *(name.encode() for name in names), b""))
    if tokenizer.dropped_bytes is not None:
        return longest or None
    settings = tokenizer.settings
    if settings is None:
        return None
    try:
        plan_of(settings)
    except NotCovered:
        return None  # it may drop blanks, or make one token of a word that it does not know
    has_all_bytes = len({content for content in contents if len(content) == 1}) == 256
    return longest * _COMPOSED if has_all_bytes else None
