"""The texts of a score table as the base model is fed them while it learns, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.errors import TrainingError
from multicolm.score_table import ScoreTable
from multicolm.scoring.store import TEXT, TableFiles, read_index

__all__ = ["Batch", "Lessons", "Text", "batches", "lessons", "rows_of"]


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        example: its number in the corpus.
        tokens: in the base model's own vocabulary, up to the last place that counts.
        columns: per place that counts, after which token (from 0) it is predicted.
        rows: per place that counts, its row in the score table.
    """

    example: int
    tokens: Int[Tensor, "time"]
    columns: Int[Tensor, "positions"]
    rows: Int[Tensor, "positions"]


@dataclass(frozen=True)
class Lessons:
    """What there is to learn from.

    Attributes:
        table: all of it.
        learnt: texts to learn from.
        held_out: texts that nothing is learnt from.
    """

    table: ScoreTable
    learnt: Sequence[Text]
    held_out: Sequence[Text]

    @property
    def judged(self) -> Sequence[Text]:
        """Texts to measure on: those held out, all others if there are none."""
        return self.held_out or self.learnt


@dataclass(frozen=True)
class Batch:
    """Some texts side by side, padded at the end.

    Attributes:
        input_ids: padded with zeros.
        attention_mask: 1 where there is a token.
        lines: per position, in which line of the batch it is.
        columns: per position, after which token of the line.
        gold: the next token of the text.
        logprobs: what every model gave to it when the table was made, in nats.
        known: whether that is known.
    """

    input_ids: Int[Tensor, "lines time"]
    attention_mask: Int[Tensor, "lines time"]
    lines: Int[Tensor, "positions"]
    columns: Int[Tensor, "positions"]
    gold: Int[Tensor, "positions"]
    logprobs: Float[Tensor, "positions models"]
    known: Bool[Tensor, "positions models"]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def lessons(scores: str | Path, table: ScoreTable, *, max_length: int, held_out: float) -> Lessons:
    """The texts of a score table, parted into those to learn from and those held out.

    A place counts if the base model knows it, some model can write its token, and it lies within
    ``max_length``. Texts are held out as :meth:`multicolm.score_table.ScoreTable.split` does it.

    Args:
        scores: folder of the table; the prompts are read from there.
        table: as loaded from there.
        max_length: the most tokens of a text, prompt included, that are read.
        held_out: part of the texts, 0 up to (not including) 1.

    Raises:
        ArtefactError: if a file of the table is missing or damaged.
        TrainingError: if no place counts.
    """
    prompts = _prompts(scores)
    possible = ((table.gold_logprobs > float("-inf")) & table.known).any(-1)
    fed = torch.tensor([len(prompt) for prompt in prompts])[table.example] + table.place
    counts = table.known[:, 0] & possible & (fed <= max_length)
    if not bool(counts.any()):
        raise TrainingError(
            "there is nothing to learn from: no token of the score table is known to the base "
            f"model, possible for a model, and within max_length ({max_length} tokens)."
        )
    held = set(table.rows(counts).split(held_out, seed=0)[1].example.tolist())
    texts = [text for text in _texts(table, prompts, counts) if len(text.rows)]
    return Lessons(
        table,
        [text for text in texts if text.example not in held],
        [text for text in texts if text.example in held],
    )


def rows_of(
    table: ScoreTable, texts: Sequence[Text]
) -> Callable[[ScoreTable], Bool[Tensor, "positions"]]:
    """Which positions of a part of the table are of some texts, and count.

    Args:
        table: all of it.
        texts: as :func:`lessons` made them.
    """
    chosen = torch.zeros(len(table), dtype=torch.bool)
    chosen[torch.cat([text.rows for text in texts])] = True
    examples, lengths = torch.unique_consecutive(table.example, return_counts=True)
    starts = torch.zeros(int(examples.max()) + 1, dtype=torch.long)
    first = lengths.cumsum(0) - lengths
    starts[examples] = first - table.place[first]

    def wanted(part: ScoreTable) -> Tensor:
        return chosen[starts[part.example] + part.place]

    return wanted


def _prompts(scores: str | Path) -> list[Tensor]:
    """Of every example of the corpus what the base model reads before the completion."""
    index = read_index(scores)
    files = TableFiles(Path(scores), index)
    prompts: list[Tensor] = []
    for number in range(len(index.shards)):
        shard = files.read(TEXT, number)
        prompts += torch.split(shard["prompt_ids"].long(), shard["prompt_lengths"].tolist())
    return prompts


def _texts(
    table: ScoreTable, prompts: Sequence[Tensor], counts: Bool[Tensor, "positions"]
) -> Iterator[Text]:
    """The texts in the table's order; the rows of one text follow each other there."""
    examples, lengths = torch.unique_consecutive(table.example, return_counts=True)
    start = 0
    for example, length in zip(examples.tolist(), lengths.tolist(), strict=True):
        whole = torch.arange(start, start + length)
        start += length
        rows = whole[counts[whole]]
        columns = len(prompts[example]) - 1 + table.place[rows]
        end = int(columns[-1]) + 1 if len(rows) else 0
        tokens = torch.cat([prompts[example], table.gold_ids[whole]])[:end]
        yield Text(example, tokens, columns, rows)


def batches(table: ScoreTable, texts: Sequence[Text], budget: int) -> Iterator[Batch]:
    """The texts in batches of similar length.

    Args:
        table: that their rows are of.
        texts: in any order; equal ones give equal batches.
        budget: the most tokens of a batch, padding included; a longer text is a batch of its own.
    """
    batch: list[Text] = []
    for text in sorted(texts, key=lambda text: len(text.tokens)):
        if batch and (len(batch) + 1) * len(text.tokens) > budget:
            yield _batch(table, batch)
            batch = []
        batch.append(text)
    if batch:
        yield _batch(table, batch)


def _batch(table: ScoreTable, texts: Sequence[Text]) -> Batch:
    rows = torch.cat([text.rows for text in texts])
    padded = torch.nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.tokens) for text in texts])
    return Batch(
        input_ids=padded,
        attention_mask=(torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        lines=torch.tensor([line for line, text in enumerate(texts) for _ in text.rows]),
        columns=torch.cat([text.columns for text in texts]),
        gold=table.gold_ids[rows],
        logprobs=table.gold_logprobs[rows],
        known=table.known[rows],
    )
