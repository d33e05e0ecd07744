"""``multicolm tune``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from multicolm.cli.options import (
    SEED,
    DryRun,
    Real,
    Whole,
    as_json,
    completes,
    dry_run_option,
    ensemble_argument,
    examples,
    json_option,
    load,
    parameters,
    policy_options,
    telling,
)
from multicolm.cli.tracking import numbers_of, track_option, tracked
from multicolm.errors import ConfigError

if TYPE_CHECKING:
    from multicolm.evaluation.answering import NamedPolicy
    from multicolm.evaluation.task import Task
    from multicolm.policy.base import Policy
    from multicolm.training.checkpoint import Checkpoint

__all__ = ["command"]


@click.command(
    epilog=examples(
        "tune tiny --policy cosd-rule --task tiny-world --limit 24 --out runs/cosd-rule",
    )
)
@ensemble_argument
@policy_options
@click.option(
    "--task",
    "tasks",
    multiple=True,
    shell_complete=completes("tasks"),
    help="A name or a YAML file. Repeatable.",
)
@click.option(
    "--data",
    help="Questions instead of the task's, in the same form; without a task, records of prompt "
    "and completion.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the checkpoint.",
)
@click.option(
    "--budget", type=Real(least=0), help="Upper limit of what assistants write, or of the cost."
)
@click.option(
    "--unit",
    type=click.Choice(["share", "cost"]),
    default="share",
    show_default=True,
    help="Unit of --budget: share of the tokens, or the ensemble's cost per token.",
)
@click.option(
    "--spend",
    is_flag=True,
    help="Use as much of the budget as possible, instead of the best score within it.",
)
@click.option("--metric", help="Judge answers by this metric, such as exact-match.")
@click.option(
    "--grid", "grids", multiple=True, metavar="NAME=V,V,...", help="Values to try. Repeatable."
)
@click.option("--split", default="dev", show_default=True, help="Split of the task; never test.")
@click.option("--limit", type=Whole(1), help="Use this many questions only, spread evenly.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--batch-size", type=Whole(1), default=16, show_default=True)
@track_option
@dry_run_option
@json_option
def command(
    ensemble: str,
    policy: str | None,
    pairs: tuple[str, ...],
    tasks: tuple[str, ...],
    data: str | None,
    out: Path,
    budget: float | None,
    unit: Any,
    spend: bool,
    metric: str | None,
    grids: tuple[str, ...],
    split: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    track: str | None,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Tune the thresholds of a policy of ENSEMBLE on questions that are not the test's.

    Picks the values that answer best, within --budget if there is one; ties go to the cheapest.
    What was tried is stored with the policy. Repeat the command to resume.
    """
    from multicolm.calibration.tune import check_request, tune
    from multicolm.cli.progress import row_step, work_bar
    from multicolm.evaluation.answering import named_policy
    from multicolm.policy.resolve import resolve_policy

    if policy is None:
        raise ConfigError("which policy? Give one with --policy, such as cosd-rule.")
    read = _tasks(tasks, data, metric, split)
    grid = _grid(grids)
    # First, so that a slip of the pen costs no loading of weights.
    for each in read:
        each.development(split, limit)
    asked = resolve_policy(policy, parameters(pairs))
    check_request(asked, read, budget, unit, spend, grid or None)
    for name, values in grid.items():
        for value in values:
            resolve_policy(asked, {name: value})
    loaded, chosen = load(ensemble, policy, pairs)
    try:
        with work_bar("answers") as bar:
            checkpoint = tune(
                loaded,
                _named(named_policy(policy), chosen),
                read,
                out,
                budget=budget,
                unit=unit,
                spend=spend,
                grid=grid or None,
                split=split,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                progress=row_step(bar),
                on_estimate=telling(dry_run, out),
            )
    except DryRun:
        return
    except KeyboardInterrupt:
        click.echo(f"What was finished is kept in {out}; repeat the command to resume.", err=True)
        raise
    with tracked(track, out, {"ensemble": ensemble, "policy": policy, "split": split}) as log:
        for step, point in enumerate(checkpoint.provenance["tune"]["curve"]):
            log(numbers_of(point), step)
    _report(checkpoint, out, as_json_)


def _named(named: NamedPolicy, chosen: Policy) -> NamedPolicy:
    """The policy with the params of --set, and what is known of its checkpoint."""
    from dataclasses import replace

    return replace(named, policy=chosen)


