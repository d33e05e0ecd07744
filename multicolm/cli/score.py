"""``multicolm score``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import click
from typing_extensions import Unpack

from multicolm.cli.options import (
    Whole,
    as_json,
    ensemble_argument,
    examples,
    json_option,
    loading,
)
from multicolm.cli.processes import on_own_device, processes

if TYPE_CHECKING:
    from multicolm.backend.base import Model
    from multicolm.config import EnsembleConfig
    from multicolm.ensemble import Ensemble
    from multicolm.scoring.corpus import Corpus
    from multicolm.scoring.store import Index

__all__ = ["command"]


@click.command(
    epilog=examples(
        "score tiny questions.jsonl --out runs/scores",
        "score duo.yaml organisation/dataset --for mlp-router --dry-run --out runs/scores",
    )
)
@ensemble_argument
@click.argument("data")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the score table."
)
@click.option(
    "--for",
    "policies",
    metavar="POLICY",
    multiple=True,
    help="Keep what this policy learns from; the ensemble's own if not given. Repeatable.",
)
@click.option(
    "--hidden", is_flag=True, help="Keep the base model's last hidden state at each position."
)
@click.option(
    "--topk", type=Whole(1), metavar="K", help="Keep the base model's K highest log-probabilities."
)
@click.option(
    "--embedding", is_flag=True, help="Keep the embedding of the base model's most likely token."
)
@click.option("--limit", type=Whole(1), metavar="N", help="Use N examples only, spread evenly.")
@click.option("--no-end", is_flag=True, help="Do not count the end of a completion as a token.")
@click.option("--split", default="train", show_default=True, help="Split of a data set on the Hub.")
@click.option("--subset", help="Configuration of a data set on the Hub.")
@click.option("--revision", help="Commit, tag or branch of a data set on the Hub.")
@click.option(
    "--shard-positions",
    type=Whole(1),
    default=32768,
    show_default=True,
    help="Tokens per shard; one shard is held in memory.",
)
@click.option(
    "--batch-tokens",
    type=Whole(1),
    help="Maximum tokens of one forward pass; by default what takes a few seconds.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what would be read, and exit; no model is loaded."
)
@json_option
def command(
    ensemble: str,
    data: str,
    out: Path,
    policies: tuple[str, ...],
    hidden: bool,
    topk: int | None,
    embedding: bool,
    limit: int | None,
    no_end: bool,
    split: str,
    subset: str | None,
    revision: str | None,
    shard_positions: int,
    batch_tokens: int | None,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Let every model of ENSEMBLE read DATA, and keep its log-probability of each token.

    DATA is a file of JSON lines {"prompt": ..., "completion": ...} or {"messages": [...]}, a CSV
    or Parquet file, or the name of a data set on the Hub. Repeat the command to resume: nothing is
    loaded if nothing is missing, and new models and features are added to the existing table.
    Under `accelerate launch` the shards are split over the processes.
    """
    from multicolm.config import load_ensemble
    from multicolm.scoring.corpus import open_corpus

    corpus = open_corpus(data, split=split, subset=subset, revision=revision, limit=limit)
    config = load_ensemble(ensemble)
    features = _features(config, policies)
    asked = {"hidden": hidden, "embedding": embedding, "topk": topk is not None}
    features |= {name: 0 for name in asked if asked[name] and name not in features}
    top_k = max(topk or 0, features.get("topk", 0))
    how: _How = {
        "features": tuple(sorted(features)),
        "top_k": top_k,
        "end_of_text": not no_end,
        "shard_positions": shard_positions,
        "batch_tokens": batch_tokens,
    }
    if dry_run:
        _say_plan(config, corpus, out, how, as_json_)
        return
    index, seconds = _scored(config, corpus, out, **how)
    if int(os.environ.get("RANK", "0")) == 0:
        _report(index, out, seconds, as_json_)


