"""The numbers of a score table, worked out in a model's own vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.scoring.reading import Reading
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.views import View

__all__ = ["Columns", "Numbers"]

_FLOATS = ("gold_logprobs", "top1_logprobs", "entropies", "margins")


class Numbers:
    """Turns what a model predicts into the numbers of a score table, and forgets the logits.

    Distributions are over the tokens that the model has in the ensemble's vocabulary, as they are
    while texts are written; they are never spread over that vocabulary.

    Args:
        model: that reads.
        k: its index in the ensemble.
        vocabulary: of the ensemble.
        end: the token that stands for the end of a text, if it counts.
        features: what is kept of the model besides: ``hidden``, ``topk``, ``embedding``.
        top_k: how many log-probabilities ``topk`` holds.
    """

    def __init__(
        self,
        model: Model,
        k: int,
        vocabulary: Vocabulary,
        end: int | None,
        features: Sequence[str],
        top_k: int,
    ) -> None:
        self._model = model
        self._end = end
        self._features = features
        self._top_k = top_k
        self._own = vocabulary.own_ids(k, torch.arange(vocabulary.size))
        known = (self._own >= 0).nonzero()[:, 0]
        # Ids of the model's own for which the ensemble has no token stay -1: padding of a head.
        self._shared = torch.full((int(self._own.max()) + 1,), -1, dtype=torch.long)
        self._shared[self._own[known]] = known
        self._padding = self._shared < 0
        ends = torch.tensor(sorted(vocabulary.end_ids(k)), dtype=torch.long)
        self._ends = self._own[ends]

    def of(self, reading: Reading, gold: Int[Tensor, "positions"]) -> dict[str, Tensor]:
        """One value or row per position of a reading, on the CPU.

        Args:
            reading: what the model predicts.
            gold: per position the next token of the text, in the ensemble's vocabulary.
        """
        view = self._view(reading)
        own = self._own[gold].to(reading.own.device)
        has = (own >= 0) & (own < view.n_tokens)
        logprobs = view.logprob_of(torch.where(has, own, 0)).masked_fill(~has, float("-inf"))
        top1 = view.top1_ids
        shared = self._shared.to(top1.device)[top1]
        ends = self._ends[self._ends < view.n_tokens].to(top1.device)
        if self._end is not None and len(ends):
            # Each model ends a text in its own way; all of them mean the same.
            at_end = view.logprobs[:, ends].logsumexp(-1)
            logprobs = torch.where((gold == self._end).to(at_end.device), at_end, logprobs)
            shared = torch.where(torch.isin(top1, ends), self._end, shared)
        found = {
            "gold_logprobs": logprobs,
            "known": torch.ones(len(gold), dtype=torch.uint8),
            "top1_ids": shared.int(),
            "top1_logprobs": view.top1_logprobs,
            "entropies": view.entropy_nats,
            "margins": view.margins,
            **self._kept(view),
        }
        return {name: values.cpu() for name, values in found.items()}

    def _view(self, reading: Reading) -> View:
        n_tokens = min(len(self._shared), reading.own.shape[-1])
        logits = reading.own[:, :n_tokens]
        padding = self._padding[:n_tokens]
        if bool(padding.any()):
            logits = logits.masked_fill(padding.to(logits.device), float("-inf"))
        return View(logits, reading.hidden, embed=self._model.embed, name=self._model.name)

    def _kept(self, view: View) -> Mapping[str, Tensor]:
        kept: dict[str, Tensor] = {}
        if "hidden" in self._features:
            kept["hidden"] = view.hidden
        if "topk" in self._features:
            kept["topk"] = view.topk_logprobs(self._top_k)
        if "embedding" in self._features:
            kept["embedding"] = view.top1_embeddings
        return kept


class Columns:
    """Tensors of a shard that are filled in any order; what is never filled is unknown.

    Attributes:
        filled: per position, whether it is.

    Args:
        n_positions: of the shard.
    """

    def __init__(self, n_positions: int) -> None:
        self.filled = torch.zeros(n_positions, dtype=torch.bool)
        self._tensors: dict[str, Tensor] = {}

    def put(
        self, at: Int[Tensor, "positions"], numbers: Mapping[str, Float[Tensor, "positions ..."]]
    ) -> None:
        """Fill some positions."""
        for name, values in numbers.items():
            if name not in self._tensors:
                shape = (len(self.filled), *values.shape[1:])
                self._tensors[name] = torch.zeros(shape, dtype=values.dtype)
            self._tensors[name][at] = values
        self.filled[at] = True

    def at(self, which: Int[Tensor, "positions"]) -> dict[str, Tensor]:
        """What some positions were filled with."""
        return {name: values[which] for name, values in self._tensors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All columns; of a model that could not read anything, columns of zeros."""
        if not self._tensors:
            n = len(self.filled)
            self._tensors = {name: torch.zeros(n) for name in _FLOATS}
            self._tensors["top1_ids"] = torch.zeros(n, dtype=torch.int32)
            self._tensors["known"] = torch.zeros(n, dtype=torch.uint8)
        return self._tensors
