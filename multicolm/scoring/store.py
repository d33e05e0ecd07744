"""How a score table lies on disk, and how it is read back.

    index.json                  what was scored, by whom, and a digest of every file
    text/00000.safetensors      per shard: the tokens of the text, and the prompts
    MODEL/00000.safetensors     per shard and model: what the model gave to them
    rollouts.safetensors        of some positions, what became of the text after each model's token

Shards are stretches of the corpus. Every file carries the key of what it was made from, so a run
that resumes after a stop knows which are done, and one of other data is never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from multicolm.errors import ArtefactError
from multicolm.files import sha256, write_whole
from multicolm.score_table import ScoreTable
from multicolm.views import ModelNames

__all__ = [
    "Index",
    "Rollouts",
    "ScoredModel",
    "Shard",
    "StoredTable",
    "TableFiles",
    "load_prompt_digests",
    "load_table",
    "n_rollouts",
    "read_index",
    "read_rollouts",
]

FORMAT = 1
TEXT = "text"
ROLLOUTS = "rollouts.safetensors"
PER_MODEL = ("gold_logprobs", "known", "top1_ids", "top1_logprobs", "entropies", "margins")
FEATURES = ("hidden", "topk", "embedding")

_AGAIN = "delete it and repeat the same `multicolm score`: only it is made anew"
_CHECKED_AT_ONCE = 4096  # positions


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of the corpus.

    Attributes:
        first: number of its first example, from 0.
        n_examples: how many.
        n_positions: how many tokens of completions are scored.
    """

    first: int
    n_examples: int
    n_positions: int


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """A model as it was when it read the corpus.

    Attributes:
        name: in the ensemble.
        identity: what it is; empty if unknown.
        precision: the type it computed in.
        cost: of one forward pass for one text, in the ensemble's unit.
        features: what was kept of it besides its scores.
        n_unknown: positions that it could not score, as its context does not reach that far.
        bridge: how its tokens and the base model's meet: ``shared``, one vocabulary; ``boundary``,
            where tokens of both begin; ``exact``, anywhere.
        template: digest of the chat template that it was given in the place of its own, if the
            corpus has chats; see :func:`multicolm.scoring.plan.template_digests`.
    """

    name: str
    identity: str
    precision: str
    cost: float
    features: tuple[str, ...] = ()
    n_unknown: int = 0
    bridge: str = "shared"
    template: str = ""


