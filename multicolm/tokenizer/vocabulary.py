"""What the models of an ensemble write in: one set of token ids, which every model can read.

Each model follows the growing text in its own tokens (:class:`TokenAligner`). Where models have one
vocabulary, a token of the text is a token of theirs. Where they do not, what others wrote is read
as bytes, and a token of the text may end in the middle of a model's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.views import ModelNames

__all__ = ["Outcomes", "TokenAligner", "Vocabulary"]


class TokenAligner(ABC):
    """One text as the tokens of one model.

    Attributes:
        own: the model's own tokens, those of the prompt included.
    """

    own: list[int]

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """How many tokens of the text it has followed."""

    @abstractmethod
    def extend(self, tokens: Sequence[int], writers: Sequence[int]) -> None:
        """Follow more tokens of the text.

        Args:
            tokens: in the ensemble's vocabulary.
            writers: per token, the index of the model that wrote it; the number of models for a
                mixture.
        """

    @abstractmethod
    def cut(self, n_tokens: int) -> None:
        """Go back to the first ``n_tokens`` tokens of the text."""

    @abstractmethod
    def reach(self, place: int) -> int | None:
        """How many own tokens come before a place of the text (0 is before its first token).

        ``None`` where an own token lies across the place, so that the model cannot continue there.
        """

    @property
    def is_settled(self) -> bool:
        """Whether its own tokens stay as they are, however the text continues."""
        return True

    @abstractmethod
    def pop_stable_prefix(self) -> int:
        """How many own tokens in front have not changed since the last call, or the beginning."""


class Vocabulary(ABC):
    """The tokens that an ensemble writes with, and every model's way to them.

    Attributes:
        models: the names.
        size: number of ids.
        groups: per model, a number that is equal for models with one vocabulary; the base model's
            is 0.
    """

    models: ModelNames
    size: int
    groups: tuple[int, ...]

    @abstractmethod
    def follow(self, model: int, prompt: Sequence[int]) -> TokenAligner:
        """Begin to follow a text after a prompt, which is in the model's own tokens."""

    @abstractmethod
    def read(self, model: int, ids: Sequence[int]) -> list[int]:
        """The model's own tokens for ids that stand alone, as in a prompt of ids."""

    @abstractmethod
    def n_read(self, model: int, token: int) -> int:
        """How many own tokens the model reads for a token of the text, at most."""

    @abstractmethod
    def own_ids(self, model: int, ids: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """A model's own ids; -1 for tokens that it does not have."""

    @abstractmethod
    def logits(
        self, model: int, own: Float[Tensor, "positions own_vocab"]
    ) -> Float[Tensor, "positions vocab"]:
        """A model's logits over all ids; -inf for tokens that it does not have.

        Columns of a padded head that belong to no token are dropped.
        """

    def first_tokens(self, model: int) -> Int[Tensor, "vocab"]:
        """Per id, that of the first token with which a model spells the same text itself.

        A token that the model has is its own first one. A space alone in front is passed over.
        """
        return torch.arange(self.size)

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; empty for special tokens."""

    @abstractmethod
    def name(self, token: int) -> str:
        """How a trace shows a token: its text, or its special name."""

    @abstractmethod
    def end_ids(self, model: int | None) -> frozenset[int]:
        """Ids with which ``model`` ends a text; ``None``: with which any model does."""

    @property
    def is_shared(self) -> bool:
        """Whether all models have one vocabulary."""
        return not any(self.groups)

    def is_straight(self, model: int) -> bool:
        """Whether every id is the model's own, so that texts need no translation."""
        return False

    @cached_property
    def starts_word(self) -> Bool[Tensor, "vocab"]:
        """Per token, whether it begins a new word: white space in front, or a special token."""
        flags = []
        for token in range(self.size):
            content = self.token_bytes(token)
            flags.append(not content or content[:1].isspace())
        return torch.tensor(flags)

    def extends(self, ids: Int[Tensor, "n"]) -> Bool[Tensor, "n vocab"]:
        """Per given token, which tokens begin with its text; itself is one of them.

        A special token and one of white space alone, which is no part of a word, are extended by
        themselves alone.
        """
        first, last = (bound.to(ids.device) for bound in self._extensions)
        return (first >= first[ids, None]) & (first <= last[ids, None])

    @cached_property
    def _extensions(self) -> tuple[Int[Tensor, "vocab"], Int[Tensor, "vocab"]]:
        """Per token, the places of the first and the last text that begins with its own.

        Places are those in the sorted texts of all tokens, in which such texts are neighbours.
        """
        texts = [self.token_bytes(token) for token in range(self.size)]
        ordered = sorted({text for text in texts if text})
        last = [0] * len(ordered)
        open_: list[int] = []  # the texts that the current one begins with, the shortest first
        for place, text in enumerate(ordered):
            while open_ and not text.startswith(ordered[open_[-1]]):
                last[open_.pop()] = place - 1
            open_.append(place)
        for place in open_:
            last[place] = len(ordered) - 1
        place_of = {text: place for place, text in enumerate(ordered)}
        own = [place_of.get(text, len(ordered) + token) for token, text in enumerate(texts)]
        for text, place in place_of.items():
            last[place] = place if text.isspace() else last[place]
        ends = [last[place] if place < len(ordered) else place for place in own]
        return torch.tensor(own), torch.tensor(ends)


class Outcomes(Vocabulary):
    """What may come next where that is no token of a model: the same for all models.

    Models follow such a text in a way of their own and not token by token, so that nothing is
    translated.

    Attributes:
        end: the id of the end of a text.
    """

    end: int

    def __init__(self, models: ModelNames, size: int, end: int) -> None:
        self.models = models
        self.size = size
        self.end = end
        self.groups = (0,) * len(models)

    def follow(self, model: int, prompt: Sequence[int]) -> TokenAligner:
        """Not by tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a text of a {type(self).__name__} is not followed by tokens")

    def read(self, model: int, ids: Sequence[int]) -> list[int]:
        """Not by tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a text of a {type(self).__name__} is not read by tokens")

    def n_read(self, model: int, token: int) -> int:
        """As many own tokens as bytes at most."""
        return len(self.token_bytes(token))

    def own_ids(self, model: int, ids: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """Outcomes are nobody's own tokens."""
        return torch.full_like(ids, -1)

    def logits(
        self, model: int, own: Float[Tensor, "positions own_vocab"]
    ) -> Float[Tensor, "positions vocab"]:
        """What models show of them is the same for all."""
        return own

    def end_ids(self, model: int | None) -> frozenset[int]:
        """The end is the same for all."""
        return frozenset({self.end})
