"""A score table: per position of a corpus, what every model gave to the token that stands there.

All that a frozen ensemble has to be asked for training and calibration is in here, so that no model
needs to be loaded for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.errors import ArtefactError
from multicolm.views import ModelNames

__all__ = ["ScoreTable"]


@dataclass(frozen=True)
class ScoreTable:
    """What every model gave to every token of a corpus' completions.

    A position is a place before one token of a completion; ``gold`` is the token that stands
    there. All token ids are of the shared vocabulary. Models are in the ensemble's order.

    Attributes:
        models: the names, the base model first.
        gold_ids: the token of the corpus; the end of a text is the base model's end token.
        gold_logprobs: its log-probability under every model, in nats; -inf where a model cannot
            write it. The end of a text has the summed probability of all of a model's end tokens.
        known: whether a model could score the position at all (its context reaches that far).
        top1_ids: every model's most likely token; an end token of its own counts as gold's.
        top1_logprobs: its log-probability, in nats.
        entropies: every model's entropy, in nats.
        margins: every model's most likely probability minus the second's.
        example: which text of the corpus a position belongs to, from 0.
        place: how many tokens of the completion stand before it.
        base: features of the base model, if they were asked for: ``hidden`` [positions, hidden]
            after the final norm, ``topk`` [positions, k] log-probabilities in descending order,
            ``embedding`` [positions, width] input embedding of its most likely token.
        costs: of one forward pass per model, in the ensemble's unit.
        identities: per model what it is; empty where that is not known.
        digest: of the corpus.
    """

    models: ModelNames
    gold_ids: Int[Tensor, "positions"]
    gold_logprobs: Float[Tensor, "positions models"]
    known: Bool[Tensor, "positions models"]
    top1_ids: Int[Tensor, "positions models"]
    top1_logprobs: Float[Tensor, "positions models"]
    entropies: Float[Tensor, "positions models"]
    margins: Float[Tensor, "positions models"]
    example: Int[Tensor, "positions"]
    place: Int[Tensor, "positions"]
    base: Mapping[str, Tensor]
    costs: tuple[float, ...] = ()
    identities: tuple[str, ...] = ()
    digest: str = ""

    def __len__(self) -> int:
        return int(self.gold_ids.shape[0])

    @property
    def n_models(self) -> int:
        """The base model and its assistants."""
        return len(self.models)

    @cached_property
    def correct(self) -> Bool[Tensor, "positions models"]:
        """Whether a model's most likely token is the one that stands there."""
        return (self.top1_ids == self.gold_ids[:, None]) & self.known

    def feature(self, name: str) -> Float[Tensor, "positions width"]:
        """A feature of the base model, in float32.

        Raises:
            ArtefactError: if the table was made without it.
        """
        if name not in self.base:
            flag = {"hidden": "--hidden", "topk": "--topk 100"}.get(name, f"--{name}")
            raise ArtefactError(
                f"this score table holds no '{name}' of the base model; make one with "
                f"`multicolm score ... {flag}`."
            )
        return self.base[name].float()

    def rows(self, which: Tensor) -> ScoreTable:
        """Some of the positions, by mask or by numbers."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = value[which]
        base = {name: feature[which] for name, feature in self.base.items()}
        return replace(self, **changed, base=base)

    def merged(self, open_: Bool[Tensor, "positions bridged"]) -> ScoreTable:
        """Positions merged into spans that begin and end between tokens of every model.

        A span's numbers are those of its first position; its log-probabilities are summed, and it
        is known where all of its positions are.

        Args:
            open_: per position and model of another vocabulary than the base model's, whether one
                of the model's own tokens begins there; true at the first position of every text.
        """
        begins = open_.all(-1)
        span = begins.long().cumsum(0) - 1
        first = self.rows(begins)
        zeros = torch.zeros_like(first.gold_logprobs)
        n_unknown = zeros.index_add(0, span, (~self.known).to(zeros.dtype))
        return replace(
            first,
            gold_logprobs=zeros.index_add(0, span, self.gold_logprobs),
            known=n_unknown == 0,
        )

    def split(self, held_out: float, seed: int) -> tuple[ScoreTable, ScoreTable]:
        """Positions to learn from, and those of a held-out part of the texts.

        Whole texts are held out, chosen by ``seed`` alone, so that equal tables split equally.

        Args:
            held_out: part of the texts, 0 up to (not including) 1.
            seed: of the choice.
        """
        texts = torch.unique(self.example)
        n_held_out = min(len(texts) - 1, round(held_out * len(texts)))
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        mask = torch.isin(self.example, texts[order[:n_held_out]])
        return self.rows(~mask), self.rows(mask)