@dataclass(frozen=True, slots=True)
class Index:
    """What was scored: the schema of ``index.json``.

    Attributes:
        multicolm: the version that wrote it.
        source: the corpus as it was given.
        digest: of all its examples.
        n_examples: how many.
        n_skipped: of these, those of which nothing could be scored.
        n_positions: tokens of completions.
        end_of_text: whether the end of each completion counts as a token.
        top_k: how many of the base model's log-probabilities ``topk`` holds.
        models: the base model first.
        shards: in order.
        files: SHA-256 by file; empty as long as scoring is not finished.
        format: of the files.
    """

    multicolm: str
    source: str
    digest: str
    n_examples: int
    n_skipped: int
    n_positions: int
    end_of_text: bool
    top_k: int
    models: tuple[ScoredModel, ...]
    shards: tuple[Shard, ...]
    files: Mapping[str, str]
    format: int = FORMAT

    def key(self, part: str, number: int) -> str:
        """What one file was made from, as a digest.

        Args:
            part: a model's name, or ``"text"``.
            number: of the shard.
        """
        base = self.models[0]
        facts: list[object] = [FORMAT, self.digest, self.end_of_text, asdict(self.shards[number])]
        facts += [base.identity or base.name]
        facts += [{"template": base.template}] if base.template else []
        if part != TEXT:
            model = next(model for model in self.models if model.name == part)
            facts += [model.identity or model.name, model.precision, model.features]
            facts += [self.top_k if "topk" in model.features else 0]
            facts += [model.bridge] if model.bridge != "shared" else []
            facts += [{"template": model.template}] if model.template else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def parts(self) -> Iterator[tuple[str, int]]:
        """Every file: which part, which shard."""
        for number in range(len(self.shards)):
            for part in (TEXT, *(model.name for model in self.models)):
                yield part, number

    def as_json(self) -> str:
        """As it is in the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Index:
        """The reverse of :meth:`as_json`.

        Raises:
            ValueError: if something is missing or of another type.
        """
        index = TypeAdapter(cls).validate_python(data)
        if not index.models or not index.shards:
            raise ValueError("no models or no shards")
        for model in index.models:
            # The name is that of a folder, too.
            if model.name in ("", ".", "..", TEXT) or set(model.name) & set("/\\\0"):
                raise ValueError(f"a model cannot be called {model.name[:40]!r}")
            if not 0 <= model.cost < math.inf:
                raise ValueError(f"the cost of model '{model.name}' is {model.cost}")
        counts = [n for s in index.shards for n in (s.first, s.n_examples, s.n_positions)]
        counts += [index.n_examples, index.n_skipped, index.n_positions, index.top_k]
        if min(counts) < 0:
            raise ValueError("a count is negative")
        return index


class TableFiles:
    """The files of a score table.

    Args:
        folder: that they lie in.
        index: what they hold.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index

    def path(self, part: str, number: int) -> Path:
        """The file of one part and shard."""
        return self.folder / part / f"{number:05d}.safetensors"

    def is_done(self, part: str, number: int) -> bool:
        """Whether a file is there, whole, and made from the same things."""
        try:
            with safe_open(self.path(part, number), "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError):
            return False
        return metadata.get("key") == self.index.key(part, number)

    def write(self, part: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one file, whole or not at all."""
        plain = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
        content = save(plain, metadata={"key": self.index.key(part, number)})
        write_whole(self.path(part, number), content)

    def map(self, part: str, number: int) -> dict[str, Tensor]:
        """The tensors of one file, mapped into memory: read where they are accessed.

        Raises:
            ArtefactError: if it is missing, damaged, or made from something else.
        """
        path = self.path(part, number)
        if not path.is_file():
            raise ArtefactError(
                f"{path} is missing: the score table is not finished. Repeat the same "
                "`multicolm score`, which resumes where it stopped."
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); {_AGAIN}.") from error
        if metadata.get("key") != self.index.key(part, number):
            raise ArtefactError(f"{path} is of other data or another model; {_AGAIN}.")
        return tensors

    def check(self, part: str, number: int) -> None:
        """See that one file is what it was when the table was finished; all of it is read.

        Raises:
            ArtefactError: if it is missing, damaged, or made from something else.
        """
        path = self.path(part, number)
        tensors = self.map(part, number)
        wanted = self.index.files.get(f"{part}/{path.name}")
        if wanted is not None and sha256(path) != wanted:
            raise ArtefactError(f"{path} has changed since it was written; {_AGAIN}.")
        for name, tensor in tensors.items():
            parts = torch.split(tensor, _CHECKED_AT_ONCE) if tensor.is_floating_point() else ()
            if any(bool(part.isnan().any()) for part in parts):
                raise ArtefactError(f"{path}: '{name}' holds NaN; {_AGAIN}.")

    def read(self, part: str, number: int) -> dict[str, Tensor]:
        """:meth:`map` after :meth:`check`."""
        self.check(part, number)
        return self.map(part, number)


def read_index(folder: str | Path) -> Index:
    """What ``index.json`` of a score table says.

    Raises:
        ArtefactError: if it is missing, damaged, or of another format.
    """
    path = Path(folder) / "index.json"
    if Path(folder).is_file():
        raise ArtefactError(
            f"{folder} is a file; a score table is a folder, which `multicolm score ENSEMBLE DATA "
            "--out DIR` writes."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ArtefactError(
                f"{path} has format {data.get('format')}, and this version reads {FORMAT}; score "
                "the corpus into another folder."
            )
        return Index.from_json(data)
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{folder} is no score table: it holds no index.json; make one with `multicolm score "
            "ENSEMBLE DATA --out DIR`."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(
            f"{path} is damaged ({reason}); delete it and run the same `multicolm score` once "
            "more: what is whole of the rest is kept."
        ) from error


def _finished_index(folder: str | Path) -> Index:
    """What ``index.json`` says of a table that is whole.

    Raises:
        ArtefactError: if it is missing, damaged, or of a table that is not finished.
    """
    index = read_index(folder)
    if not index.files:
        raise ArtefactError(
            f"{folder} is not finished: repeat the same `multicolm score`, which resumes where "
            "it stopped."
        )
    return index


@dataclass(frozen=True)
class Rollouts:
    """What the texts came to that were finished after the models' most likely tokens.

    Attributes:
        shard: per judged position, the shard that it lies in.
        row: per judged position, which of the shard's positions it is.
        quality: by model, per judged position: mean quality of the texts that were finished after
            its token, 0 to 1; NaN if none was.
    """

    shard: Int[Tensor, "judged"]
    row: Int[Tensor, "judged"]
    quality: Mapping[str, Tensor]

    def of_shard(self, number: int, n_positions: int, models: Sequence[str]) -> Tensor:
        """Qualities of all positions of a shard, [positions, models]."""
        here = self.shard == number
        columns = torch.full((n_positions, len(models)), float("nan"))
        for k, name in enumerate(models):
            if name in self.quality:
                columns[self.row[here].long(), k] = self.quality[name][here]
        return columns

    def write(self, files: TableFiles) -> None:
        """Write them beside the scores, and into the table's index.

        Raises:
            OSError: if they cannot be written.
        """
        tensors = {f"quality/{name}": values for name, values in self.quality.items()}
        tensors |= {"shard": self.shard.int(), "row": self.row.int()}
        path = files.folder / ROLLOUTS
        plain = {name: values.contiguous() for name, values in sorted(tensors.items())}
        write_whole(path, save(plain, metadata={"key": files.index.key(TEXT, 0)}))
        index = read_index(files.folder)
        changed = replace(index, files={**index.files, ROLLOUTS: sha256(path)})
        write_whole(files.folder / "index.json", changed.as_json())


def read_rollouts(files: TableFiles) -> Rollouts:
    """The roll-outs of a table.

    Raises:
        ArtefactError: if they are missing, damaged, or of another table.
    """
    path = files.folder / ROLLOUTS
    again = "delete it and repeat the same `multicolm rollout`"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        shard, row = tensors.pop("shard"), tensors.pop("row")
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtefactError(f"{path} is missing or damaged ({error}); {again}.") from error
    if metadata.get("key") != files.index.key(TEXT, 0):
        raise ArtefactError(f"{path} is of another score table; {again}.")
    if sha256(path) != files.index.files.get(ROLLOUTS):
        raise ArtefactError(f"{path} has changed since it was written; {again}.")
    return Rollouts(shard, row, {name.removeprefix("quality/"): t for name, t in tensors.items()})


def n_rollouts(folder: str | Path) -> int:
    """How many positions of a score table were judged by roll-outs.

    Raises:
        ArtefactError: if the table or its roll-outs are missing or damaged.
    """
    index = read_index(folder)
    if ROLLOUTS not in index.files:
        return 0
    return len(read_rollouts(TableFiles(Path(folder), index)).shard)


@dataclass(frozen=True)
class ShardColumns:
    """What a shard holds of tokens, for each token of the base model.

    Attributes:
        text: ``gold_ids``, ``example`` and ``place``, as in a score table.
        top1_ids: every model's most likely token; negative where the base model has none such.
        known: whether a model could score the position.
        begins: whether a position of the table begins there; everywhere with one vocabulary.
    """

    text: Mapping[str, Tensor]
    top1_ids: Int[Tensor, "tokens models"]
    known: Bool[Tensor, "tokens models"]
    begins: Bool[Tensor, "tokens"]


class StoredTable:
    """A score table on disk, read block by block; memory does not grow with the corpus.

    Files are mapped into memory, so that of a block only what is accessed is read. Where models
    have different vocabularies, positions are spans that are whole tokens of all of them.

    Attributes:
        models: the names, the base model first.
        costs: of one forward pass per model, in the ensemble's unit.
        identities: per model what it is; empty where that is not known.
        digest: of the corpus.
        folder: that it lies in.

    Args:
        folder: that ``multicolm score`` wrote.
        models: names in the order that is wanted, the table's base model first; all of the table's
            if not given.
        rollouts: whether labels from roll-outs count, where there are some.

    Raises:
        ArtefactError: if a file is missing or damaged, or a model was not scored.
    """

    def __init__(
        self, folder: str | Path, models: Sequence[str] | None = None, *, rollouts: bool = True
    ) -> None:
        self.folder = Path(folder)
        index = _finished_index(folder)
        names = [model.name for model in index.models]
        wanted = list(models) if models is not None else names
        if any(name not in names for name in wanted) or wanted[0] != names[0]:
            raise ArtefactError(
                f"{folder} holds scores of {', '.join(names)} (the base model first), and the "
                f"ensemble is {', '.join(wanted)}; score the corpus with this ensemble, into the "
                "same folder if the base model is the same."
            )
        described = {model.name: model for model in index.models}
        self.models = ModelNames(wanted)
        self.costs = tuple(described[name].cost for name in wanted)
        self.identities = tuple(described[name].identity for name in wanted)
        self.digest = index.digest
        self._features = described[wanted[0]].features
        self._bridged = [name for name in wanted if described[name].bridge == "boundary"]
        self._index = index
        self._files = TableFiles(self.folder, index)
        for number in range(len(index.shards)):
            for part in (TEXT, *wanted):
                self._files.check(part, number)
        has_rollouts = rollouts and ROLLOUTS in index.files
        self._rollouts = read_rollouts(self._files) if has_rollouts else None
        self._lengths = [self._length(number) for number in range(len(index.shards))]
        self._opened: tuple[int, _OpenShard] | None = None

    def __len__(self) -> int:
        return sum(self._lengths)

    def n_blocks(self, size: int) -> int:
        """How many blocks of at most ``size`` positions there are; see :meth:`blocks`."""
        return sum(-(-length // size) for length in self._lengths)

    def blocks(self, size: int, order: Sequence[int] | None = None) -> Iterator[ScoreTable]:
        """Stretches of at most ``size`` positions that follow each other; each of one shard.

        What a block holds of the base model (``base``) lies in the file and is read where it is
        looked at. A new order for each epoch, and shuffling within a block, is a shuffle whose
        memory is that of a block.

        Args:
            size: 1 or more.
            order: numbers of the blocks that are wanted, in the order that is wanted; all of them
                as they are if not given.

        Raises:
            ArtefactError: if a file is gone or has become another one.
        """
        places = [
            (number, start)
            for number, length in enumerate(self._lengths)
            for start in range(0, length, size)
        ]
        for number, start in places if order is None else (places[i] for i in order):
            if self._opened is None or self._opened[0] != number:
                self._opened = None  # Unmapped before the next one is mapped.
                self._opened = number, self._shard(number)
            yield self._opened[1].rows(slice(start, start + size))
        self._opened = None

    def shards(self) -> Iterator[ShardColumns]:
        """What the shards hold of tokens, one after another."""
        for number in range(len(self._lengths)):
            yield self.shard(number)

    def shard(self, number: int) -> ShardColumns:
        """What one shard holds of tokens, as it lies in the files."""
        text = self._files.map(TEXT, number)
        scores = [self._files.map(name, number) for name in self.models]
        opens = self._opens(number)
        return ShardColumns(
            text,
            torch.stack([score["top1_ids"] for score in scores], dim=1).long(),
            torch.stack([score["known"] for score in scores], dim=1).bool(),
            torch.ones(len(text["place"]), dtype=torch.bool) if opens is None else opens,
        )

    def load(self) -> ScoreTable:
        """All of it, in memory."""
        whole: ScoreTable | None = None
        start = 0
        for shard in self.blocks(max(self._lengths)):
            whole = whole or _room_for(shard, len(self))
            end = start + len(shard)
            for name, values in shard.columns().items():
                whole.columns()[name][start:end] = values
            for name, values in shard.base.items():
                whole.base[name][start:end] = values
            start = end
        assert whole is not None
        return whole

    def _length(self, number: int) -> int:
        opens = self._opens(number)
        return self._index.shards[number].n_positions if opens is None else int(opens.sum())

    def _opens(self, number: int) -> Tensor | None:
        """Where a token of every model begins; ``None`` if they have one vocabulary."""
        if not self._bridged:
            return None
        opens = [self._files.map(name, number)["open"].bool() for name in self._bridged]
        return torch.stack(opens, dim=1).all(-1)

    def _shard(self, number: int) -> _OpenShard:
        text = self._files.map(TEXT, number)
        scores = [self._files.map(name, number) for name in self.models]

        def column(name: str) -> Tensor:
            return torch.stack([score[name] for score in scores], dim=1)

        numbers = ScoreTable(
            models=self.models,
            gold_ids=text["gold_ids"].long(),
            gold_logprobs=column("gold_logprobs"),
            known=column("known").bool(),
            top1_ids=column("top1_ids").long(),
            top1_logprobs=column("top1_logprobs"),
            entropies=column("entropies"),
            margins=column("margins"),
            example=text["example"].long(),
            place=text["place"].long(),
            base={},
            costs=self.costs,
            identities=self.identities,
            digest=self.digest,
            rollouts=None
            if self._rollouts is None
            else self._rollouts.of_shard(number, len(text["gold_ids"]), self.models),
        )
        base = {name: scores[0][name] for name in self._features}
        opens = self._opens(number)
        if opens is None:
            return _OpenShard(numbers, base, None)
        own = [self._files.map(name, number).get("open") for name in self.models]
        everywhere = torch.ones_like(opens)
        flags = [
            flag.bool() if flag is not None and name in self._bridged else everywhere
            for name, flag in zip(self.models, own, strict=True)
        ]
        merged = numbers.merged(torch.stack(flags, dim=1))
        return _OpenShard(merged, base, opens.nonzero()[:, 0])


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is mapped into memory.

    Attributes:
        numbers: all but the base model's features.
        base: the base model's features, as they lie in the file.
        at: per position of ``numbers`` its row in ``base``; ``None`` if they are the same.
    """

    numbers: ScoreTable
    base: Mapping[str, Tensor]
    at: Tensor | None

    def rows(self, which: slice) -> ScoreTable:
        """Some positions that follow each other."""
        rows = which if self.at is None else self.at[which]
        base = {name: values[rows] for name, values in self.base.items()}
        return replace(self.numbers.rows(which), base=base)


def _room_for(shard: ScoreTable, n_positions: int) -> ScoreTable:
    """An empty table of as many positions, its columns like those of a shard."""

    def empty(like: Tensor) -> Tensor:
        return like.new_empty((n_positions, *like.shape[1:]))

    columns: dict[str, Any] = {name: empty(column) for name, column in shard.columns().items()}
    base = {name: empty(values) for name, values in shard.base.items()}
    return replace(shard, **columns, base=base)


def load_table(folder: str | Path, models: Sequence[str] | None = None) -> ScoreTable:
    """Read a score table into memory; see :class:`StoredTable` for tables that are too large.

    Args:
        folder: that ``multicolm score`` wrote.
        models: names in the order that is wanted, the table's base model first; all of the table's
            if not given.

    Raises:
        ArtefactError: if a file is missing or damaged, or a model was not scored.
    """
    return StoredTable(folder, models).load()


def load_prompt_digests(folder: str | Path) -> list[str]:
    """Of every example of a score table, :func:`multicolm.types.prompt_digest` of its prompt.

    Raises:
        ArtefactError: if a file is missing or damaged.
    """
    index = _finished_index(folder)
    files = TableFiles(Path(folder), index)
    texts = [files.read(TEXT, number)["prompt_digests"] for number in range(len(index.shards))]
    return [f"{number % (1 << 64):016x}" for text in texts for number in text.tolist()]
