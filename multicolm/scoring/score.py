"""Scores a corpus: each model reads each text once, and what it gave to every token is kept."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

import multicolm
from multicolm.backend.base import Model
from multicolm.backend.byte_session import span_logprobs
from multicolm.decoding.prompts import encode_prompt
from multicolm.ensemble import Ensemble
from multicolm.errors import (
    ArtefactError,
    CapabilityError,
    ConfigError,
    InputError,
    ModelError,
)
from multicolm.files import locked, sha256, write_whole
from multicolm.scoring.corpus import Corpus, Example
from multicolm.scoring.reading import Text, read_texts, refuse_partial
from multicolm.scoring.spans import spans_of, to_base_tokens
from multicolm.scoring.store import (
    FEATURES,
    ROLLOUTS,
    TEXT,
    Index,
    ScoredModel,
    Shard,
    TableFiles,
    read_index,
)
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import Prompt, Signal, prompt_digest
from multicolm.views import View

__all__ = ["Progress", "score"]

_SIGNALS: dict[str, Signal] = {"hidden": "hidden", "topk": "topk", "embedding": "embedding"}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far scoring has come.

    Attributes:
        done: tokens of completions that were read, summed over models.
        total: of these there will be.
        model: that read the last ones.
    """

    done: int
    total: int
    model: str


