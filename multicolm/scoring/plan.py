"""What is to be scored: the tokens of a corpus, in shards, and what is there already."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from multicolm.config import EnsembleConfig
from multicolm.decoding.prompts import encode_prompt
from multicolm.ensemble import Ensemble
from multicolm.errors import ArtefactError, CapabilityError, ConfigError, InputError
from multicolm.files import sha256
from multicolm.scoring.corpus import Corpus, Example
from multicolm.scoring.spans import spelled
from multicolm.scoring.store import (
    FEATURES,
    TEXT,
    Index,
    ScoredModel,
    Shard,
    TableFiles,
    read_index,
)
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.version import __version__

__all__ = [
    "ExampleReader",
    "check_features",
    "check_names",
    "join",
    "plan",
    "refuse_other_corpus",
    "scored_before",
    "template_digests",
]


class ExampleReader:
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

        None at all of one that the base model's tokenizer drops as a whole.

        Raises:
            InputError: if the base model has no tokens for it.
        """
        try:
            ids = self._models[0].tokenizer.encode_continuation(example.completion)
        except InputError as error:
            raise InputError(f"{example.place}: {error}") from error
        if self.end is None or (example.completion and not ids):
            return ids
        return [*ids, self.end]

    def contents(self, example: Example, n_tokens: int) -> list[bytes]:
        """What of a completion each of its first tokens stands for; nothing for the end.

        Models of other vocabularies read this: the base model's tokenizer may change a text.
        """
        found = spelled(self._models[0].tokenizer, example.completion.encode()).contents
        return [*found, b""][:n_tokens]

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

    def readable(self, example: Example) -> list[int]:
        """The tokens of a completion that the base model's context reaches.

        Raises:
            InputError: if the base model has no tokens for it, or cannot read the prompt.
        """
        ids = self.ids(example)
        limit = self._models[0].context_length
        room = len(ids) if limit is None else limit - len(self.prompt(example, 0)) + 1
        return ids[: max(0, room)]


def plan(
    ensemble: Ensemble,
    corpus: Corpus,
    features: Sequence[str],
    top_k: int,
    end_of_text: bool,
    shard_positions: int,
) -> Index:
    """Read through the corpus once, and say which stretches of it will be one shard each."""
    reader = ExampleReader(ensemble, end_of_text)
    digest = hashlib.sha256()
    shards: list[Shard] = []
    first = n_examples = n_positions = n_skipped = 0
    for example in corpus:
        digest.update(example.canonical + b"\n")
        n_new = len(reader.readable(example))
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
    templates = template_digests(ensemble.config, corpus)
    models = tuple(
        ScoredModel(
            model.name,
            model.identity,
            model.precision,
            ensemble.costs[k],
            kept if k == 0 else (),
            bridge=_bridge(ensemble.vocabulary, k),
            template=templates.get(model.name, ""),
        )
        for k, model in enumerate(ensemble.backends)
    )
    return Index(
        multicolm=__version__,
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


def template_digests(config: EnsembleConfig | None, corpus: Corpus) -> dict[str, str]:
    """Of the chat templates, and their variables, of an ensemble file, where a corpus has chats.

    A model's own template is part of what it is (:func:`multicolm.backend.identity.identity_of`).
    """
    if config is None:
        return {}
    texts = {}
    for name, model in config.models.items():
        args = json.dumps(model.chat_template_args, sort_keys=True, default=str)
        text = (model.chat_template_text or "") + (args if model.chat_template_args else "")
        if text:
            texts[name] = text
    if not texts or not corpus.has_chats:
        return {}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _bridge(vocabulary: Vocabulary, k: int) -> str:
    """How a model's tokens and the base model's meet."""
    if vocabulary.groups[k] == vocabulary.groups[0]:
        return "shared"
    exact = isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k)
    return "exact" if exact else "boundary"


