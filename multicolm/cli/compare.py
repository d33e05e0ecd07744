"""``multicolm compare``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from multicolm.cli.options import (
    SEED,
    DryRun,
    Whole,
    as_json,
    completes,
    dry_run_option,
    ensemble_argument,
    examples,
    json_option,
    telling,
)
from multicolm.cli.processes import processes
from multicolm.cli.tracking import Log, track_option, tracked
from multicolm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from multicolm.ensemble import Ensemble
    from multicolm.evaluation.compare import NamedPolicy, Progress
    from multicolm.evaluation.results import Comparison, RowResult

__all__ = ["command"]


@click.command(
    epilog=examples(
        "compare tiny --policies tiny/co-llm,cosd-rule --task tiny-world --out runs/comparison",
    )
)
@ensemble_argument
@click.option(
    "--policies",
    metavar="POLICY,...",
    multiple=True,
    shell_complete=completes("policies", "trained"),
    help="Names (see `multicolm ls policies`), YAML files, folders with a policy.yaml, or "
    "file.py:Class; with commas between them. Repeatable.",
)
@click.option(
    "--task",
    required=True,
    shell_complete=completes("tasks"),
    help="A name (see `multicolm ls tasks`), or a YAML file.",
)
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results; repeat the command to resume.",
)
@click.option("--split", default="test", show_default=True, help="Split of the task.")
@click.option("--limit", type=Whole(1), help="Use this many questions only, spread evenly.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option(
    "--batch-size", type=Whole(1), default=16, show_default=True, help="Texts decoded together."
)
@click.option("--max-new-tokens", type=Whole(1), help="Maximum new tokens. [default: the task's]")
@click.option("--alone/--no-alone", default=True, help="Evaluate every model alone.")
@click.option(
    "--random/--no-random", default=True, help="Run a random baseline with each policy's shares."
)
@click.option(
    "--oracle/--no-oracle",
    default=True,
    help="Report the per-question and per-token oracles.",
)
@click.option(
    "--sweep",
    type=Whole(0),
    default=5,
    show_default=True,
    help="Number of values to try of a policy's first tunable param.",
)
@click.option(
    "--traces",
    type=Whole(0),
    default=50,
    show_default=True,
    help="Questions whose traces are kept.",
)
@track_option
@dry_run_option
@json_option
def command(
    ensemble: str,
    policies: tuple[str, ...],
    task: str,
    out: Path,
    split: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    max_new_tokens: int | None,
    alone: bool,
    random: bool,
    oracle: bool,
    sweep: int,
    traces: int,
    track: str | None,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Compare policies on TASK with each other and with every model of ENSEMBLE alone.

    Answers are kept in FOLDER as they are finished: repeat the command to resume. In the end the
    folder holds a table, a plot and a page. Under `accelerate launch` the questions are split over
    the processes.
    """
    from multicolm.evaluation.task import load_task

    # First, so that a slip of the pen costs no loading of weights.
    read = load_task(task)
    read.sample(split, limit)
    named = _named(policies)
    rank, n_ranks, wait = processes()
    loaded = _load(ensemble, named)

    from multicolm.evaluation.compare import compare

    try:
        asked = {"ensemble": ensemble, "task": task, "split": split, "limit": limit, "seed": seed}
        with tracked(track, out, asked) as log, _shown(rank, log) as show, _one_line_warnings():
            comparison = compare(
                loaded,
                named,
                read,
                out=out,
                split=split,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                alone=alone,
                random=random,
                oracle=oracle,
                sweep=sweep,
                traces=traces,
                max_new_tokens=max_new_tokens,
                title=ensemble,
                rank=rank,
                n_ranks=n_ranks,
                wait=wait,
                progress=show,
                on_estimate=telling(dry_run, out) if n_ranks == 1 else None,
            )
    except DryRun:
        return
    except KeyboardInterrupt:
        click.echo(f"What was finished is kept in {out}; repeat the command to resume.", err=True)
        raise
    if rank > 0:
        return  # The first process of `accelerate launch` speaks for all.
    if as_json_:
        click.echo(as_json(comparison.as_json()))
    else:
        _print(comparison, out)