def _tasks(names: tuple[str, ...], data: str | None, metric: str | None, split: str) -> list[Task]:
    """What is asked, and how it is judged.

    Raises:
        MulticolmError: if there is nothing to ask, or a task, its data or the metric cannot be
            used.
    """
    from multicolm.evaluation.task import completion_task, load_task

    if not names and data is None:
        raise ConfigError(
            "tuned on what? Give --task with a task, or --data with a file of JSON lines "
            '{"prompt": ..., "completion": ...}.'
        )
    if names:
        read = [load_task(name) for name in names]
        tasks = read if data is None else [task.with_data(split, data) for task in read]
    else:
        assert data is not None
        tasks = [completion_task(data, split)]
    return tasks if metric is None else [task.judged_by(metric) for task in tasks]


def _grid(grids: tuple[str, ...]) -> dict[str, list[float]]:
    """``("alpha=0.2,0.4",)`` as ``{"alpha": [0.2, 0.4]}``.

    Raises:
        ConfigError: if one has no ``=``, a value is no finite number, or a name comes twice.
    """
    values: dict[str, list[float]] = {}
    for grid in grids:
        name, equals, listed = grid.partition("=")
        if not equals or not name:
            raise ConfigError(f"--grid {grid}: write it as name=values, such as alpha=0.2,0.4.")
        if name in values:
            raise ConfigError(f"--grid {name}: give all its values at once, with commas between.")
        numbers = parameters((f"{name}=[{listed}]",), "--grid")[name]
        if not numbers or not all(_is_number(number) for number in numbers):
            raise ConfigError(f"--grid {grid}: write finite numbers, such as {name}=0.2,0.4.")
        values[name] = [float(number) for number in dict.fromkeys(numbers)]
    return values


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(cast("float", value))


def _report(checkpoint: Checkpoint, out: Path, as_json_: bool) -> None:
    from multicolm.cli.console import print_table

    facts = checkpoint.provenance["tune"]
    if as_json_:
        names = ("chosen", "measured", "cross_validated", "curve", "digest")
        shown = {name: facts[name] for name in names if name in facts}
        click.echo(as_json({"out": str(out), "kind": checkpoint.policy.name, **shown}))
        return
    curve = facts["curve"]
    click.echo(f"{facts['metric']} on {facts['source']}, {facts['questions']} questions\n")
    best = sorted(curve, key=lambda point: _order(point, facts))[:_SHOWN]
    tasks = [name for name in curve[0] if name.startswith("on ")]
    headings = [*facts["chosen"], facts["metric"], "95 % interval", "assistants", "cost", *tasks]
    print_table([*headings, ""], [_cells(point, facts, tasks) for point in best])
    if len(curve) > len(best):
        path = _as_path(out)
        click.echo(f"{len(curve) - len(best)} more were tried: multicolm show {path} --json")
    if "note" in facts:
        click.echo(f"\n{_caution(facts)}")
    params = " ".join(f"{name}={value:.4g}" for name, value in facts["chosen"].items())
    kind = checkpoint.policy.name
    click.echo(f"{out}: {kind} with {params}; use it with --policy {_as_path(out)}")


_SHOWN = 8


def _is_chosen(point: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return all(point[name] == value for name, value in facts["chosen"].items())


def _is_beyond(point: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a point spends more than the budget."""
    return "budget" in facts and bool(point[facts["unit"]] > facts["budget"])


def _order(point: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """The chosen one first, then the best within the budget, then the best beyond it."""
    beyond = _is_beyond(point, facts)
    return not _is_chosen(point, facts), beyond, -point["quality"], point["cost"]


def _cells(
    point: Mapping[str, Any], facts: Mapping[str, Any], tasks: Sequence[str]
) -> Sequence[str]:
    remark = "<- chosen" if _is_chosen(point, facts) else ""
    return [
        *(f"{point[name]:.4g}" for name in facts["chosen"]),
        f"{100 * point['quality']:.1f} %",
        f"{100 * point['low']:.1f} to {100 * point['high']:.1f}",
        f"{100 * point['share']:.1f} %",
        f"{point['cost']:.3f}",
        *(f"{100 * point[task]:.1f} %" for task in tasks),
        remark or ("beyond the budget" if _is_beyond(point, facts) else ""),
    ]


def _caution(facts: Mapping[str, Any]) -> str:
    """That the quality of the best of many is optimistic, and what it is without that."""
    text = (
        f"{100 * facts['measured']['quality']:.1f} % is optimistic: the best of "
        f"{len(facts['curve'])} on the questions that chose it."
    )
    if elsewhere := facts.get("cross_validated"):
        low, high = 100 * elsewhere["low"], 100 * elsewhere["high"]
        quality = 100 * elsewhere["quality"]
        text += f" Cross-validated: {quality:.1f} % ({low:.1f} to {high:.1f})."
    return text


def _as_path(out: Path) -> str:
    """As one writes a folder where a name could stand too."""
    text = str(out)
    return text if "/" in text else f"./{text}"