def _features(config: EnsembleConfig, names: Sequence[str]) -> dict[str, int]:
    """What the policies will be trained on, by feature; the ensemble's own if none is named.

    Raises:
        CapabilityError: if a policy that is named has nothing to learn.
        ConfigError: if there is no such policy.
    """
    from multicolm.errors import CapabilityError
    from multicolm.policy.resolve import resolve_policy

    if names:
        policies = [resolve_policy(name) for name in names]
    else:
        policies = [resolve_policy(config.policy, base_dir=config.base_dir)]
    found: dict[str, int] = {}
    for policy in policies:
        if hasattr(policy, "fit"):
            for name, width in policy.table_features.items():
                found[name] = max(width, found.get(name, 0))
        elif names:
            raise CapabilityError(
                f"policy '{policy.name}' has nothing to learn, so a score table keeps nothing for "
                "it; its params are found with `multicolm tune`."
            )
    return found


class _How(TypedDict):
    """Arguments of :func:`multicolm.scoring.score.score`."""

    features: tuple[str, ...]
    top_k: int
    end_of_text: bool
    shard_positions: int
    batch_tokens: int | None


def _scored(
    config: EnsembleConfig, corpus: Corpus, out: Path, **how: Unpack[_How]
) -> tuple[Index, float]:
    """The finished table, and how long it was scored; 0 seconds if nothing was missing.

    Only models that have something to read are loaded.

    Raises:
        MulticolmError: what can be found without a model first.
    """
    from multicolm.cli.progress import work_bar, working
    from multicolm.files import locked
    from multicolm.scoring.score import Progress, finish, score
    from multicolm.scoring.store import TableFiles

    with working("reading what is scored already"):
        there, missing = _there(config, corpus, out, **how)
    rank, n_ranks, wait = processes()
    if not missing:
        if there.files or rank > 0:
            return there, 0.0
        with locked(out), working("writing the table"):
            return finish(TableFiles(out, there)), 0.0
    loaded = _load(on_own_device(_only(config, missing)))
    if how["end_of_text"] and not loaded.vocabulary.end_ids(0):
        # Then the token that stands for the end of a text is one of the others'.
        loaded = _load(on_own_device(_only(config, config.names)))
    start = time.perf_counter()
    with work_bar("tokens", "reading the corpus") as bar:

        def show(progress: Progress) -> None:
            if progress.total > progress.before:
                done = progress.done - progress.before
                bar(done, progress.total - progress.before, f"scoring with {progress.model}")

        index = score(
            loaded,
            corpus,
            out,
            models=config.names,
            rank=rank,
            n_ranks=n_ranks,
            wait=wait,
            on_progress=show,
            **how,
        )
    return index, time.perf_counter() - start


def _say_plan(config: EnsembleConfig, corpus: Corpus, out: Path, how: _How, as_json_: bool) -> None:
    """What the same command without --dry-run would read. Of the models tokenizers are loaded.

    Raises:
        MulticolmError: what scoring would find before it loads a model.
    """
    there, missing = _there(config, corpus, out, **how)
    base = config.base_model
    n_examples, n_tokens = _counts(config, corpus, how["end_of_text"])
    kept = [f"{base}'s {name}" for name in how["features"]]
    if as_json_:
        facts = {"examples": n_examples, "tokens": n_tokens, "to_read": missing, "keeps": kept}
        click.echo(as_json({"out": str(out), **facts}))
        return
    count = "an unknown number of" if n_tokens is None else f"{n_tokens:,}"
    click.echo(f"{corpus.source.name}: {n_examples:,} completions of {count} tokens of {base}'s")
    whole = [model.name for model in there.models if model.name not in missing]
    if whole:
        click.echo(f"scored already in {out}: {', '.join(whole)}")
    for name in missing:
        click.echo(f"to be read by {name}")
    if missing and kept:
        click.echo(f"to be kept besides the scores: {', '.join(kept)}")


