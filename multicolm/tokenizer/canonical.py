"""Which tokens may follow which, if a text is to be cut as its tokenizer cuts it.

A *path* is a string of tokens. It is *valid* if there is a text whose canonical encoding (as a
continuation, ``TokenizerAdapter.encode_continuation``) begins with it. So every prefix of a valid
path is valid, and the canonical encoding of every text is a valid path. That a path's own bytes
encode to the path is something else: with GPT-2's splits, ``[" ", " "]`` is valid, for ``"  a"``
is ``[" ", " ", "a"]`` where ``" a"`` is no token, although ``"  "`` alone is one token.

For byte-pair encodings validity has two halves: neighbours within a piece of text must be allowed
by the merges (:mod:`multicolm.tokenizer.seams`), and pieces must end where the pre-tokenizer cuts,
which later characters may still decide (:mod:`multicolm.tokenizer.pretokens`). A path that meets
both is valid unless it cannot be finished (half a character that no token completes); that is
searched for where a text may not end.

Covered are byte-level BPE (in the manner of GPT-2, Llama 3, Qwen) and SentencePiece-like BPE with
byte fallback (Llama 2, Mistral, Gemma). A normalizer to NFC is left out: texts are followed as they
stand. What is not covered is said by :func:`covers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int

from multicolm.errors import VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.literal import LiteralTokenizer
from multicolm.tokenizer.plan import NotCovered

__all__ = ["Canonical", "State", "canonical", "covers", "sorted_slots"]

State = Hashable
"""What a path leaves behind: all that decides which tokens may follow it."""


class Canonical(ABC):
    """The valid paths of one tokenizer.

    Tokens of text are numbered by *slots*, in the order of their bytes, so that the tokens that
    begin with some bytes are a range.

    Attributes:
        ids: per slot, the token's id.
        contents: per slot, the token's bytes.
        start: the state of the empty path.
    """

    ids: Int[np.ndarray, "slots"]
    contents: list[bytes]
    start: State

    @abstractmethod
    def allowed(self, state: State) -> Bool[np.ndarray, "slots"]:
        """Which tokens may follow; do not change it."""

    @abstractmethod
    def may_end(self, state: State) -> bool:
        """Whether the path is the canonical encoding of its bytes as a complete text."""

    @abstractmethod
    def after(self, state: State, slot: int) -> State:
        """The state after one more token, one of the allowed."""

    @cached_property
    def slot_of(self) -> dict[int, int]:
        """The slot of each token of text, by its id."""
        return {token_id: slot for slot, token_id in enumerate(self.ids.tolist())}


_made: WeakKeyDictionary[TokenizerAdapter, Canonical | str] = WeakKeyDictionary()


def covers(adapter: TokenizerAdapter) -> str | None:
    """Why the valid paths of a tokenizer are not known here, in one sentence; ``None`` if they are.

    The first call for a tokenizer reads its merges, which takes seconds for a large vocabulary.
    """
    known = _canonical(adapter)
    return known if isinstance(known, str) else None


def canonical(adapter: TokenizerAdapter) -> Canonical:
    """The valid paths of a tokenizer; worked out once for each.

    Raises:
        VocabularyError: if the tokenizer is not covered.
    """
    known = _canonical(adapter)
    if isinstance(known, str):
        raise VocabularyError(known)
    return known


def _canonical(adapter: TokenizerAdapter) -> Canonical | str:
    if adapter not in _made:
        try:
            _made[adapter] = _make(adapter)
        except NotCovered as reason:
            _made[adapter] = (
                f"the exact byte bridge does not cover this tokenizer: {reason}; it covers "
                "byte-level BPE and SentencePiece BPE with byte fallback."
            )
    return _made[adapter]


def _make(adapter: TokenizerAdapter) -> Canonical:
    if isinstance(adapter, LiteralTokenizer):
        return _LongestFirst(adapter)
    settings = adapter.settings
    if settings is None:
        raise NotCovered("it does not say how it cuts a text")
    from multicolm.tokenizer.byte_pairs import BytePairs

    return BytePairs(adapter, settings)


def sorted_slots(adapter: TokenizerAdapter, ids: Iterable[int]) -> tuple[list[int], list[bytes]]:
    """Tokens with bytes in the order of their bytes: their ids, and the bytes."""
    contents = {token_id: adapter.token_bytes(token_id) for token_id in ids}
    ordered = sorted((content, token_id) for token_id, content in contents.items() if content)
    return [token_id for _, token_id in ordered], [content for content, _ in ordered]


class _LongestFirst(Canonical):
    """Paths of a tokenizer that takes the longest token that fits.

    A state holds what would still have to follow for a longer token to have fitted somewhere.
    """

    start: State = frozenset()

    def __init__(self, adapter: LiteralTokenizer) -> None:
        texts = (i for i in range(adapter.n_tokens) if adapter.special_name(i) is None)
        ids, self.contents = sorted_slots(adapter, texts)
        self.ids = np.array(ids, dtype=np.int64)
        self._masks: dict[State, Bool[np.ndarray, "slots"]] = {}

    def allowed(self, state: State) -> Bool[np.ndarray, "slots"]:
        """Tokens with which no longer token would have fitted before."""
        assert isinstance(state, frozenset)
        if state not in self._masks:
            flags = [not any(c.startswith(rest) for rest in state) for c in self.contents]
            self._masks[state] = np.array(flags, dtype=bool)
        return self._masks[state]

    def may_end(self, state: State) -> bool:
        """Always: the longest tokens that fit are those that are there."""
        return True

    def after(self, state: State, slot: int) -> State:
        """What is left of longer tokens that are still possible."""
        assert isinstance(state, frozenset)
        new, n = self.contents[slot], len(self.contents[slot])
        longer = {c[n:] for c in self.contents if len(c) > n and c.startswith(new)}
        return frozenset(longer | {rest[n:] for rest in state if rest.startswith(new)})