def _named(given: Sequence[str]) -> list[NamedPolicy]:
    """The policies of ``--policies``, read and checked.

    Raises:
        ConfigError: if one is empty, not known, or wrong.
    """
    from multicolm.evaluation.compare import named_policy

    names = [name.strip() for part in given for name in part.split(",")]
    if not all(names):
        raise ConfigError("--policies: a name is missing beside a comma.")
    return [named_policy(name) for name in names]


def _load(source: str, named: Sequence[NamedPolicy]) -> Ensemble:
    """The ensemble, after a look at whether the policies fit it."""
    from multicolm.cli.options import load
    from multicolm.config import load_ensemble
    from multicolm.evaluation.answering import check_names
    from multicolm.views import ModelNames

    names = ModelNames(load_ensemble(source).names)
    check_names([each.name for each in named])
    for each in named:
        each.policy.needs(names)
    return load(source, None, ())[0]


@contextmanager
def _shown(rank: int, log: Log) -> Iterator[Callable[[Progress], None]]:
    """A bar for the row at work, and a line on stderr for each that is done.

    Args:
        rank: of this process; only the first one speaks.
        log: is given each row's quality and speed when it is done.
    """
    if rank > 0:
        yield lambda progress: None
        return
    from multicolm.cli.progress import row_step, say, work_bar

    with work_bar("answers") as bar:
        step = row_step(bar)

        def show(progress: Progress) -> None:
            step(progress)
            if progress.finished and progress.quality is not None:
                quality = f"{100 * progress.quality:.1f} %"
                say(f"{progress.row}: {quality} of {progress.total} questions")
                log({f"quality/{progress.row}": progress.quality}, progress.number)

        yield show


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings as sentences, without the line of code that they are from."""
    from multicolm.cli.progress import say

    def show(message: Warning | str, *_: object, **more: object) -> None:
        say(f"Warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _print(comparison: Comparison, out: Path) -> None:
    from multicolm.cli.console import print_table, visible
    from multicolm.evaluation.table import gain_over, has_holm

    numbers = sorted({row.n_questions for row in comparison.rows})
    n = " or ".join(f"{number:,}" for number in numbers)
    questions = f"{n} question{'s' * (numbers != [1])}"
    measured = f"{comparison.metric} on {comparison.task}, {comparison.split} split, {questions}"
    click.echo(visible(measured) + "\n")
    corrected = has_holm(comparison)
    headings = ["row", comparison.metric, "95 % interval", gain_over(comparison), "p"]
    headings += ["p (Holm)"] * corrected + ["assistants", "tokens/s", "cost"]
    rows = [_cells(row, corrected) for row in comparison.rows]
    if comparison.has_calls:
        headings.append("HTTP calls/token")
        for cells, row in zip(rows, comparison.rows, strict=True):
            each = row.calls_per_token
            cells.append("" if each is None else f"{each:.2f}")
    print_table(headings, rows)
    for sentence in comparison.findings:
        click.echo(visible(f"\n{sentence}"))
    for warning in comparison.warnings:
        click.echo(visible(f"Warning: {warning}"), err=True)
    click.echo(f"\n{out / 'report.html'}")


def _cells(row: RowResult, corrected: bool) -> list[str]:
    gain = "" if row.gain is None else f"{100 * row.gain:+.1f}"
    work = [""] * 3
    if row.n_tokens:
        work = [_assistants(row), f"{row.tokens_per_second:.0f}", f"{row.cost:.3f}"]
    return [
        row.name,
        f"{100 * row.quality:.1f} %",
        f"{100 * row.low:.1f} to {100 * row.high:.1f}",
        gain,
        _p_value(row.p_value),
        *[_p_value(row.p_holm)] * corrected,
        *work,
    ]


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _assistants(row: RowResult) -> str:
    """What assistants wrote: on their own, and together with other models."""
    if row.n_mixed == row.n_tokens:
        return "together"
    alone = f"{100 * row.assistant_share:.1f} %"
    return f"{alone}, {100 * row.n_mixed / row.n_tokens:.1f} % together" if row.n_mixed else alone