def score(
    ensemble: Ensemble,
    corpus: Corpus,
    out: str | Path,
    *,
    features: Sequence[str] = (),
    top_k: int = 100,
    end_of_text: bool = True,
    shard_positions: int = 32768,
    batch_tokens: int = 4096,
    rank: int = 0,
    n_ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Index:
    """Write the score table of a corpus, or finish one that was begun.

    What is done already is not done again: shards of a run that was stopped, and all shards of
    models that were scored before. Memory does not grow with the corpus.

    Args:
        ensemble: whose models read.
        corpus: what they read.
        out: the folder of the score table.
        features: what to keep of the base model besides its scores: ``hidden``, ``topk``,
            ``embedding``.
        top_k: how many of the base model's log-probabilities ``topk`` keeps.
        end_of_text: whether the end of each completion counts as a token.
        shard_positions: a shard is closed when it has this many tokens of completions.
        batch_tokens: the most tokens of one forward pass.
        rank: of this process among those that share the work.
        n_ranks: how many they are.
        wait: returns when all of them have come this far.
        on_progress: told whenever a shard of a model is done.

    Returns:
        The index of the finished table.

    Raises:
        InputError: if the corpus is empty or a record is not right.
        ArtefactError: if the folder holds the scores of another corpus.
        CapabilityError: if the base model does not show a feature, or a model's server tells of
            its likeliest tokens only.
        ModelError: if a model gives NaN.
        ServerError: if a model's server fails for good; what was scored is kept.
    """
    folder = Path(out)
    base = ensemble.backends[0]
    for feature in features:
        if feature not in FEATURES or _SIGNALS[feature] not in base.shows:
            shown = [name for name, signal in _SIGNALS.items() if signal in base.shows]
            raise CapabilityError(
                f"the base model '{base.name}' does not show '{feature}'; it shows "
                f"{', '.join(shown) or 'no features'}."
            )
    _check_names(ensemble.models)
    refuse_partial(ensemble.backends)
    if rank > 0:
        index = _plan(ensemble, corpus, features, top_k, end_of_text, shard_positions)
        wait()  # until the first process has put away what is damaged
        index = _join(folder, index)
        _Scorer(ensemble, TableFiles(folder, index), batch_tokens).run(
            corpus, rank, n_ranks, on_progress
        )
        wait()
        return index
    with locked(folder):
        index = _plan(ensemble, corpus, features, top_k, end_of_text, shard_positions)
        index = _join(folder, index)
        files = TableFiles(folder, index)
        _discard_damaged(folder)
        if not _is_finished(files):
            write_whole(folder / "index.json", index.as_json())
        wait()
        _Scorer(ensemble, files, batch_tokens).run(corpus, rank, n_ranks, on_progress)
        wait()
        return _finish(files)


def _join(folder: Path, index: Index) -> Index:
    """The index, with what is kept of models that were scored before.

    Raises:
        ArtefactError: if the folder holds something else.
    """
    if not (folder / "index.json").is_file():
        return index
    old = read_index(folder)
    if (old.digest, old.end_of_text) != (index.digest, index.end_of_text):
        raise ArtefactError(
            f"{folder} holds scores of {old.source} (digest {old.digest[:12]}, end of text "
            f"{'counted' if old.end_of_text else 'left off'}), and this is {index.source} (digest "
            f"{index.digest[:12]}, end of text {'counted' if index.end_of_text else 'left off'}); "
            "choose another folder."
        )
    mine, theirs = index.models[0], old.models[0]
    # The same base model under another name gives the same tokens; one whose weights were changed
    # has all scored anew.
    same = mine.identity == theirs.identity if mine.identity and theirs.identity else False
    if mine.name != theirs.name and not same:
        raise ArtefactError(
            f"{folder} holds scores with the base model '{theirs.name}', whose tokens they are of, "
            f"and this ensemble's is '{mine.name}'; choose another folder."
        )
    if old.shards != index.shards:
        raise ArtefactError(
            f"{folder} was begun with shards of other sizes, or a base model with other tokens or "
            "another context; choose another folder, or the settings that it was begun with."
        )
    # A model that kept more than is asked for now has kept enough.
    before = {(m.name, m.identity, m.precision): m for m in old.models}
    models = []
    for model in index.models:
        known = before.get((model.name, model.identity, model.precision))
        kept = {*model.features, *(known.features if known else ())}
        models.append(replace(model, features=tuple(sorted(kept))))
    return replace(index, models=tuple(models), top_k=max(old.top_k, index.top_k))


def _plan(
    ensemble: Ensemble,
    corpus: Corpus,
    features: Sequence[str],
    top_k: int,
    end_of_text: bool,
    shard_positions: int,
) -> Index:
    """Read through the corpus once, and say which stretches of it will be one shard each."""
    reader = _ExampleReader(ensemble, end_of_text)
    digest = hashlib.sha256()
    shards: list[Shard] = []
    first = n_examples = n_positions = n_skipped = 0
    for example in corpus:
        digest.update(example.canonical + b"\n")
        n_new = reader.n_positions(example)
        n_skipped += n_new == 0
        n_examples, n_positions = n_examples + 1, n_positions + n_new
        if n_positions >= shard_positions:
            shards.append(Shard(first, n_examples, n_positions))
            first, n_examples, n_positions = first + n_examples, 0, 0
    if n_positions:
        shards.append(Shard(first, n_examples, n_positions))
    elif n_examples and shards:
        # Nothing of these is scored; a shard of its own would hold nothing.
        shards[-1] = replace(shards[-1], n_examples=shards[-1].n_examples + n_examples)
    total = sum(shard.n_positions for shard in shards)
    if total == 0:
        raise InputError(
            f"{corpus.source.name}: nothing can be scored: every prompt is longer than the base "
            "model's context, or every completion is empty."
        )
    kept = tuple(sorted(set(features)))
    models = tuple(
        ScoredModel(
            model.name,
            model.identity,
            model.precision,
            ensemble.costs[k],
            kept if k == 0 else (),
            bridge=_bridge(ensemble.vocabulary, k),
        )
        for k, model in enumerate(ensemble.backends)
    )
    return Index(
        multicolm=multicolm.__version__,
        source=corpus.source.name,
        digest=digest.hexdigest(),
        n_examples=sum(shard.n_examples for shard in shards),
        n_skipped=n_skipped,
        n_positions=total,
        end_of_text=end_of_text,
        top_k=top_k if "topk" in kept else 0,
        models=models,
        shards=tuple(shards),
        files={},
    )


def _bridge(vocabulary: Vocabulary, k: int) -> str:
    """How a model's tokens and the base model's meet."""
    if vocabulary.groups[k] == vocabulary.groups[0]:
        return "shared"
    exact = isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k)
    return "exact" if exact else "boundary"


def _check_names(models: Sequence[str]) -> None:
    """Refuse names that no folder beside the table's own files can have.

    Raises:
        ConfigError: naming the model.
    """
    for name in models:
        if name in (TEXT, "index.json") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"model '{name}' cannot be scored under this name, for its scores lie in a folder "
                "that is called so; use letters, digits, '.', '_' and '-', and neither 'text' nor "
                "'index.json'."
            )


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


def _finish(files: TableFiles) -> Index:
    """Write the index with a digest of every file."""
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


