"""Whether the valid paths of a tokenizer are known, and if so which they are."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool

from multicolm.errors import VocabularyError
from multicolm.exact.byte_pairs import BytePairs
from multicolm.exact.canonical import Canonical, State, sorted_slots
from multicolm.exact.plan import NotCovered
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.literal import LiteralTokenizer

__all__ = ["canonical", "covers"]

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
    return BytePairs(adapter, settings)


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