def join(folder: Path, index: Index, names: Sequence[str] | None = None) -> Index:
    """The index, with what is kept of models that were scored before.

    Args:
        folder: of the table.
        index: as planned.
        names: all models of the table, where some of them were scored before and are not planned.

    Raises:
        ArtefactError: if the folder holds something else, or not the scores of such a model.
    """
    if not (folder / "index.json").is_file():
        return index
    old = read_index(folder)
    refuse_other_corpus(folder, old, index.source, index.digest, index.end_of_text)
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
    before = {(m.name, m.identity, m.precision, m.template): m for m in old.models}
    models = []
    for model in index.models:
        known = before.get((model.name, model.identity, model.precision, model.template))
        kept = {*model.features, *(known.features if known else ())}
        models.append(replace(model, features=tuple(sorted(kept))))
    if names is not None:
        found = {model.name: model for model in (*old.models, *models)}
        models = [found[name] for name in names]
    return replace(index, models=tuple(models), top_k=max(old.top_k, index.top_k))


def refuse_other_corpus(
    folder: Path, old: Index, source: str, digest: str, end_of_text: bool
) -> None:
    """Refuse a folder that holds the scores of something else.

    Raises:
        ArtefactError: naming both.
    """

    def end(counts: bool) -> str:
        return f"end of text {'counted' if counts else 'left off'}"

    if (old.digest, old.end_of_text) != (digest, end_of_text):
        raise ArtefactError(
            f"{folder} holds scores of {old.source} (digest {old.digest[:12]}, "
            f"{end(old.end_of_text)}), and this is {source} (digest {digest[:12]}, "
            f"{end(end_of_text)}); choose another folder."
        )


def scored_before(
    folder: Path, index: Index, precisions: Mapping[str, str], bridges: Collection[str]
) -> tuple[Index, list[str]]:
    """What a folder holds already of a table, as far as that can be told without loading a model.

    Args:
        folder: of the table.
        index: of the table that is wanted, without shards; a model whose identity is empty is not
            known.
        precisions: by model, the type that it computes in; empty if only loading would tell.
        bridges: how the models' tokens may meet.

    Returns:
        The index of what is there, with the models that are wanted and there, and with files if it
        is finished; and the names of those that are missing, in whole or in part.

    Raises:
        ArtefactError: if the folder holds something else, or its index is damaged.
    """
    names = [model.name for model in index.models]
    if not (folder / "index.json").is_file():
        return index, names
    old = read_index(folder)
    refuse_other_corpus(folder, old, index.source, index.digest, index.end_of_text)
    known = {model.name: model for model in old.models}
    found, enough = [], set()
    for model in index.models:
        mine = known.get(model.name)
        same = (
            mine is not None
            and mine.identity == model.identity != ""
            and precisions[model.name] in ("", mine.precision)
            and mine.bridge in bridges
            and mine.template == model.template
        )
        if same and mine is not None:
            found.append(replace(mine, cost=model.cost))
            covered = set(model.features) <= set(mine.features)
            if covered and ("topk" not in model.features or index.top_k <= old.top_k):
                enough.add(model.name)
    there = replace(old, models=tuple(found))
    if not found or found[0].name != names[0]:
        return there, names
    files = TableFiles(folder, there)
    damaged = {
        name.partition("/")[0]
        for name, digest in old.files.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    }
    whole = [
        model
        for model in found
        if model.name in enough - damaged
        and all(files.is_done(model.name, number) for number in range(len(old.shards)))
    ]
    text = TEXT not in damaged and all(files.is_done(TEXT, i) for i in range(len(old.shards)))
    kept = {model.name for model in whole} if text else set()
    finished = tuple(whole) == old.models
    there = replace(there, models=tuple(whole), files=old.files if finished else {})
    return there, [name for name in names if name not in kept]


def check_features(base: str, shows: Collection[str], features: Sequence[str]) -> None:
    """Refuse features that a base model does not show.

    Raises:
        CapabilityError: naming those that it does.
    """
    for feature in features:
        if feature not in FEATURES or feature not in shows:
            shown = [name for name in FEATURES if name in shows]
            raise CapabilityError(
                f"the base model '{base}' does not show '{feature}'; it shows "
                f"{', '.join(shown) or 'no features'}."
            )


def check_names(models: Sequence[str]) -> None:
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
