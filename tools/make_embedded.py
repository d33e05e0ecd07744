"""`python tools/make_embedded.py`: rebuilds the embedded models, or measures a folder of them."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from multicolm.tiny.world import DEFAULT_SEED, KINDS, World, build_world


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tiny-build"),
    show_default=True,
    help="Folder for questions and models. A stopped build resumes after its finished models.",
)
@click.option("--seed", default=DEFAULT_SEED, show_default=True, help="Seed of world and training.")
@click.option(
    "--only-measure",
    "measured",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Train nothing; measure the models of this folder.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Models trained at one time, one thread each.",
)
def main(out: Path, seed: int, measured: Path | None, workers: int) -> None:
    """Rebuild the tiny models from nothing, then check that none can answer alone.

    Trains five models in some minutes on two CPU cores, and a policy for three of them in seconds.
    Exit code 1 if a threshold is missed.
    """
    console = Console()
    world = build_world(seed)
    if measured is None:
        _build(console, world, out, workers)
    _measure(console, world, measured or out)


def _build(console: Console, world: World, out: Path, workers: int) -> None:
    from embedded.build import BuildError, build, missing, prepare
    from embedded.head import train_head
    from embedded.training import PLANS

    started_s = time.monotonic()
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps, loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    try:
        prepare(out, world)
        with Progress(*columns, console=console) as progress:
            bars = {
                name: progress.add_task(name, total=PLANS[name].steps, start=False, loss="-")
                for name in missing(out)
            }
            for report in build(world, out, workers):
                bar = bars[report.model]
                progress.start_task(bar)
                progress.update(bar, completed=report.step, loss=f"{report.loss_nats:.3f}")
                if report.step == report.steps:
                    progress.console.print(f"{report.model}: all {report.steps} steps done")
        train_head(out)
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        console.print(f"Stopped. What is finished stays in {out}; repeat the command to resume.")
        raise SystemExit(130) from None
    console.print(f"Trained in {(time.monotonic() - started_s) / 60:.1f} minutes: {out}")


def _measure(console: Console, world: World, folder: Path) -> None:
    import torch
    from embedded.measure import measure
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with console.status("measuring") as status:
            result = measure(
                folder,
                world,
                world.questions("test"),
                lambda what: status.update(f"measuring {what}"),
            )
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    table = Table("exact match in %", "all", *KINDS, title="Held-out test questions, greedy")
    for name, score in result.scores.items():
        parts = (f"{score.by_kind[kind]:.0f}" for kind in KINDS)
        table.add_row(name, f"{score.overall:.1f}", *parts)
    console.print(table)
    shortfalls = result.shortfalls()
    if shortfalls:
        raise click.ClickException("; ".join(shortfalls))
    console.print("No model can answer alone, and together they can.")


if __name__ == "__main__":
    main()
