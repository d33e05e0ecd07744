"""``multicolm rollout``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from multicolm.cli.options import (
    SEED,
    Whole,
    as_json,
    completes,
    ensemble_argument,
    examples,
    json_option,
    load,
    policy_options,
)

if TYPE_CHECKING:
    from multicolm.calibration.rollouts import Labels, Plan

__all__ = ["command"]


@click.command(
    epilog=examples(
        "rollout tiny runs/scores --task tiny-world --limit 60",
    )
)
@ensemble_argument
@click.argument("scores", type=click.Path(path_type=Path))
@policy_options
@click.option(
    "--task",
    required=True,
    shell_complete=completes("tasks"),
    help="Task that judges the texts: a name or a YAML file.",
)
@click.option("--split", default="train", show_default=True, help="Split of the task; never test.")
@click.option(
    "--limit",
    type=Whole(1),
    default=2000,
    show_default=True,
    help="Maximum number of texts to finish.",
)
@click.option(
    "--samples",
    type=Whole(1),
    default=1,
    show_default=True,
    help="Texts per token, where tokens are sampled.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--batch-size", type=Whole(1), default=16, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and exit.")
@json_option
def command(
    ensemble: str,
    scores: Path,
    policy: str | None,
    pairs: tuple[str, ...],
    task: str,
    split: str,
    limit: int,
    samples: int,
    seed: int,
    batch_size: int,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Label SCORES by what becomes of the text after each model's token.

    Where the base model's likeliest token is not the corpus's, and another model's is the corpus's
    or a third one, the text is completed after each candidate with --policy (the ensemble's own if
    not given) and scored with the task's metric; the corpus's prompts are the task's questions. The
    model whose token gives the best text is the label there; elsewhere the corpus's token is.
    `multicolm train` learns from these labels.

    Repeat the command to resume; a larger --limit adds texts. Another --policy, such as the one
    that was trained on these labels, replaces them.
    """
    from multicolm.calibration.rollouts import label, plan_rollouts
    from multicolm.cli.progress import work_bar
    from multicolm.config import load_ensemble
    from multicolm.evaluation.task import load_task

    judge = load_task(task)
    config = load_ensemble(ensemble)
    plan = plan_rollouts(
        scores, config.names, judge, split=split, limit=limit, samples=samples, seed=seed
    )
    click.echo(_announcement(plan), err=True)
    if dry_run:
        return
    loaded, chosen = load(ensemble, policy, pairs)
    try:
        with work_bar("texts", "finishing texts") as bar:
            before: list[int] = []

            def show(done: int, total: int) -> None:
                before.append(done)
                bar(done - before[0], total - before[0], "finishing texts")
                del before[1:]

            labels = label(
                loaded,
                scores,
                judge,
                plan,
                policy=chosen,
                split=split,
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                on_progress=show,
            )
    except KeyboardInterrupt:
        click.echo(
            f"What was finished is kept in {scores}; repeat the command to resume.", err=True
        )
        raise
    _report(labels, scores, as_json_)


def _announcement(plan: Plan) -> str:
    return (
        f"{len(plan.positions):,} of the {plan.n_candidates:,} places at which the base model "
        f"leaves the corpus (of {plan.n_positions:,}); {plan.n_texts:,} texts to finish."
    )


def _report(labels: Labels, scores: Path, as_json_: bool) -> None:
    if as_json_:
        click.echo(as_json({"out": str(scores), **labels.as_json()}))
        return
    n = labels.positions
    click.echo(
        f"{scores}: {n:,} places judged by {labels.texts:,} texts ({100 * labels.quality:.1f} % "
        f"right). The token decides at {100 * labels.decided / n:.1f} % of them; no token is "
        f"better than the base model's at {100 * labels.base_right / n:.1f} %; others are right "
        f"than in the corpus at {100 * labels.unlike_corpus / n:.1f} %."
    )
