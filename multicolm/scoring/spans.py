"""A text in the tokens of two vocabularies: which stretches of it are whole tokens in both.

Base tokens are merged until both ends of a stretch are ends of a token in both vocabularies; the
probability of a stretch is the product over the model's own tokens in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.incremental import IncrementalEncoder

__all__ = ["Spans", "Spelled", "opening_of", "spans_of", "spelled", "to_base_tokens"]


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


@dataclass(frozen=True, slots=True)
class Spelled:
    """A text in a tokenizer's tokens.

    Attributes:
        ids: the tokens.
        contents: what of the text each of them stands for; together the text. Where the tokenizer
            changes a text (:meth:`TokenizerAdapter.covers_text`), that is not what the token
            decodes to.
    """

    ids: Sequence[int]
    contents: Sequence[bytes]


def spelled(tokenizer: TokenizerAdapter, content: bytes, *, at_start: bool = False) -> Spelled:
    """A text as a tokenizer spells it.

    Args:
        tokenizer: of one model.
        content: the text.
        at_start: whether nothing comes before it, so that it is encoded as texts begin; what the
            tokenizer puts in front is left off.

    Raises:
        InputError: if the tokenizer has no token for something in the text.
    """
    encoder = IncrementalEncoder(tokenizer)
    encoder.append(content)
    ids = opening_of(tokenizer, content.decode()) if at_start else encoder.ids
    ends = encoder.ends if ids == encoder.ids else _opening_ends(tokenizer, content, ids)
    # What has no token at the end of a text is the last one's.
    ends = [*(min(end, len(content)) for end in ends[:-1]), len(content)] if ends else []
    return Spelled(list(ids), [content[a:b] for a, b in pairwise([0, *ends])])


def _opening_ends(tokenizer: TokenizerAdapter, content: bytes, ids: Sequence[int]) -> list[int]:
    """Where tokens end, in bytes, that hold spaces which the tokenizer has put into a text."""
    encoder = IncrementalEncoder(tokenizer)
    encoder.append(b" " + content)
    if ids == encoder.ids:
        return [max(0, end - 1) for end in encoder.ends]
    ends, at = [], 0
    for token in ids:
        piece = tokenizer.token_bytes(token)
        is_put_in = piece[:1] == b" " and content.startswith(piece[1:], at)
        at += len(piece) - (is_put_in and not content.startswith(piece, at))
        ends.append(at)
    return ends


def opening_of(tokenizer: TokenizerAdapter, text: str) -> list[int]:
    """Tokens of a text that nothing comes before, without what the tokenizer puts in front."""
    front, ids = tokenizer.encode(""), tokenizer.encode(text)
    return ids[len(front) :] if ids[: len(front)] == front else ids


def spans_of(
    vocabulary: BridgedVocabulary,
    model: int,
    ids: Sequence[int],
    end: int | None,
    contents: Sequence[bytes] | None = None,
    *,
    at_start: bool = False,
) -> Spans:
    """How a model of another vocabulary than the base model's reads a text.

    Args:
        vocabulary: of the ensemble.
        model: its index.
        ids: the text, in the base model's tokens.
        end: the token that stands for the end of a text, if that counts.
        contents: what each of these tokens stands for, where that may not be what it decodes to;
            nothing for the end of the text.
        at_start: whether nothing comes before the text.
    """
    if contents is None:
        contents = [vocabulary.token_bytes(token) for token in ids]
    own = spelled(vocabulary.tokenizer(model), b"".join(contents), at_start=at_start)
    own_ids = vocabulary.ids_of(model, own.ids)
    own_starts = [0, *accumulate(map(len, own.contents))]
    if ids and ids[-1] == end:
        own_ids.append(min(vocabulary.end_ids(model), default=end))
    number = {start: i for i, start in reversed(list(enumerate(own_starts[: len(own_ids)])))}
    starts = [0, *accumulate(map(len, contents))][: len(ids)]
    first = [number.get(start, -1) for start in starts]
    # A token without bytes begins where the next one does; only the first of them is a place.
    for i, (start, before) in enumerate(zip(starts[1:], starts, strict=False), start=1):
        if start == before and first[i] == first[i - 1]:
            first[i] = -1
    return Spans(own_ids, first)


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
