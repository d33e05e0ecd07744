"""``multicolm train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from multicolm.cli.options import (
    DryRun,
    Whole,
    as_json,
    completes,
    dry_run_option,
    ensemble_argument,
    examples,
    json_option,
    loading,
    parameters,
    policy_options,
    telling,
)
from multicolm.cli.processes import rank
from multicolm.cli.tracking import numbers_of, track_option, tracked
from multicolm.errors import ConfigError

if TYPE_CHECKING:
    from multicolm.config import EnsembleConfig
    from multicolm.policy.base import Policy
    from multicolm.training.checkpoint import Checkpoint

__all__ = ["command"]

_OPTIONS = """What --option takes, by policy:

\b
  co-llm, fusion-route      solver network width n_blocks dropout epochs lr
                            batch_size l2 held_out patience balance seeds
                            device weak_epochs cost_weight
  mlp-router, cpr           the same with recall, not weak_epochs and
                            cost_weight
  unite                     gap length_ratio
  cosd-tree, query-router   none; their own params are given with --set
  with --train-base         lr head_lr epochs batch_size batch_tokens warmup
                            weight_decay clip max_length held_out patience
                            seed ignore_rollouts init network lora_rank
                            lora_alpha lora_dropout lora_targets
                            gradient_checkpointing mixed_precision"""


@click.command(
    epilog=examples(
        "train tiny runs/scores --policy co-llm --out runs/co-llm",
        "train tiny --task tiny-world --policy query-router --out runs/query-router",
        "train tiny runs/scores --policy mlp-router --option network=residual --out runs/mlp",
        more=_OPTIONS,
    )
)
@ensemble_argument
@click.argument("scores", required=False)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint."
)
@policy_options
@click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="Training option, such as lr=0.003 or seeds=[0,1,2]. Repeatable.",
)
@click.option(
    "--train-base",
    type=click.Choice(["lora", "full"]),
    help="Train the base model too: a LoRA adapter for it, or all its weights.",
)
@click.option(
    "--task",
    shell_complete=completes("tasks"),
    help="Instead of SCORES: every model answers its questions, and the policy learns from that.",
)
@click.option("--split", default="train", show_default=True, help="Split of the task.")
@click.option("--limit", type=Whole(1), help="Use this many questions only.")
@click.option("--license", "license_", default="", help="License of the checkpoint, for its card.")
@track_option
@dry_run_option
@json_option
def command(
    ensemble: str,
    scores: str | None,
    out: Path,
    policy: str | None,
    pairs: tuple[str, ...],
    options: tuple[str, ...],
    train_base: Literal["lora", "full"] | None,
    task: str | None,
    split: str,
    limit: int | None,
    license_: str,
    track: str | None,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Train a policy of ENSEMBLE on SCORES, a folder that `multicolm score` wrote.

    From SCORES no model is loaded. A policy that chooses one model per prompt (query-router), or
    the models that fit a task (unite), learns from answers instead: give --task in the place of
    SCORES. The checkpoint is used as `--policy ./CHECKPOINT`, or in an ensemble file as `policy:
    ./CHECKPOINT`. Repeat a command that was stopped to resume.

    With --train-base the base model is trained together with the policy's head, and is the only one
    that is loaded; with `--policy single` it is fine-tuned alone. The checkpoint is an ensemble
    then. Under `accelerate launch` or `torchrun` the processes share each batch.
    """
    from multicolm.cli.progress import say
    from multicolm.config import load_ensemble
    from multicolm.policy.resolve import resolve_policy

    config = load_ensemble(ensemble)
    if policy is None:
        raise ConfigError("which policy? Give one that learns with --policy, such as co-llm.")
    chosen = resolve_policy(policy, parameters(pairs))
    if (scores is None) == (task is None):
        raise ConfigError(
            "trained on what? Give SCORES, a folder that `multicolm score` wrote, or --task with a "
            "task that every model answers alone; not both."
        )
    if task is not None and train_base is not None:
        raise ConfigError("--train-base learns from SCORES, not from the answers of a --task.")
    shared: dict[str, Any] = {"options": parameters(options, "--option"), "license": license_}
    if task is not None:
        shared["on_estimate"] = telling(dry_run, out)
        try:
            checkpoint = _on_answers(config, chosen, task, out, split, limit, shared)
        except DryRun:
            return
    else:
        say(f"Ahead: {_ahead(str(scores), train_base)}")
        if dry_run:
            return
        checkpoint = _on_scores(config, chosen, str(scores), out, train_base, shared)
    if rank() > 0:
        return  # The first process of `accelerate launch` speaks for all.
    report = checkpoint.provenance["train"]["report"]
    with tracked(track, out, {"ensemble": ensemble, "policy": policy, **shared["options"]}) as log:
        history = report.get("history", [])
        for step, epoch in enumerate(history):
            log(numbers_of(epoch), step)
        log(numbers_of(report), len(history))
    if as_json_:
        click.echo(as_json({"out": str(out), "kind": checkpoint.policy.name, **report}))
    else:
        _print(checkpoint, out, is_ensemble=train_base is not None)


