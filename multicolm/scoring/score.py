"""Scores a corpus: each model reads each text once, and what it gave to every token is kept."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError, ModelError, MulticolmError
from multicolm.exact.byte_session import span_logprobs
from multicolm.files import locked, sha256, write_whole
from multicolm.scoring.corpus import Corpus, Example
from multicolm.scoring.numbers import Numbers
from multicolm.scoring.pieces import Pieces
from multicolm.scoring.plan import ExampleReader, check_features, check_names, join, plan
from multicolm.scoring.reading import Text, read_texts, refuse_partial, tokens_of_a_pass
from multicolm.scoring.spans import spans_of, to_base_tokens
from multicolm.scoring.store import (
    ROLLOUTS,
    TEXT,
    Index,
    Shard,
    TableFiles,
    read_index,
)
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import Prompt, prompt_digest

__all__ = ["Progress", "finish", "score"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far scoring has come.

    Attributes:
        done: tokens of completions that are read, summed over models.
        total: of these there will be.
        model: that read the last ones.
        before: how many of ``done`` were there before this run, so that a rate leaves them out.
    """

    done: int
    total: int
    model: str
    before: int = 0


def score(
    ensemble: Ensemble,
    corpus: Corpus,
    out: str | Path,
    *,
    features: Sequence[str] = (),
    top_k: int = 100,
    end_of_text: bool = True,
    models: Sequence[str] | None = None,
    shard_positions: int = 32768,
    batch_tokens: int | None = None,
    save_every: float = 20.0,
    rank: int = 0,
    n_ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Index:
    """Write the score table of a corpus, or finish one that was begun.

    What is done already is not done again: shards of a run that was stopped, what was read of the
    shard at which it was stopped, and all shards of models that were scored before. Memory does
    not grow with the corpus, and with the vocabulary only by the logits of a few tokens.

    Args:
        ensemble: whose models read.
        corpus: what they read.
        out: the folder of the score table.
        features: what to keep of the base model besides its scores: ``hidden``, ``topk``,
            ``embedding``.
        top_k: how many of the base model's log-probabilities ``topk`` keeps.
        end_of_text: whether the end of each completion counts as a token.
        models: names of all models of the table, the base model first, where some are not in the
            ensemble because their scores are whole; those of the ensemble if not given.
        shard_positions: a shard is closed when it has this many tokens of completions.
        batch_tokens: the most tokens of one forward pass; if not given, 4,096 on an accelerator,
            and what a few seconds suffice for on a CPU.
        save_every: seconds after which what was read of a shard is saved, at the end of a pass.
        rank: of this process among those that share the work.
        n_ranks: how many they are.
        wait: returns when all of them have come this far.
        on_progress: called after every pass.

    Returns:
        The index of the finished table.

    Raises:
        InputError: if the corpus is empty or a record is not right.
        ArtefactError: if the folder holds the scores of another corpus.
        CapabilityError: if the base model does not show a feature, or a model's server returns
            its likeliest tokens only.
        ModelError: if a model gives NaN.
        ServerError: if a model's server fails for good; what was scored is kept.
    """
    folder = Path(out)
    base = ensemble.backends[0]
    check_features(base.name, base.shows, features)
    check_names(ensemble.models)
    refuse_partial(ensemble.backends)

    def scorer(index: Index) -> _Scorer:
        return _Scorer(ensemble, TableFiles(folder, index), batch_tokens, save_every, on_progress)

    if rank > 0:
        index = plan(ensemble, corpus, features, top_k, end_of_text, shard_positions)
        wait()  # until the first process has put away what is damaged
        index = join(folder, index, models)
        scorer(index).run(corpus, rank, n_ranks)
        wait()
        return index
    with locked(folder):
        index = plan(ensemble, corpus, features, top_k, end_of_text, shard_positions)
        index = join(folder, index, models)
        files = TableFiles(folder, index)
        _discard_damaged(folder)
        if not _is_finished(files):
            write_whole(folder / "index.json", index.as_json())
        wait()
        scorer(index).run(corpus, rank, n_ranks)
        wait()
        return finish(files)


def _discard_damaged(folder: Path) -> None:
    """Delete files of a finished table that have changed since, so that they are made anew."""
    if not (folder / "index.json").is_file():
        return
    for name, digest in read_index(folder).files.items():
        path = folder / name
        if path.is_file() and sha256(path) != digest:
            path.unlink()


def _is_finished(files: TableFiles) -> bool:
    return all(files.is_done(part, number) for part, number in files.index.parts())


def finish(files: TableFiles) -> Index:
    """Write the index with a digest of every file, if it is not what the file holds.

    Raises:
        ArtefactError: if a file is missing or damaged.
    """
    index = files.index
    digests: dict[str, str] = {}
    unknown = dict.fromkeys((model.name for model in index.models), 0)
    for part, number in index.parts():
        path = files.path(part, number)
        digests[f"{part}/{path.name}"] = sha256(path)
        if part != TEXT:
            unknown[part] += int((~files.read(part, number)["known"].bool()).sum())
    rollouts = files.folder / ROLLOUTS
    if rollouts.is_file():  # Of the same corpus and base model, whatever was scored since.
        digests[ROLLOUTS] = sha256(rollouts)
    models = tuple(replace(model, n_unknown=unknown[model.name]) for model in index.models)
    finished = replace(index, models=models, files=digests)
    write_whole(files.folder / "index.json", finished.as_json())
    return finished


class _Scorer:
    """Fills the files of a score table.

    Attributes:
        before: tokens that were read before this run.

    Args:
        ensemble: whose models read.
        files: to be filled.
        batch_tokens: the most tokens of one forward pass; see :func:`score`.
        save_every: seconds between two saves within a shard.
        on_progress: called after every pass.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        files: TableFiles,
        batch_tokens: int | None,
        save_every: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._models = ensemble.backends
        self.vocabulary: Vocabulary = ensemble.vocabulary
        self.files = files
        self._index = files.index
        self._batch_tokens = batch_tokens
        self.save_every = save_every
        self._on_progress = on_progress
        self._reader = ExampleReader(ensemble, files.index.end_of_text)
        self._done = self.before = self._total = 0
        self._shown = -1

    def run(self, corpus: Corpus, rank: int, n_ranks: int) -> None:
        """Write every file that is missing and is this process's to write."""
        names = [model.name for model in self._models]
        missing: dict[int, list[str]] = {}
        for number in range(rank, len(self._index.shards), n_ranks):
            parts = [p for p in (TEXT, *names) if not self.files.is_done(p, number)]
            n_positions = self._index.shards[number].n_positions
            self._total += n_positions * len(names)
            self.before += n_positions * sum(name not in parts for name in names)
            if parts:
                missing[number] = parts
        self._done = self.before
        self.report(names[0])
        if not missing:
            return
        for number, examples in enumerate(self._by_shard(corpus)):
            if number in missing:
                self._score_shard(number, examples, missing[number])

    def report(self, model: str, more: float = 0.0) -> None:
        """Say how far it is, if that has changed.

        Args:
            model: that is at work.
            more: tokens that are read of a shard that is not done.
        """
        done = self._done + int(more)
        if done > self._shown:
            self._shown = done
            self._on_progress(Progress(done, self._total, model, self.before))

    def _by_shard(self, corpus: Corpus) -> Iterator[list[Example]]:
        examples = iter(corpus)
        for shard in self._index.shards:
            yield [next(examples) for _ in range(shard.n_examples)]

    def _score_shard(self, number: int, examples: list[Example], parts: Sequence[str]) -> None:
        shard = self._index.shards[number]
        ids = [self._reader.readable(example) for example in examples]
        gold = torch.tensor([token for text in ids for token in text], dtype=torch.int32)
        if TEXT in parts:
            self.files.write(TEXT, number, self._text(shard, examples, ids, gold))
        for k, model in enumerate(self._models):
            if model.name in parts:
                work = _Work(self, k, model, number, examples, shard.n_positions)
                self.files.write(model.name, number, self._read(work, ids, gold.long()))
                work.remove()
                self._done += shard.n_positions
                self.report(model.name)

    def _text(
        self, shard: Shard, examples: list[Example], ids: list[list[int]], gold: Tensor
    ) -> dict[str, Tensor]:
        prompts = [self._reader.prompt(example, 0) for example in examples]
        numbers = [shard.first + i for i, text in enumerate(ids) for _ in text]
        places = [place for text in ids for place in range(len(text))]
        return {
            "gold_ids": gold,
            "example": torch.tensor(numbers, dtype=torch.int32),
            "place": torch.tensor(places, dtype=torch.int32),
            "prompt_ids": torch.tensor([i for p in prompts for i in p], dtype=torch.int32),
            "prompt_digests": torch.tensor([_signed(e.prompt) for e in examples]),
            "prompt_lengths": torch.tensor([len(p) for p in prompts], dtype=torch.int32),
        }

    def _read(self, work: _Work, ids: list[list[int]], gold: Tensor) -> dict[str, Tensor]:
        """What one model gave to the tokens of a shard."""
        vocabulary, k = self.vocabulary, work.k
        if not isinstance(vocabulary, BridgedVocabulary) or vocabulary.groups[k] == 0:
            return self._read_tokens(work, ids, gold)
        spans = [
            spans_of(vocabulary, k, text, self._reader.end, self._reader.contents(e, len(text)))
            for e, text in zip(work.examples, ids, strict=True)
        ]
        own = [list(text.own) for text in spans]
        own_gold = torch.tensor([token for text in own for token in text])
        found = self._read_tokens(work, own, own_gold)
        misses = {
            "gold_logprobs": (found["top1_ids"] != own_gold).float(),
            "known": torch.ones_like(found["known"]),
        }
        columns = to_base_tokens(found, spans)
        del columns["number"]
        # Who would write one's own tokens up to where both meet again is right; others are told by
        # the content of their first token.
        right = to_base_tokens(misses, spans)["gold_logprobs"] == 0
        named = [self._known_everywhere(vocabulary, i) for i in columns["top1_ids"].tolist()]
        columns["top1_ids"] = torch.where(right, gold, torch.tensor(named)).int()
        if vocabulary.is_exact(k):
            self._sum_over_paths(work, ids, gold, columns)
        return columns

    def _read_tokens(self, work: _Work, ids: list[list[int]], gold: Tensor) -> dict[str, Tensor]:
        """What one model gave to tokens of texts that are also its own."""
        k, model = work.k, work.model
        features = next(m.features for m in self._index.models if m.name == model.name)
        texts = [
            Text(self._reader.prompt(example, k), text, [k] * len(text))
            for example, text in zip(work.examples, ids, strict=True)
        ]
        starts = torch.tensor([0, *(len(text) for text in ids)]).cumsum(0)
        numbers = Numbers(model, k, self.vocabulary, self._reader.end, features, self._index.top_k)
        n_tokens = self._batch_tokens or tokens_of_a_pass(model)
        pieces = work.pieces("tokens", len(gold), f"{n_tokens}")
        readings = read_texts(
            model,
            k,
            self.vocabulary,
            texts,
            hidden="hidden" in features,
            batch_tokens=n_tokens,
            is_done=lambda number, place: bool(pieces.columns.filled[starts[number] + place]),
        )
        with work.kept(pieces):
            for reading in readings:
                at = starts[reading.numbers] + reading.places
                found = numbers.of(reading, gold[at])
                _refuse_nan(model, found, work.examples, reading.numbers)
                pieces.add(at, found)
                work.report()
        return pieces.columns.tensors()

    def _sum_over_paths(
        self, work: _Work, ids: list[list[int]], gold: Tensor, columns: dict[str, Tensor]
    ) -> None:
        """Put the exact probability of every base token in the place of those of merged spans.

        Within a token of the model's own there is no next token to be its most likely one; what it
        gives more than half of its probability to is.
        """
        is_open = columns.pop("open").bool()
        ends_at = list(accumulate(map(len, ids), initial=0))
        pieces = work.pieces("bytes", len(gold), "")
        with work.kept(pieces):
            for i, (example, text) in enumerate(zip(work.examples, ids, strict=True)):
                at = torch.arange(ends_at[i], ends_at[i + 1])
                if not bool(pieces.columns.filled[at].all()):
                    pieces.add(at, {"exact": self._path_logprobs(work, example, text)})
                    work.report()
        exact = pieces.columns.tensors().get("exact", torch.zeros(0))
        known = columns["known"].bool() & ~exact.isnan()
        columns["known"] = known.to(torch.uint8)
        columns["gold_logprobs"] = torch.where(known, exact, 0.0)
        likely = known & ~is_open & (exact > math.log(0.5))
        hidden = ~is_open & ~likely
        columns["top1_ids"] = torch.where(likely, gold, columns["top1_ids"]).int()
        columns["top1_ids"] = columns["top1_ids"].masked_fill(hidden, -1)
        columns["top1_logprobs"] = torch.where(likely, exact, columns["top1_logprobs"])
        columns["top1_logprobs"] = columns["top1_logprobs"].masked_fill(hidden, float("-inf"))
        for name in ("entropies", "margins"):
            columns[name] = columns[name].masked_fill(~is_open, 0.0)

    def _path_logprobs(self, work: _Work, example: Example, text: Sequence[int]) -> Tensor:
        """The log-probability of every base token of a text, in nats; NaN if it is too long."""
        contents = self._reader.contents(example, len(text))
        ends = list(accumulate(map(len, contents)))
        is_whole = bool(text) and text[-1] == self._reader.end
        if is_whole:
            ends.pop()
        prompt = self._reader.prompt(example, work.k)
        try:
            logprobs = span_logprobs(work.model, prompt, b"".join(contents), ends, end=is_whole)
        except InputError:  # Longer than the context: unknown as a whole.
            return torch.full((len(text),), float("nan"))
        return logprobs.float()

    def _known_everywhere(self, vocabulary: BridgedVocabulary, token: int) -> int:
        """A token of the base model's group, or a negative number that depends on its content.

        So scores of one model do not hang on which others are in the ensemble.
        """
        if token < vocabulary.shared[0].size:
            return token
        content = vocabulary.token_bytes(token) or vocabulary.name(token).encode()
        return -1 - (zlib.crc32(content) & 0x7FFFFFFE)


class _Work:
    """One model and one shard, which it is about to read.

    Args:
        scorer: to which it reports how far it is.
        k: the model's index in the ensemble.
        model: the model.
        number: of the shard.
        examples: of the shard.
        n_positions: of the shard.
    """

    def __init__(
        self,
        scorer: _Scorer,
        k: int,
        model: Model,
        number: int,
        examples: Sequence[Example],
        n_positions: int,
    ) -> None:
        self.k = k
        self.model = model
        self.examples = examples
        self._scorer = scorer
        self._number = number
        self._n_positions = n_positions
        self._stages: list[Pieces] = []
        # By the exact bridge a text is read twice: in tokens, and in bytes.
        vocabulary = scorer.vocabulary
        exact = isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k)
        self._n_stages = 2 if exact else 1
        self._known = 0.0

    def pieces(self, stage: str, n_positions: int, facts: str) -> Pieces:
        """What is read of the shard in this stage, with what an earlier run has left."""
        pieces = Pieces(
            self._scorer.files,
            self.model.name,
            self._number,
            stage=stage,
            n_positions=n_positions,
            facts=facts,
            every=self._scorer.save_every,
        )
        self._stages.append(pieces)
        found = self._read() - self._known
        self._scorer.before += int(found)
        self.report()
        return pieces

    def _read(self) -> float:
        """Tokens of completions that are read, of a shard's."""
        parts = [
            float(p.columns.filled.float().mean()) for p in self._stages if len(p.columns.filled)
        ]
        return self._n_positions * sum(parts) / self._n_stages

    def report(self) -> None:
        """Say how far it is; a shard is done when its file is written, and not before."""
        self._known = min(self._read(), self._n_positions - 1)
        self._scorer.report(self.model.name, self._known)

    @contextmanager
    def kept(self, pieces: Pieces) -> Iterator[None]:
        """Save what was read when reading is stopped, by whoever or whatever stops it."""
        try:
            yield
        except (KeyboardInterrupt, MulticolmError):
            with suppress(OSError):
                pieces.save()
            raise

    def remove(self) -> None:
        """Delete the pieces of a shard that is written."""
        for pieces in self._stages:
            pieces.remove()


def _signed(prompt: Prompt) -> int:
    """The digest of a prompt as a number of 64 bits with a sign."""
    number = int(prompt_digest(prompt), 16)
    return number - (1 << 64) if number >= 1 << 63 else number


def _refuse_nan(
    model: Model, numbers: dict[str, Tensor], examples: Sequence[Example], which: Tensor
) -> None:
    for values in numbers.values():
        if not values.is_floating_point():
            continue
        wrong = values.isnan().flatten(1).any(-1) if values.ndim > 1 else values.isnan()
        if bool(wrong.any()):
            place = examples[int(which[int(wrong.nonzero()[0, 0])])].place
            raise ModelError(
                f"model '{model.name}' gives NaN at {place} (it computes in {model.precision}); "
                "try another `dtype`. What was scored before is kept."
            )
