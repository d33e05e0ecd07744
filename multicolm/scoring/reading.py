"""Reads whole texts with one model: what it would have written at every place of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.errors import CapabilityError
from multicolm.tokenizer.vocabulary import Vocabulary

__all__ = ["Reading", "Seen", "Text", "read_all", "read_texts", "refuse_partial"]

# The most numbers that the logits of one pass may hold; a gigabyte in float32.
_MAX_LOGITS = 2**28


@dataclass(frozen=True, slots=True)
class Text:
    """A text to read.

    Attributes:
        prompt_ids: what the model reads before it, in its own tokens; at least one.
        ids: the tokens of the text, in the ensemble's vocabulary.
        writers: per token, the index of the model that wrote it; the base model all of them if not
            given.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    writers: Sequence[int] | None = None


@dataclass(frozen=True)
class Reading:
    """What a model predicts at some places of some texts.

    Attributes:
        numbers: which of the texts, from 0.
        places: how many tokens of the text stand before the predicted one.
        logits: unnormalised log-probabilities over the ensemble's vocabulary.
        hidden: last hidden state after the final norm, if it was asked for.
    """

    numbers: Int[Tensor, "positions"]
    places: Int[Tensor, "positions"]
    logits: Float[Tensor, "positions vocab"]
    hidden: Float[Tensor, "positions hidden"] | None


@dataclass(frozen=True)
class Seen:
    """What a model predicts at the places of some texts, one text after another.

    Attributes:
        logits: unnormalised log-probabilities over the ensemble's vocabulary, in float32 and on
            the CPU; zeros where they are not known.
        hidden: last hidden state after the final norm, if it was asked for.
        known: whether the model could read that far and go on there.
    """

    logits: Float[Tensor, "positions vocab"]
    hidden: Float[Tensor, "positions hidden"] | None
    known: Bool[Tensor, "positions"]


@dataclass(frozen=True, slots=True)
class _Line:
    """One text as the model is fed it.

    Attributes:
        number: which of the texts.
        tokens: in the model's own vocabulary, up to the last place that is looked at.
        looks: pairs of a place of the text, and after which token (from 0) the model predicts it;
            places beyond its context, and within a token of its own, are missing.
    """

    number: int
    tokens: Sequence[int]
    looks: Sequence[tuple[int, int]]


def refuse_partial(models: Iterable[Model]) -> None:
    """Refuse to score with models that tell of their likeliest tokens only.

    Raises:
        CapabilityError: naming the model and its server.
    """
    for model in models:
        if model.n_likeliest is not None:
            raise CapabilityError(
                f"model '{model.name}' cannot be scored: its server {model.server} tells of "
                f"{model.n_likeliest} tokens, and scores need every probability; set `logprobs: "
                "all` for it, and let the server allow it (vLLM: --max-logprobs -1)."
            )