class _ExampleReader:
    """Turns examples into tokens."""

    def __init__(self, ensemble: Ensemble, end_of_text: bool) -> None:
        self._models = ensemble.backends
        self._vocabulary = ensemble.vocabulary
        ends = sorted(ensemble.vocabulary.end_ids(0)) or sorted(ensemble.vocabulary.end_ids(None))
        if end_of_text and not ends:
            raise InputError(
                "no model of this ensemble has an end-of-text token; score with --no-end."
            )
        self.end: int | None = ends[0] if end_of_text else None
        """The token that stands for the end of a text, if it counts."""

    def ids(self, example: Example) -> list[int]:
        """The tokens of a completion, the end included, in the shared vocabulary.

        Raises:
            InputError: if the base model has no tokens for it.
        """
        try:
            ids = self._models[0].tokenizer.encode_continuation(example.completion)
        except InputError as error:
            raise InputError(f"{example.place}: {error}") from error
        return ids if self.end is None else [*ids, self.end]

    def prompt(self, example: Example, k: int) -> list[int]:
        """What model ``k`` reads before.

        Raises:
            InputError: if that is nothing, or the model's chat template refuses it.
        """
        try:
            ids = encode_prompt(example.prompt, k, self._models[k], self._vocabulary)
        except InputError as error:
            raise InputError(f"{example.place}: {error}") from error
        if not ids:
            raise InputError(
                f"{example.place}: the prompt is empty for model '{self._models[k].name}'."
            )
        return ids

    def n_positions(self, example: Example) -> int:
        """How many tokens of the completion the base model's context reaches."""
        ids = self.ids(example)
        limit = self._models[0].context_length
        room = len(ids) if limit is None else limit - len(self.prompt(example, 0)) + 1
        return max(0, min(len(ids), room))