def _ahead(scores: str, train_base: str | None) -> str:
    """What is learned from. How long that takes is known once it has begun."""
    from multicolm.scoring.store import read_index

    index = read_index(scores)
    names = ", ".join(model.name for model in index.models)
    loads = "the base model alone is" if train_base else "no model is"
    size = sum(file.stat().st_size for file in Path(scores).rglob("*") if file.is_file())
    return (
        f"{index.n_positions:,} tokens of {index.n_examples:,} completions, scored by {names} "
        f"({size / 2**20:,.0f} MiB); {loads} loaded."
    )


def _on_answers(
    config: EnsembleConfig,
    policy: Policy,
    task: str,
    out: Path,
    split: str,
    limit: int | None,
    shared: Mapping[str, Any],
) -> Checkpoint:
    import multicolm
    from multicolm.calibration.queries import train_on_answers
    from multicolm.cli.progress import row_step, work_bar, working
    from multicolm.evaluation.task import load_task

    asked = load_task(task)
    asked.development(split, limit)
    with working(loading(config)):
        loaded = multicolm.load(config)
    with work_bar("answers") as bar:
        return train_on_answers(
            loaded,
            policy,
            asked,
            out,
            split=split,
            limit=limit,
            progress=row_step(bar),
            on_progress=bar,
            **shared,
        )


def _on_scores(
    config: EnsembleConfig,
    policy: Policy,
    scores: str,
    out: Path,
    train_base: Literal["lora", "full"] | None,
    shared: Mapping[str, Any],
) -> Checkpoint:
    from multicolm.cli.progress import work_bar, working

    if train_base is not None:
        from multicolm.training.joint.train import train_joint

        how: dict[str, Any] = {"config": config, "how": train_base, **shared}
        with work_bar("steps", f"loading {config.base_model}") as bar:
            return train_joint(policy, scores, out, on_progress=bar, **how)
    from multicolm.training.identities import identities
    from multicolm.training.train import train

    with working("checking the models"):
        models = identities(config)
    with work_bar("steps", "reading the scores") as bar:
        return train(policy, scores, out, models=models, on_progress=bar, **shared)


def _print(checkpoint: Checkpoint, out: Path, *, is_ensemble: bool) -> None:
    """What was measured, and how the checkpoint is used."""
    from multicolm.cli.console import print_table
    from multicolm.training.report import report_lines, report_title

    report: dict[str, Any] = checkpoint.provenance["train"]["report"]
    if report:
        print_table([report_title(report), ""], report_lines(report))
        if "note" in report:
            click.echo(report["note"], err=True)
    use = f"use it with --policy {_as_path(out)}"
    if is_ensemble:
        use = f'an ensemble: multicolm generate {_as_path(out)} "PROMPT"'
    click.echo(f"{out}: a {checkpoint.policy.name} policy; {use}")


def _as_path(folder: Path) -> str:
    """As one writes a folder where a name could stand too."""
    text = str(folder)
    return text if "/" in text else f"./{text}"
