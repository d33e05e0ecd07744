"""A score table: per position of a corpus, what every model gave to the token that stands there.

All that a frozen ensemble has to be asked for training and calibration is in here, so that no model
needs to be loaded for either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.errors import ArtefactError
from multicolm.views import ModelNames

__all__ = ["ScoreBlocks", "ScoreTable", "held_out_texts"]

_LEAST_QUALITY = 0.01
"""What a roll-out that failed counts as in a likelihood: one failure is no proof."""


@runtime_checkable
class ScoreBlocks(Protocol):
    """Scores that can be read block by block, any number of times: in memory or on disk.

    A :class:`ScoreTable` is one, and so is :class:`multicolm.scoring.store.StoredTable`.
    """

    @property
    def models(self) -> ModelNames:
        """The names, the base model first."""

    @property
    def costs(self) -> tuple[float, ...]:
        """Of one forward pass per model, in the ensemble's unit."""

    @property
    def identities(self) -> tuple[str, ...]:
        """Per model what it is; empty where that is not known."""

    @property
    def digest(self) -> str:
        """Of the corpus."""

    def __len__(self) -> int:
        """Number of positions."""

    def n_blocks(self, size: int) -> int:
        """How many blocks of at most ``size`` positions there are."""

    def blocks(self, size: int, order: Sequence[int] | None = None) -> Iterator[ScoreTable]:
        """Stretches of at most ``size`` positions that follow each other in the corpus.

        Args:
            size: 1 or more.
            order: numbers of the blocks that are wanted, from 0, in the order that is wanted; all
                of them as they stand if not given.
        """


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
        rollouts: mean quality, 0 to 1, of the texts that were finished after each model's most
            likely token; NaN where no text was finished after it. ``None`` without roll-outs.
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
    rollouts: Float[Tensor, "positions models"] | None = None

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

    @cached_property
    def judged(self) -> Bool[Tensor, "positions"]:
        """Where roll-outs say who should write: texts were finished, and one at least was right.

        Where every text failed, the roll-outs say nothing about the token, and what the corpus
        says stands.
        """
        if self.rollouts is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.rollouts.nan_to_num(0.0).amax(-1) > 0

    @cached_property
    def right(self) -> Bool[Tensor, "positions models"]:
        """Whether a model may write here.

        Its most likely token is the one that stands there (:attr:`correct`). Where roll-outs
        judged the position: the text that follows its token comes out best, or as well as the
        best. Several models may be right, the base model among them, where the difference between
        their tokens does not matter.

        Source:
            R2R, arXiv 2505.21600, section 3; CITER, arXiv 2502.01976, section 3.2.
        """
        if self.rollouts is None:
            return self.correct
        quality = self.rollouts.nan_to_num(-1.0)
        best = (quality == quality.amax(-1, keepdim=True)) & self.known
        return torch.where(self.judged[:, None], best, self.correct)

    @cached_property
    def writer_logprobs(self) -> Float[Tensor, "positions models"]:
        """Log-likelihood of each model as the writer, in nats.

        The log-probability of the token that stands there (``gold_logprobs``). Where roll-outs
        judged the position: the logarithm of the mean quality of the texts that follow the model's
        token, 0.01 at least. With pi the probabilities of a router, -log sum_k pi_k exp(this)
        is in both cases minus the log-likelihood of an event: the corpus goes on so, or the text
        comes out right.
        """
        if self.rollouts is None:
            return self.gold_logprobs
        quality = self.rollouts.clamp_min(_LEAST_QUALITY).log()
        use = self.judged[:, None] & ~self.rollouts.isnan()
        return torch.where(use, quality, self.gold_logprobs)

    def feature(self, name: str) -> Float[Tensor, "positions width"]:
        """A feature of the base model, in float32.

        Raises:
            ArtefactError: if the table was made without it.
        """
        if name not in self.base:
            flag = {"hidden": "--hidden", "topk": "--topk 100"}.get(name, f"--{name}")
            raise ArtefactError(
                f"this score table holds no '{name}' of the base model; run the same `multicolm "
                f"score` once more with {flag}: only the base model reads again."
            )
        return self.base[name].float()

    def columns(self) -> dict[str, Tensor]:
        """All tensors but those of ``base``, by the names of the attributes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def rows(self, which: Tensor | slice) -> ScoreTable:
        """Some of the positions, by mask or by numbers."""
        changed: dict[str, Any] = {name: values[which] for name, values in self.columns().items()}
        base = {name: feature[which] for name, feature in self.base.items()}
        return replace(self, **changed, base=base)

    def merged(self, open_: Bool[Tensor, "positions models"]) -> ScoreTable:
        """Positions merged into spans that begin and end between tokens of every model.

        A span's numbers are those of its first position; its log-probabilities are summed, and it
        is known where all of its positions are. A model's first choice is right if it is at every
        position of the span where one of its tokens begins, as a writer finishes its token.

        Args:
            open_: per position and model, whether one of the model's own tokens begins there; true
                at the first position of every text.
        """
        begins = open_.all(-1)
        span = begins.long().cumsum(0) - 1
        first = self.rows(begins)
        zeros = torch.zeros_like(first.gold_logprobs)
        n_unknown = zeros.index_add(0, span, (~self.known).to(zeros.dtype))
        wrong = (self.top1_ids != self.gold_ids[:, None]) & open_
        n_wrong = zeros.index_add(0, span, wrong.to(zeros.dtype))
        # No real id: a first choice that begins like the span and continues otherwise.
        others = -2 - torch.arange(self.n_models)
        begins_right = first.top1_ids == first.gold_ids[:, None]
        return replace(
            first,
            gold_logprobs=zeros.index_add(0, span, self.gold_logprobs),
            known=n_unknown == 0,
            top1_ids=torch.where(begins_right & (n_wrong > 0), others, first.top1_ids),
        )

    def n_blocks(self, size: int) -> int:
        """See :meth:`ScoreBlocks.n_blocks`."""
        return -(-len(self) // size)

    def blocks(self, size: int, order: Sequence[int] | None = None) -> Iterator[ScoreTable]:
        """See :meth:`ScoreBlocks.blocks`; views, not copies."""
        for number in range(self.n_blocks(size)) if order is None else order:
            yield self.rows(slice(number * size, (number + 1) * size))

    def split(self, held_out: float, seed: int) -> tuple[ScoreTable, ScoreTable]:
        """Positions to learn from, and those of a held-out part of the texts.

        Whole texts are held out, chosen by ``seed`` alone, so that equal tables split equally.

        Args:
            held_out: part of the texts, 0 up to (not including) 1.
            seed: of the choice.
        """
        texts = torch.unique(self.example)
        mask = torch.isin(self.example, held_out_texts(texts, held_out, seed))
        return self.rows(~mask), self.rows(mask)


def held_out_texts(texts: Int[Tensor, "texts"], held_out: float, seed: int) -> Int[Tensor, "held"]:
    """Which texts are held out, chosen by ``seed`` alone; one at least is left to learn from.

    Args:
        texts: their numbers, ascending.
        held_out: part of them, 0 up to (not including) 1.
        seed: of the choice.
    """
    n_held_out = min(len(texts) - 1, round(held_out * len(texts)))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return texts[order[:n_held_out]]