class _Scorer:
    """Fills the files of a score table.

    Args:
        ensemble: whose models read.
        files: to be filled.
        batch_tokens: the most tokens of one forward pass.
    """

    def __init__(self, ensemble: Ensemble, files: TableFiles, batch_tokens: int) -> None:
        self._models = ensemble.backends
        self._vocabulary: Vocabulary = ensemble.vocabulary
        self._files = files
        self._index = files.index
        self._batch_tokens = batch_tokens
        self._reader = _ExampleReader(ensemble, files.index.end_of_text)

    def run(
        self,
        corpus: Corpus,
        rank: int,
        n_ranks: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Write every file that is missing and is this process's to write."""
        names = [model.name for model in self._models]
        total = self._index.n_positions * len(names)
        done = 0
        for number, examples in enumerate(self._by_shard(corpus)):
            if number % n_ranks == rank:
                parts = [p for p in (TEXT, *names) if not self._files.is_done(p, number)]
                self._score_shard(number, examples, parts)
            for name in names:
                done += self._index.shards[number].n_positions
                on_progress(Progress(done, total, name))

    def _by_shard(self, corpus: Corpus) -> Iterator[list[Example]]:
        examples = iter(corpus)
        for shard in self._index.shards:
            yield [next(examples) for _ in range(shard.n_examples)]

    def _score_shard(self, number: int, examples: list[Example], parts: Sequence[str]) -> None:
        if not parts:
            return
        shard = self._index.shards[number]
        ids = [
            self._reader.ids(example)[: self._reader.n_positions(example)] for example in examples
        ]
        gold = torch.tensor([token for text in ids for token in text], dtype=torch.int32)
        if TEXT in parts:
            self._files.write(TEXT, number, self._text(shard, examples, ids, gold))
        for k, model in enumerate(self._models):
            if model.name in parts:
                scores = self._read(k, model, examples, ids, gold.long())
                self._files.write(model.name, number, scores)

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

    def _read(
        self,
        k: int,
        model: Model,
        examples: list[Example],
        ids: list[list[int]],
        gold: Tensor,
    ) -> dict[str, Tensor]:
        """What one model gave to the tokens of a shard."""
        vocabulary = self._vocabulary
        if not isinstance(vocabulary, BridgedVocabulary) or vocabulary.groups[k] == 0:
            return self._read_tokens(k, model, examples, ids, gold)
        spans = [spans_of(vocabulary, k, text, self._reader.end) for text in ids]
        own = [list(text.own) for text in spans]
        own_gold = torch.tensor([token for text in own for token in text])
        columns = to_base_tokens(self._read_tokens(k, model, examples, own, own_gold), spans)
        # The right token of one's own counts as the right one; others are told by their content.
        right = columns["top1_ids"] == own_gold[columns.pop("number")]
        named = [self._known_everywhere(vocabulary, i) for i in columns["top1_ids"].tolist()]
        columns["top1_ids"] = torch.where(right, gold, torch.tensor(named)).int()
        if vocabulary.is_exact(k):
            self._sum_over_paths(k, model, examples, ids, gold, columns)
        return columns

    def _sum_over_paths(
        self,
        k: int,
        model: Model,
        examples: list[Example],
        ids: list[list[int]],
        gold: Tensor,
        columns: dict[str, Tensor],
    ) -> None:
        """Put the exact probability of every base token in the place of those of merged spans.

        Within a token of the model's own there is no next token to be its most likely one; what it
        gives more than half of its probability to is.
        """
        is_open = columns.pop("open").bool()
        spans: list[Tensor] = []
        for example, text in zip(examples, ids, strict=True):
            contents = [self._vocabulary.token_bytes(token) for token in text]
            ends = list(accumulate(map(len, contents)))
            is_whole = bool(text) and text[-1] == self._reader.end
            if is_whole:
                ends.pop()
            prompt = self._reader.prompt(example, k)
            try:
                spans.append(
                    span_logprobs(model, prompt, b"".join(contents), ends, end=is_whole).float()
                )
            except InputError:  # Longer than the context: unknown as a whole.
                spans.append(torch.full((len(text),), float("nan")))
        exact = torch.cat(spans) if spans else torch.zeros(0)
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

    def _known_everywhere(self, vocabulary: BridgedVocabulary, token: int) -> int:
        """A token of the base model's group, or a negative number that hangs on its content.

        So scores of one model do not hang on which others are in the ensemble.
        """
        if token < vocabulary.shared[0].size:
            return token
        content = vocabulary.token_bytes(token) or vocabulary.name(token).encode()
        return -1 - (zlib.crc32(content) & 0x7FFFFFFE)

    def _read_tokens(
        self,
        k: int,
        model: Model,
        examples: list[Example],
        ids: list[list[int]],
        gold: Tensor,
    ) -> dict[str, Tensor]:
        """What one model gave to tokens of texts that are also its own."""
        features = self._index.models[k].features
        texts = [
            Text(self._reader.prompt(example, k), text, [k] * len(text))
            for example, text in zip(examples, ids, strict=True)
        ]
        starts = torch.tensor([0, *(len(text) for text in ids)]).cumsum(0)
        columns = _Columns(len(gold))
        for reading in read_texts(
            model,
            k,
            self._vocabulary,
            texts,
            hidden="hidden" in features,
            batch_tokens=self._batch_tokens,
        ):
            at = starts[reading.numbers] + reading.places
            view = View(
                reading.logits,
                reading.hidden,
                embed=lambda shared: model.embed(self._vocabulary.own_ids(k, shared)),
            )
            numbers = self._numbers(k, view, gold[at].to(reading.logits.device))
            numbers |= self._features(view, features)
            _refuse_nan(model, numbers, examples, reading.numbers)
            columns.put(at, numbers)
        return columns.tensors(model, features)

    def _numbers(self, k: int, view: View, gold: Tensor) -> dict[str, Tensor]:
        top1 = view.top1_ids
        logprobs = view.logprob_of(gold)
        if self._reader.end is not None:
            # Each model ends a text in its own way; all of them mean the same.
            own = torch.tensor(sorted(self._vocabulary.end_ids(k)), device=gold.device)
            if len(own):
                ends = view.logprobs[:, own].logsumexp(-1)
                logprobs = torch.where(gold == self._reader.end, ends, logprobs)
                top1 = torch.where(torch.isin(top1, own), self._reader.end, top1)
        return {
            "gold_logprobs": logprobs,
            "known": torch.ones(len(gold), dtype=torch.uint8),
            "top1_ids": top1.int(),
            "top1_logprobs": view.top1_logprobs,
            "entropies": view.entropy_nats,
            "margins": view.margins,
        }

    def _features(self, view: View, features: Sequence[str]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        if "hidden" in features:
            kept["hidden"] = view.hidden
        if "topk" in features:
            kept["topk"] = view.topk_logprobs(self._index.top_k)
        if "embedding" in features:
            kept["embedding"] = view.top1_embeddings
        return kept


def _signed(prompt: Prompt) -> int:
    """The digest of a prompt as a number of 64 bits with a sign."""
    number = int(prompt_digest(prompt), 16)
    return number - (1 << 64) if number >= 1 << 63 else number


class _Columns:
    """Tensors of a shard that are filled in any order; what is never filled is unknown."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._tensors: dict[str, Tensor] = {}

    def put(self, at: Tensor, numbers: dict[str, Tensor]) -> None:
        for name, values in numbers.items():
            if name not in self._tensors:
                shape = (self._n_positions, *values.shape[1:])
                self._tensors[name] = torch.zeros(shape, dtype=values.dtype)
            self._tensors[name][at] = values.cpu()

    def tensors(self, model: Model, features: Sequence[str]) -> dict[str, Tensor]:
        """All columns; of a model that could not read anything, columns of zeros."""
        if not self._tensors:
            floats = ("gold_logprobs", "top1_logprobs", "entropies", "margins")
            self._tensors = {name: torch.zeros(self._n_positions) for name in floats}
            self._tensors["top1_ids"] = torch.zeros(self._n_positions, dtype=torch.int32)
            self._tensors["known"] = torch.zeros(self._n_positions, dtype=torch.uint8)
        return self._tensors


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
