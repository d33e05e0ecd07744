"""Which tokens may follow which, if a text is to be cut as its tokenizer cuts it.

A *path* is a string of tokens. It is *valid* if there is a text whose canonical encoding (as a
continuation, ``TokenizerAdapter.encode_continuation``) begins with it. So every prefix of a valid
path is valid, and the canonical encoding of every text is a valid path. That a path's own bytes
encode to the path is something else: with GPT-2's splits, ``[" ", " "]`` is valid, for ``"  a"``
is ``[" ", " ", "a"]`` where ``" a"`` is no token, although ``"  "`` alone is one token.

For byte-pair encodings validity has two halves: neighbours within a piece of text must be allowed
by the merges (:mod:`multicolm.exact.boundaries`), and pieces must end where the pre-tokenizer cuts,
which later characters may still decide (:mod:`multicolm.exact.pretokens`). A path that meets
both is valid unless it cannot be finished (half a character that no token completes); that is
searched for where a text may not end.

Covered are byte-level BPE (in the manner of GPT-2, Llama 3, Qwen) and SentencePiece-like BPE with
byte fallback (Llama 2, Mistral, Gemma). A normalizer to NFC is left out: texts are followed as they
stand. What is not covered is said by :func:`multicolm.exact.paths.covers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["Canonical", "State", "sorted_slots"]

State = Hashable
"""What a path leaves: all that decides which tokens may follow it."""


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


def sorted_slots(adapter: TokenizerAdapter, ids: Iterable[int]) -> tuple[list[int], list[bytes]]:
    """Tokens with bytes in the order of their bytes: their ids, and the bytes."""
    contents = {token_id: adapter.token_bytes(token_id) for token_id in ids}
    ordered = sorted((content, token_id) for token_id, content in contents.items() if content)
    return [token_id for _, token_id in ordered], [content for content, _ in ordered]
