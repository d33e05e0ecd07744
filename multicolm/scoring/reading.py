"""Reads whole texts with one model: what it would have written at every place of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.backend.checked import open_session
from multicolm.errors import CapabilityError
from multicolm.tokenizer.vocabulary import Vocabulary

__all__ = [
    "Reading",
    "Seen",
    "Text",
    "read_all",
    "read_texts",
    "refuse_partial",
    "tokens_of_a_pass",
]

# The most numbers that the logits of one pass may hold: 64 MiB in float32. An accelerator needs
# more tokens in a pass before it is busy.
_MAX_LOGITS_CPU, _MAX_LOGITS = 2**24, 2**26
# The most that are handed on at a time: log-probabilities, probabilities and the like are made of
# them, and each takes as much again.
_AT_ONCE = 2**22
# Arithmetic that a slow processor does in about ten seconds, in floating-point operations.
_OPERATIONS_OF_A_PASS = 3e11


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
        places: how many tokens of the text come before the predicted one.
        own: unnormalised log-probabilities over the model's own vocabulary, as the model gave them.
        hidden: last hidden state after the final norm, if it was asked for.
        spread: puts ``own`` into the ensemble's vocabulary.
    """

    numbers: Int[Tensor, "positions"]
    places: Int[Tensor, "positions"]
    own: Float[Tensor, "positions own_vocab"]
    hidden: Float[Tensor, "positions hidden"] | None
    spread: Callable[[Tensor], Tensor]

    @property
    def logits(self) -> Float[Tensor, "positions vocab"]:
        """Unnormalised log-probabilities over the ensemble's vocabulary."""
        return self.spread(self.own)


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
    outputs: Sequence[tuple[int, int]]


def refuse_partial(models: Iterable[Model]) -> None:
    """Refuse to score with models that return their likeliest tokens only.

    Raises:
        CapabilityError: naming the model and its server.
    """
    for model in models:
        if model.max_top_logprobs is not None:
            raise CapabilityError(
                f"model '{model.name}' cannot be scored: its server {model.server} returns "
                f"{model.max_top_logprobs} tokens, and scores need every probability; set "
                "`logprobs: all` for it, and let the server allow it (vLLM: --max-logprobs -1)."
            )


def tokens_of_a_pass(model: Model) -> int:
    """How many tokens one pass of a model should have: what a processor does in a few seconds.

    What is read is kept pass by pass, so no pass should take long. On an accelerator none does.
    """
    if not model.on_cpu or not model.n_parameters:
        return 4096
    return max(64, min(4096, int(_OPERATIONS_OF_A_PASS / (2 * model.n_parameters))))