def _counts(config: EnsembleConfig, corpus: Corpus, end_of_text: bool) -> tuple[int, int | None]:
    """Examples, and tokens of their completions: at most so many, if a context is short.

    Of a base model whose tokenizer is not in a folder of transformers' the tokens are not known.
    """
    from multicolm.backend.loading import load_tokenizer
    from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

    model = config.models[config.base_model]
    if model.backend in ("llama-cpp", "table"):
        return sum(1 for _ in corpus), None
    adapter = HuggingFaceTokenizer(load_tokenizer(config.base_model, model), config.base_model)
    n_examples = n_tokens = 0
    for example in corpus:
        n_examples += 1
        n_tokens += len(adapter.encode_continuation(example.completion)) + end_of_text
    return n_examples, n_tokens


def _there(
    config: EnsembleConfig, corpus: Corpus, out: Path, **how: Unpack[_How]
) -> tuple[Index, list[str]]:
    """What is scored already, and the names of the models that have something to read.

    Raises:
        MulticolmError: if a record or a name is not right, the base model cannot show a feature,
            or the folder holds something else.
    """
    from multicolm.errors import ArtefactError
    from multicolm.plugins import backends
    from multicolm.scoring.plan import (
        check_features,
        check_names,
        scored_before,
        template_digests,
    )
    from multicolm.scoring.store import Index, ScoredModel
    from multicolm.training.identities import identities

    check_names(config.names)
    if out.exists() and not out.is_dir():
        raise ArtefactError(f"{out} is a file; --out wants the folder of a score table.")
    base = config.models[config.base_model]
    backend = cast("type[Model]", backends.get(base.backend))
    check_features(config.base_model, backend.signals, how["features"])
    found, templates = identities(config), template_digests(config, corpus)
    wanted = Index(
        multicolm="",
        source=corpus.source.name,
        digest=corpus.digest(),
        n_examples=0,
        n_skipped=0,
        n_positions=0,
        end_of_text=how["end_of_text"],
        top_k=how["top_k"],
        models=tuple(
            ScoredModel(
                name,
                found[name],
                "",
                config.models[name].cost,
                how["features"] if name == config.base_model else (),
                template=templates.get(name, ""),
            )
            for name in config.names
        ),
        shards=(),
        files={},
    )
    precisions = {
        name: "" if model.dtype == "auto" or model.backend != "transformers" else model.dtype
        for name, model in config.models.items()
    }
    bridges = {"shared": {"shared"}, "exact": {"shared", "exact"}}
    return scored_before(
        out, wanted, precisions, bridges.get(config.bridge, {"shared", "boundary"})
    )


def _only(config: EnsembleConfig, names: Sequence[str]) -> EnsembleConfig:
    """The base model and some of the others, without the policy, which nobody asks."""
    from multicolm.config import PolicyConfig

    kept = {n: m for n, m in config.models.items() if n in names or n == config.base_model}
    changed = {"models": kept, "policy": PolicyConfig(kind="single")}
    return config.model_copy(update=changed)


def _load(config: EnsembleConfig) -> Ensemble:
    import multicolm
    from multicolm.cli.progress import working

    with working(loading(config)):
        return multicolm.load(config)


def _report(index: Index, out: Path, seconds: float, as_json_: bool) -> None:
    from dataclasses import asdict

    if as_json_:
        click.echo(as_json({"out": str(out), **asdict(index)}))
        return
    names = ", ".join(model.name for model in index.models)
    took = f"{seconds:.1f} s" if seconds else "nothing was missing"
    click.echo(
        f"{out}: {index.n_positions:,} tokens of {index.n_examples:,} completions, scored by "
        f"{names} ({len(index.shards)} shard{'s' * (len(index.shards) != 1)}, {took})"
    )
    if index.models[0].features:
        click.echo(f"{index.models[0].name}'s features: {', '.join(index.models[0].features)}")
    if index.n_skipped:
        click.echo(
            f"{index.n_skipped} examples were left out: the prompt is longer than the base "
            "model's context, or the completion is empty.",
            err=True,
        )
    for model in index.models:
        if model.n_unknown:
            click.echo(
                f"{model.name} could not score {model.n_unknown} tokens: its context is too "
                "short. They do not count in what is learned of it.",
                err=True,
            )
