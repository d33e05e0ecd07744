"""Several models, one vocabulary: the check that it is one, and the small differences there are.

Models of one family share their text tokens id by id, while heads are padded to other widths and
added tokens (chat markers, ends of text) differ. The shared vocabulary is the base model's ids,
followed by the tokens that only assistants have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.errors import VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.vocabulary import TokenAligner, Vocabulary
from multicolm.views import ModelNames

__all__ = ["SharedVocabulary"]


@dataclass(frozen=True)
class _Translation:
    """One model's ids and the shared ids."""

    own_ids: Int[Tensor, "vocab"]  # per shared id the model's own, -1 where it has no such token
    reads: dict[int, tuple[int, ...]]  # what it reads for shared ids it has no token for
    straight: bool  # shared id == own id throughout


class _Known:
    """Shared ids by name, for tokens that need not have the same id in every model.

    Attributes:
        specials: of special tokens.
        texts: of tokens of text, as they are spelled.
    """

    def __init__(self, base: TokenizerAdapter) -> None:
        self.specials: dict[str, int] = {}
        self.texts: dict[str, int] = {}
        for i in range(base.n_tokens):
            special, piece = base.special_name(i), base.piece(i)
            if special is not None:
                self.specials[special] = i
            elif piece is not None:
                self.texts[piece] = i


