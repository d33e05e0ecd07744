"""Which bridge leads from one model's tokens to another's, and what there is to know of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch

from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary

__all__ = ["BridgeKind", "Pair", "pairs"]

BridgeKind = Literal["shared", "boundary", "exact"]
"""How one model hands over to another: between any two tokens of their common vocabulary, where a
token of both ends, or anywhere, by summing over the ways to spell the text."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models of an ensemble.

    Attributes:
        one: the name of the first.
        other: the name of the second.
        bridge: between them.
        shared: part of the other's tokens of text that the first one has too, by their bytes.
        same_split: whether both cut a text into the same pieces before they make tokens of it.
        specials: special tokens of the other that are the same event for the first, by name; an
            end of a text that is called otherwise by each, as ``one = other``.
        reason: why it is not the exact bridge, if that was asked for.
    """

    one: str
    other: str
    bridge: BridgeKind
    shared: float
    same_split: bool
    specials: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        """One line for people."""
        reason = (
            "one vocabulary"
            if self.bridge == "shared"
            else f"{100 * self.shared:.0f} % of the tokens of '{self.other}' are in '{self.one}', "
            f"{'the same' if self.same_split else 'different'} pre-tokenizers"
        )
        mapped = f"special tokens in common: {', '.join(self.specials) or 'none'}"
        why = f"; not exact: {self.reason}" if self.reason else ""
        return f"{self.one} - {self.other}: {self.bridge} ({reason}; {mapped}{why})"


def pairs(vocabulary: Vocabulary, tokenizers: Sequence[TokenizerAdapter]) -> list[Pair]:
    """What leads from each model to each other.

    Args:
        vocabulary: of the ensemble.
        tokenizers: of its models, in their order.
    """
    return [_pair(vocabulary, tokenizers, i, k) for i, k in combinations(range(len(tokenizers)), 2)]


def _split(tokenizer: TokenizerAdapter) -> object:
    """How it cuts a text into pieces; the tokenizer itself if that is not known."""
    settings = tokenizer.settings
    return id(tokenizer) if settings is None else settings.get("pre_tokenizer")


def _pair(vocabulary: Vocabulary, tokenizers: Sequence[TokenizerAdapter], i: int, k: int) -> Pair:
    one, other = tokenizers[i], tokenizers[k]
    contents = {one.token_bytes(token) for token in range(one.n_tokens)} - {b""}
    theirs = [other.token_bytes(token) for token in range(other.n_tokens)]
    texts = [content for content in theirs if content]
    mine = {name for t in range(one.n_tokens) if (name := one.special_name(t)) is not None}
    specials = [
        name
        for token in range(other.n_tokens)
        if (name := other.special_name(token)) is not None and name in mine
    ]
    bridge: BridgeKind = "boundary"
    refusal = vocabulary.refusals[k] if isinstance(vocabulary, BridgedVocabulary) else ""
    if vocabulary.groups[i] == vocabulary.groups[k]:
        bridge = "shared"
    elif isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k):
        bridge = "exact"
    specials += [n for n in _ends_in_common(vocabulary, tokenizers, i, k) if n not in specials]
    return Pair(
        vocabulary.models[i],
        vocabulary.models[k],
        bridge,
        sum(content in contents for content in texts) / max(1, len(texts)),
        _split(one) == _split(other),
        tuple(specials),
        refusal if bridge == "boundary" else "",
    )


def _ends_in_common(
    vocabulary: Vocabulary, tokenizers: Sequence[TokenizerAdapter], i: int, k: int
) -> list[str]:
    """Ends of a text that are one event for two models, by the name that each has for it."""
    names = []
    for end in sorted(vocabulary.end_ids(i) & vocabulary.end_ids(k)):
        own = [int(vocabulary.own_ids(m, torch.tensor([end]))) for m in (i, k)]
        mine, theirs = (tokenizers[m].special_name(t) for m, t in zip((i, k), own, strict=True))
        names.append(f"{mine} = {theirs}" if mine != theirs else str(mine))
    return names
