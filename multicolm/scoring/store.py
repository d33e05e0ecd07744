"""How a score table lies on disk, and how it is read back.

    index.json                  what was scored, by whom, and a digest of every file
    text/00000.safetensors      per shard: the tokens that stand there, and the prompts
    MODEL/00000.safetensors     per shard and model: what the model gave to them

Shards are stretches of the corpus. Every file carries the key of what it was made from, so a run
that goes on after a stop knows which are done, and one of other data is never mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
    "ScoredModel",
    "Shard",
    "TableFiles",
    "load_prompt_digests",
    "load_table",
    "read_index",
]

FORMAT = 1
TEXT = "text"
PER_MODEL = ("gold_logprobs", "known", "top1_ids", "top1_logprobs", "entropies", "margins")
FEATURES = ("hidden", "topk", "embedding")


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
    """

    name: str
    identity: str
    precision: str
    cost: float
    features: tuple[str, ...] = ()
    n_unknown: int = 0
    bridge: str = "shared"


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
        if part != TEXT:
            model = next(model for model in self.models if model.name == part)
            facts += [model.identity or model.name, model.precision, model.features]
            facts += [self.top_k if "topk" in model.features else 0]
            facts += [model.bridge] if model.bridge != "shared" else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def parts(self) -> Iterator[tuple[str, int]]:
        """Every file: which part, which shard."""
        for number in range(len(self.shards)):
            for part in (TEXT, *(model.name for model in self.models)):
                yield part, number

    def as_json(self) -> str:
        """As it stands in the file."""
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

    def read(self, part: str, number: int) -> dict[str, Tensor]:
        """Read one file.

        Raises:
            ArtefactError: if it is missing, damaged, or made from something else.
        """
        path = self.path(part, number)
        if not path.is_file():
            raise ArtefactError(
                f"{path} is missing: the score table is not finished. Run the same `multicolm "
                "score` once more; it goes on where it stopped."
            )
        again = "delete it and run the same `multicolm score` once more: only it is made anew"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); {again}.") from error
        if metadata.get("key") != self.index.key(part, number):
            raise ArtefactError(f"{path} is of other data or another model; {again}.")
        wanted = self.index.files.get(f"{part}/{path.name}")
        if wanted is not None and sha256(path) != wanted:
            raise ArtefactError(f"{path} has changed since it was written; {again}.")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ArtefactError(f"{path}: '{name}' holds NaN; {again}.")
        return tensors


def read_index(folder: str | Path) -> Index:
    """What ``index.json`` of a score table says.

    Raises:
        ArtefactError: if it is missing, damaged, or of another format.
    """
    path = Path(folder) / "index.json"
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
            f"{folder} is not finished: run the same `multicolm score` once more; it goes on where "
            "it stopped."
        )
    return index


def load_table(folder: str | Path, models: Sequence[str] | None = None) -> ScoreTable:
    """Read a score table into memory.

    Args:
        folder: that ``multicolm score`` wrote.
        models: names in the order that is wanted, the table's base model first; all of the table's
            if not given.

    Raises:
        ArtefactError: if a file is missing or damaged, or a model was not scored.
    """
    index = _finished_index(folder)
    files = TableFiles(Path(folder), index)
    names = [model.name for model in index.models]
    wanted = list(models) if models is not None else names
    missing = [name for name in wanted if name not in names]
    if missing or wanted[0] != names[0]:
        raise ArtefactError(
            f"{folder} holds scores of {', '.join(names)} (the base model first), and the ensemble "
            f"is {', '.join(wanted)}; score the corpus with this ensemble, into the same folder if "
            "the base model is the same."
        )
    shards = range(len(index.shards))
    texts = [files.read(TEXT, number) for number in shards]
    scores = {name: [files.read(name, number) for number in shards] for name in wanted}
    described = {model.name: model for model in index.models}

    def column(name: str) -> Tensor:
        return torch.stack([torch.cat([s[name] for s in scores[k]]) for k in wanted], dim=1)

    base = described[wanted[0]]
    table = ScoreTable(
        models=ModelNames(wanted),
        gold_ids=torch.cat([text["gold_ids"] for text in texts]).long(),
        gold_logprobs=column("gold_logprobs"),
        known=column("known").bool(),
        top1_ids=column("top1_ids").long(),
        top1_logprobs=column("top1_logprobs"),
        entropies=column("entropies"),
        margins=column("margins"),
        example=torch.cat([text["example"] for text in texts]).long(),
        place=torch.cat([text["place"] for text in texts]).long(),
        base={name: torch.cat([s[name] for s in scores[wanted[0]]]) for name in base.features},
        costs=tuple(described[name].cost for name in wanted),
        identities=tuple(described[name].identity for name in wanted),
        digest=index.digest,
    )
    bridged = [name for name in wanted if described[name].bridge == "boundary"]
    if not bridged:
        return table
    opens = [torch.cat([s["open"] for s in scores[name]]) for name in bridged]
    return table.merged(torch.stack(opens, dim=1).bool())


def load_prompt_digests(folder: str | Path) -> list[str]:
    """Of every example of a score table, :func:`multicolm.types.prompt_digest` of its prompt.

    Raises:
        ArtefactError: if a file is missing or damaged.
    """
    index = _finished_index(folder)
    files = TableFiles(Path(folder), index)
    texts = [files.read(TEXT, number)["prompt_digests"] for number in range(len(index.shards))]
    return [f"{number % (1 << 64):016x}" for text in texts for number in text.tolist()]
