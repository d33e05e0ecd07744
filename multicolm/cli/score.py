"""``multicolm score``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from multicolm.cli.options import Whole, as_json, json_option
from multicolm.cli.processes import on_own_device, processes

if TYPE_CHECKING:
    from multicolm.config import EnsembleConfig
    from multicolm.ensemble import Ensemble
    from multicolm.scoring.store import Index

__all__ = ["command"]


@click.command
@click.argument("ensemble")
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The table's folder.")
@click.option("--hidden", is_flag=True, help="Keep the base model's last hidden states.")
@click.option(
    "--topk", type=Whole(1), metavar="K", help="Keep the base's K best log-probabilities."
)
@click.option("--embedding", is_flag=True, help="Keep the embeddings of the base's best tokens.")
@click.option("--no-end", is_flag=True, help="The end of a completion does not count as a token.")
@click.option("--split", default="train", show_default=True, help="Of a data set on the Hub.")
@click.option("--subset", help="Of a data set on the Hub that has several.")
@click.option("--revision", help="Commit, tag or branch of a data set on the Hub.")
@click.option(
    "--shard-positions",
    type=Whole(1),
    default=32768,
    show_default=True,
    help="Tokens per shard: what a stop can cost, and what is held in memory.",
)
@click.option(
    "--batch-tokens",
    type=Whole(1),
    default=4096,
    show_default=True,
    help="The most tokens of one forward pass.",
)
@json_option
def command(
    ensemble: str,
    data: str,
    out: Path,
    hidden: bool,
    topk: int | None,
    embedding: bool,
    no_end: bool,
    split: str,
    subset: str | None,
    revision: str | None,
    shard_positions: int,
    batch_tokens: int,
    as_json_: bool,
) -> None:
    """Let every model of ENSEMBLE read DATA, and keep what it gives to each token.

    DATA is a file of JSON lines {"prompt": ..., "completion": ...} or {"messages": [...]}, a
    Parquet file, or the name of a data set on the Hub. The same command goes on where it was
    stopped; models that were added to the ensemble are scored into the same table. Under
    `accelerate launch` the shards are split over the processes.
    """
    from multicolm.cli.console import work_bar
    from multicolm.config import load_ensemble
    from multicolm.scoring.corpus import open_corpus
    from multicolm.scoring.score import Progress, score

    corpus = open_corpus(data, split=split, subset=subset, revision=revision)
    config = load_ensemble(ensemble)
    rank, n_ranks, wait = processes()
    loaded = _load(on_own_device(config))
    wanted = {"hidden": hidden, "topk": topk is not None, "embedding": embedding}
    start = time.perf_counter()
    with work_bar("tokens") as bar:

        def show(progress: Progress) -> None:
            bar(progress.done, progress.total, f"scoring with {progress.model}")

        index = score(
            loaded,
            corpus,
            out,
            features=[name for name, asked in wanted.items() if asked],
            top_k=topk or 0,
            end_of_text=not no_end,
            shard_positions=shard_positions,
            batch_tokens=batch_tokens,
            rank=rank,
            n_ranks=n_ranks,
            wait=wait,
            on_progress=show,
        )
    if rank == 0:
        _report(index, out, time.perf_counter() - start, as_json_)


def _load(config: EnsembleConfig) -> Ensemble:
    import multicolm
    from multicolm.cli.console import console

    errors = console(stderr=True)
    if not errors.is_terminal:
        return multicolm.load(config)
    with errors.status(f"loading {len(config.models)} models"):
        return multicolm.load(config)


def _report(index: Index, out: Path, seconds: float, as_json_: bool) -> None:
    from dataclasses import asdict

    if as_json_:
        click.echo(as_json({"out": str(out), **asdict(index)}))
        return
    names = ", ".join(model.name for model in index.models)
    click.echo(
        f"{out}: {index.n_positions} tokens of {index.n_examples} completions, scored by {names} "
        f"({len(index.shards)} shards, {seconds:.1f} s)"
    )
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
