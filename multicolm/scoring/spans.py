"""A text in the tokens of two vocabularies: which stretches of it are whole tokens in both.

Base tokens are merged until both ends of a stretch are ends of a token in both vocabularies; the
probability of a stretch is the product over the model's own tokens in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from multicolm.tokenizer.bridged import BridgedVocabulary

__all__ = ["Spans", "spans_of", "to_base_tokens"]


@dataclass(frozen=True, slots=True)
class Spans:
    """A text as a model of another vocabulary reads it.

    Attributes:
        own: its tokens, by their ids in the ensemble's vocabulary.
        first: per token of the base model, the number of the own token that begins where it
            begins; -1 where none does.
    """

    own: Sequence[int]
    first: Sequence[int]


def spans_of(
    vocabulary: BridgedVocabulary, model: int, ids: Sequence[int], end: int | None
) -> Spans:
    """How a model of another vocabulary than the base model's reads a text.

    Args:
        vocabulary: of the ensemble.
        model: its index.
        ids: the text, in the base model's tokens.
        end: the token that stands for the end of a text, if that counts.
    """
    contents = [vocabulary.token_bytes(token) for token in ids]
    encoder = vocabulary.encoder(model)
    encoder.append(b"".join(contents))
    own = vocabulary.ids_of(model, encoder.ids)
    own_starts = [0, *encoder.ends][: len(own)]
    if ids and ids[-1] == end:
        own.append(min(vocabulary.end_ids(model), default=end))
        own_starts.append(encoder.n_bytes)
    number = {start: i for i, start in reversed(list(enumerate(own_starts)))}
    starts = [0, *accumulate(map(len, contents))][: len(ids)]
    first = [number.get(start, -1) for start in starts]
    # A token without bytes begins where the next one does; only the first of them is a place.
    for i, (start, before) in enumerate(zip(starts[1:], starts, strict=False), start=1):
        if start == before and first[i] == first[i - 1]:
            first[i] = -1
    return Spans(own, first)


def to_base_tokens(columns: Mapping[str, Tensor], spans: Sequence[Spans]) -> dict[str, Tensor]:
    """What is known per own token, per token of the base model.

    Where an own token begins with a base token there stand its numbers, and the summed
    log-probability of all up to the next such place; at the other base tokens ``open`` is 0, and
    the log-probability 0. ``number`` is that of the own token.

    Args:
        columns: per own token, text after text.
        spans: of each text.
    """
    n_own = [len(text.own) for text in spans]
    offsets = [0, *accumulate(n_own)]
    first = [
        offset + i if i >= 0 else -1
        for offset, text in zip(offsets, spans, strict=False)
        for i in text.first
    ]
    index = torch.tensor(first, dtype=torch.long)
    is_open = index >= 0
    places = is_open.nonzero()[:, 0]
    begins = index[places]
    # To the next place of the same text, or to the text's end.
    stops = torch.cat([begins[1:], torch.tensor([offsets[-1]])]) if len(begins) else begins
    shown = {name: values[index.clamp_min(0)] for name, values in columns.items()}
    length = stops - begins
    number = torch.repeat_interleave(torch.arange(len(begins)), length)
    logprobs = columns["gold_logprobs"].double()
    # From the first token that belongs to a place: one before it belongs to nothing.
    inside = slice(int(begins[0]) if len(begins) else 0, offsets[-1])
    sums = torch.zeros(len(begins), dtype=torch.float64).index_add_(0, number, logprobs[inside])
    n_unknown = torch.zeros(len(begins), dtype=torch.long).index_add_(
        0, number, (columns["known"][inside] == 0).long()
    )
    gold = torch.zeros(len(index))
    gold[places] = sums.float()
    # A base token within a span is as well known as the span.
    span = (is_open.long().cumsum(0) - 1).clamp_min(0)
    known = (n_unknown == 0)[span] if len(begins) else torch.zeros(len(index), dtype=torch.bool)
    shown["number"] = index.clamp_min(0)
    shown["gold_logprobs"] = gold
    shown["known"] = known.to(torch.uint8)
    shown["open"] = is_open.to(torch.uint8)
    return shown