class SharedVocabulary(Vocabulary):
    """The vocabulary that the models of an ensemble share.

    Attributes:
        size: number of shared ids.
        groups: all models are in group 0.
    """

    def __init__(self, models: ModelNames, tokenizers: Sequence[TokenizerAdapter]) -> None:
        """Join the vocabularies, the base model's first.

        Raises:
            VocabularyError: if the text tokens of two models differ.
        """
        self.models = models
        self.groups = (0,) * len(models)
        self._tokenizers = list(tokenizers)
        n_base = tokenizers[0].n_tokens
        self._owners: list[tuple[int, int]] = [(0, i) for i in range(n_base)]
        known = _Known(tokenizers[0])
        shared_of: list[dict[int, int]] = [{i: i for i in range(n_base)}]
        for k in range(1, len(tokenizers)):
            shared_of.append(self._join(k, known))
        self.size = len(self._owners)
        self._translations = [self._translate(k, ids) for k, ids in enumerate(shared_of)]
        self._end_ids = [
            frozenset(shared_of[k][i] for i in tokenizer.end_ids if i in shared_of[k])
            for k, tokenizer in enumerate(tokenizers)
        ]

    def _join(self, k: int, known: _Known) -> dict[int, int]:
        """Own id -> shared id of model ``k``; tokens that nobody had before are appended.

        Tokens of text must agree id by id. Added ones need not: they are known by their names.
        """
        base, other = self._tokenizers[0], self._tokenizers[k]
        shared: dict[int, int] = {}
        differing: list[int] = []
        for i in range(other.n_tokens):
            special, piece = other.special_name(i), other.piece(i)
            mine = base.piece(i) if i < base.n_tokens and base.special_name(i) is None else None
            if special is not None:
                shared[i] = self._place(k, i, special, known.specials)
            elif piece is None:
                continue
            elif mine == piece:
                shared[i] = i
            elif mine is None or base.is_added(i) or other.is_added(i):
                shared[i] = self._place(k, i, piece, known.texts)
            else:
                differing.append(i)
        if differing:
            raise VocabularyError(self._refusal(k, differing))
        return shared

    def _place(self, k: int, own_id: int, name: str, known: dict[str, int]) -> int:
        if name not in known:
            known[name] = len(self._owners)
            self._owners.append((k, own_id))
        return known[name]

    def _refusal(self, k: int, differing: list[int]) -> str:
        base, other, first = self._tokenizers[0], self._tokenizers[k], differing[0]
        pieces = [t.piece(first) if first < t.n_tokens else None for t in (base, other)]
        return (
            f"models '{self.models[0]}' and '{self.models[k]}' have different tokenizers "
            f"({len(differing)} of {base.n_tokens} tokens differ, the first is id {first}: "
            f"{pieces[0]!r} and {pieces[1]!r}); all models of an ensemble must share one "
            "vocabulary, so choose models of one family."
        )

    def _translate(self, k: int, shared_of: dict[int, int]) -> _Translation:
        own = torch.full((self.size,), -1, dtype=torch.long)
        for own_id, shared_id in shared_of.items():
            own[shared_id] = own_id
        reads: dict[int, tuple[int, ...]] = {}
        for shared_id in (own < 0).nonzero().flatten().tolist():
            # A special token of another model means nothing to this one; text is read as text.
            content = self.token_bytes(shared_id)
            reads[shared_id] = tuple(self._tokenizers[k].encode_bytes(content))
        straight = bool((own == torch.arange(self.size)).all())
        return _Translation(own, reads, straight)

    def follow(self, model: int, prompt: Sequence[int]) -> TokenAligner:
        """Begin to follow a text after a prompt, which is in the model's own tokens."""
        return _SharedAligner(self, model, prompt)

    def read(self, model: int, shared_ids: Sequence[int]) -> list[int]:
        """What ``model`` is fed for these tokens of the shared vocabulary."""
        translation = self._translations[model]
        if translation.straight:
            return list(shared_ids)
        ids: list[int] = []
        for shared_id in shared_ids:
            own = int(translation.own_ids[shared_id])
            ids.extend((own,) if own >= 0 else translation.reads[shared_id])
        return ids

    def own_ids(self, model: int, shared_ids: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """A model's own ids of shared ones; -1 for tokens that it does not have."""
        own = self._translations[model].own_ids
        return own.to(shared_ids.device)[shared_ids]

    def n_read(self, model: int, shared_id: int) -> int:
        """How many tokens ``model`` is fed for one token of the shared vocabulary."""
        translation = self._translations[model]
        if translation.straight or int(translation.own_ids[shared_id]) >= 0:
            return 1
        return len(translation.reads[shared_id])

    def is_straight(self, model: int) -> bool:
        """Whether every shared id is the model's own id, so that texts need no translation."""
        return self._translations[model].straight

    def logits(
        self, model: int, own: Float[Tensor, "positions own_vocab"]
    ) -> Float[Tensor, "positions vocab"]:
        """A model's logits over the shared vocabulary; -inf for tokens that it does not have.

        Columns of a padded head that belong to no token are dropped.
        """
        translation = self._translations[model]
        width = own.shape[-1]
        if translation.straight and width >= self.size:
            return own if width == self.size else own[:, : self.size]
        index = translation.own_ids.to(own.device)
        missing = (index < 0) | (index >= width)
        return own[:, index.clamp(0, width - 1)].masked_fill(missing, float("-inf"))

    def token_bytes(self, shared_id: int) -> bytes:
        """What a token adds to the text; empty for special tokens."""
        owner, own = self._owners[shared_id]
        return self._tokenizers[owner].token_bytes(own)

    def name(self, shared_id: int) -> str:
        """How a trace shows a token: its text, or its special name."""
        owner, own = self._owners[shared_id]
        special = self._tokenizers[owner].special_name(own)
        if special is not None:
            return special
        return self.token_bytes(shared_id).decode("utf-8", errors="backslashreplace")

    def end_ids(self, model: int | None) -> frozenset[int]:
        """Shared ids with which ``model`` ends a text; ``None``: with which any model does."""
        if model is None:
            return frozenset().union(*self._end_ids)
        return self._end_ids[model]


class _SharedAligner(TokenAligner):
    """Reads the text token by token."""

    def __init__(self, vocabulary: SharedVocabulary, model: int, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._straight = vocabulary.is_straight(model)
        self.own = list(prompt)
        self._ends = [len(self.own)]
        self._kept = len(self.own)

    @property
    def n_tokens(self) -> int:
        """How many tokens of the text it has followed."""
        return len(self._ends) - 1

    def extend(self, tokens: Sequence[int], writers: Sequence[int]) -> None:
        """Follow more tokens of the text; who wrote them makes no difference."""
        if self._straight:
            self.own.extend(tokens)
            self._ends.extend(range(self._ends[-1] + 1, self._ends[-1] + 1 + len(tokens)))
            return
        for token in tokens:
            self.own.extend(self._vocabulary.read(self._model, [token]))
            self._ends.append(len(self.own))

    def cut(self, n_tokens: int) -> None:
        """Go back to the first ``n_tokens`` tokens of the text."""
        if n_tokens < self.n_tokens:
            del self._ends[n_tokens + 1 :]
            del self.own[self._ends[-1] :]
            self._kept = min(self._kept, len(self.own))

    def reach(self, place: int) -> int:
        """How many own tokens come before a place of the text."""
        return self._ends[place]

    def pop_stable_prefix(self) -> int:
        """How many own tokens in front have not changed since the last call."""
        kept, self._kept = self._kept, len(self.own)
        return kept