def read_texts(
    model: Model,
    k: int,
    vocabulary: Vocabulary,
    texts: Sequence[Text],
    *,
    hidden: bool = False,
    batch_tokens: int = 4096,
    is_done: Callable[[int, int], bool] = lambda number, place: False,
) -> Iterator[Reading]:
    """Read each text once, in batches of similar length, the longest first.

    The batches depend on the texts alone, so equal calls give equal numbers. Memory is bounded by
    ``batch_tokens`` and by the width of the vocabulary, not by the length of a text: long ones are
    read in pieces, and logits are asked for where they are needed, a few at a time.

    Args:
        model: reads them.
        k: its index in the ensemble.
        vocabulary: what the ensemble writes in.
        texts: in any order.
        hidden: whether hidden states are wanted.
        batch_tokens: maximum number of tokens of one pass, padding included.
        is_done: asked about a text and a place whether what the model predicts there is known. A
            batch of which all is known is not read; the others are as they would be anyway.

    Yields:
        Every place of every text once, in no particular order; without places that lie beyond the
        model's context or within a token of its own vocabulary.
    """
    lines = [_line(number, text, model, k, vocabulary) for number, text in enumerate(texts)]
    lines = sorted((line for line in lines if line.outputs), key=lambda line: -len(line.tokens))
    width = max(1, model.tokenizer.n_tokens)
    most = _MAX_LOGITS_CPU if model.on_cpu else _MAX_LOGITS
    limits = _Limits(batch_tokens, max(1, most // width), max(1, _AT_ONCE // width))
    for batch in _batches(lines, limits):
        if not all(is_done(line.number, place) for line in batch for place, _ in line.outputs):
            yield from _read_batch(batch, model, k, vocabulary, hidden, limits)


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
        batch_tokens: maximum number of tokens of one pass, padding included.
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
    outputs = [
        (place, reach - 1)
        for place, reach in reaches
        if reach is not None and (limit is None or reach <= limit)
    ]
    return _Line(number, follower.own[: outputs[-1][1] + 1] if outputs else [], outputs)


@dataclass(frozen=True, slots=True)
class _Limits:
    """How much is done at a time.

    Attributes:
        tokens: the most that one pass is fed, padding included.
        logits: after how many of them one pass may look.
        handed: how many predictions are handed on together.
    """

    tokens: int
    logits: int
    handed: int


def _batches(lines: Sequence[_Line], limits: _Limits) -> Iterator[list[_Line]]:
    """Lines of descending length, together as long as their padded tokens fit one pass."""
    batch: list[_Line] = []
    for line in lines:
        n_lines = len(batch) + 1
        fits = n_lines <= limits.logits and (
            not batch or n_lines * len(batch[0].tokens) <= limits.tokens
        )
        if batch and not fits:
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


_Piece: TypeAlias = list[tuple[int, int, int]]
"""What one pass is fed: of which lines of the batch, from which of their tokens, up to which."""


def _pieces(batch: Sequence[_Line], limits: _Limits) -> Iterator[_Piece]:
    """The tokens of a batch, pass by pass, so that no pass has too many tokens or logits.

    Logits are as wide as the vocabulary: where those of all completions are too many for a pass,
    what comes before them is read first, and they a few columns at a time.
    """
    n = len(batch)
    ends = [len(line.tokens) for line in batch]
    firsts = [line.outputs[0][1] for line in batch]
    n_columns = max(end - first for end, first in zip(ends, firsts, strict=True))
    width = max(1, limits.tokens // n)
    if n * min(n_columns, width) <= limits.logits:
        yield from _steps([0] * n, ends, width)
        return
    yield from _steps([0] * n, firsts, width)
    yield from _steps(firsts, ends, min(width, max(1, limits.logits // n)))


def _steps(starts: Sequence[int], ends: Sequence[int], width: int) -> Iterator[_Piece]:
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    for done in range(0, longest, width):
        yield [
            (row, start + done, min(end, start + done + width))
            for row, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start + done < end
        ]


def _read_batch(
    batch: Sequence[_Line],
    model: Model,
    k: int,
    vocabulary: Vocabulary,
    hidden: bool,
    limits: _Limits,
) -> Iterator[Reading]:
    session = open_session(model, len(batch))
    spread = partial(vocabulary.logits, k)
    for piece in _pieces(batch, limits):
        wanted = [
            [(place, at) for place, at in batch[row].outputs if start <= at < end]
            for row, start, end in piece
        ]
        # A session looks after one token at least; a piece of a prompt shows what nobody reads.
        n_last = [
            end - places[0][1] if places else 1
            for places, (_, _, end) in zip(wanted, piece, strict=True)
        ]
        output = session.feed(
            [row for row, _, _ in piece],
            [batch[row].tokens[start:end] for row, start, end in piece],
            n_last,
            hidden=hidden,
        )
        lines, numbers, at_places, first = [], [], [], 0
        for places, (row, _, end), n in zip(wanted, piece, n_last, strict=True):
            lines += [first + at - (end - n) for _, at in places]
            numbers += [batch[row].number] * len(places)
            at_places += [place for place, _ in places]
            first += n
        for start in range(0, len(lines), limits.handed):
            which = slice(start, start + limits.handed)
            index = torch.tensor(lines[which], device=output.logits.device)
            yield Reading(
                torch.tensor(numbers[which]),
                torch.tensor(at_places[which]),
                output.logits[index],
                None if output.hidden is None else output.hidden[index],
                spread,
            )
        del output  # Before the next one is made.