def read_texts(
    model: Model,
    k: int,
    vocabulary: Vocabulary,
    texts: Sequence[Text],
    *,
    hidden: bool = False,
    batch_tokens: int = 4096,
) -> Iterator[Reading]:
    """Read each text once, in batches of similar length.

    The batches depend on the texts alone, so equal calls give equal numbers. Memory is bounded by
    ``batch_tokens``, not by the length of a text: long ones are read in pieces.

    Args:
        model: reads them.
        k: its index in the ensemble.
        vocabulary: what the ensemble writes in.
        texts: in any order.
        hidden: whether hidden states are wanted.
        batch_tokens: the most tokens of one pass, padding included.

    Yields:
        Every place of every text once, in no particular order; without places that lie beyond the
        model's context or within a token of its own vocabulary.
    """
    lines = [_line(number, text, model, k, vocabulary) for number, text in enumerate(texts)]
    lines = sorted((line for line in lines if line.looks), key=lambda line: len(line.tokens))
    budget = max(1, min(batch_tokens, _MAX_LOGITS // vocabulary.size))
    for batch in _batches(lines, budget):
        yield from _read_batch(batch, model, k, vocabulary, hidden, budget)


def read_all(
    model: Model,
    k: int,
    vocabulary: Vocabulary,
    texts: Sequence[Text],
    *,
    hidden: bool = False,
    batch_tokens: int = 4096,
) -> Seen:
    """:func:`read_texts` with everything in memory, in the order of the texts.

    Args:
        model: reads them.
        k: its index in the ensemble.
        vocabulary: what the ensemble writes in.
        texts: so few that their logits fit into memory.
        hidden: whether hidden states are wanted.
        batch_tokens: the most tokens of one pass, padding included.
    """
    ends = [0, *accumulate(len(text.ids) for text in texts)]
    starts = torch.tensor(ends[:-1], dtype=torch.long)
    logits = torch.zeros(ends[-1], vocabulary.size)
    states: Tensor | None = None
    known = torch.zeros(ends[-1], dtype=torch.bool)
    for reading in read_texts(
        model, k, vocabulary, texts, hidden=hidden, batch_tokens=batch_tokens
    ):
        index = starts[reading.numbers] + reading.places
        logits[index] = reading.logits.float().cpu()
        known[index] = True
        if reading.hidden is not None:
            if states is None:
                states = torch.zeros(ends[-1], reading.hidden.shape[-1])
            states[index] = reading.hidden.float().cpu()
    return Seen(logits, states, known)


def _line(number: int, text: Text, model: Model, k: int, vocabulary: Vocabulary) -> _Line:
    follower = vocabulary.follow(k, text.prompt_ids)
    follower.extend(text.ids, text.writers or [0] * len(text.ids))
    reaches = ((place, follower.reach(place)) for place in range(len(text.ids)))
    limit = model.context_length
    looks = [
        (place, reach - 1)
        for place, reach in reaches
        if reach is not None and (limit is None or reach <= limit)
    ]
    return _Line(number, follower.own[: looks[-1][1] + 1] if looks else [], looks)


def _batches(lines: Sequence[_Line], budget: int) -> Iterator[list[_Line]]:
    """Lines of ascending length, together as long as their padded tokens fit the budget."""
    batch: list[_Line] = []
    for line in lines:
        if batch and (len(batch) + 1) * len(line.tokens) > budget:
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


def _read_batch(
    batch: Sequence[_Line],
    model: Model,
    k: int,
    vocabulary: Vocabulary,
    hidden: bool,
    budget: int,
) -> Iterator[Reading]:
    session = model.open(len(batch))
    width = max(1, budget // len(batch))
    for start in range(0, max(len(line.tokens) for line in batch), width):
        rows = [row for row, line in enumerate(batch) if len(line.tokens) > start]
        pieces = [batch[row].tokens[start : start + width] for row in rows]
        ends = [start + len(piece) for piece in pieces]
        wanted = [
            [(place, at) for place, at in batch[row].looks if start <= at < end]
            for row, end in zip(rows, ends, strict=True)
        ]
        # A session looks after one token at least; a piece of a prompt shows what nobody reads.
        n_last = [
            end - places[0][1] if places else 1 for places, end in zip(wanted, ends, strict=True)
        ]
        look = session.feed(rows, pieces, n_last, hidden=hidden)
        lines, numbers, at_places, first = [], [], [], 0
        for row, places, end, n in zip(rows, wanted, ends, n_last, strict=True):
            lines += [first + at - (end - n) for _, at in places]
            numbers += [batch[row].number] * len(places)
            at_places += [place for place, _ in places]
            first += n
        if not lines:
            continue
        index = torch.tensor(lines, device=look.logits.device)
        yield Reading(
            torch.tensor(numbers),
            torch.tensor(at_places),
            vocabulary.logits(k, look.logits[index]),
            None if look.hidden is None else look.hidden[index],
        )
