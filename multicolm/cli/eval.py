"""``multicolm eval``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from multicolm.cli.options import (
    SEED,
    Whole,
    as_json,
    completes,
    dry_run_option,
    ensemble_argument,
    examples,
    json_option,
    parameters,
)
from multicolm.errors import ConfigError

if TYPE_CHECKING:
    from multicolm.evaluation.harness import Likelihoods, Progress
    from multicolm.evaluation.harness_results import HarnessResults
    from multicolm.evaluation.harness_tasks import Unit

__all__ = ["command"]


@click.command(
    epilog=examples(
        "eval tiny --tasks gsm8k --policy average --limit 50 --out runs/eval",
    )
)
@ensemble_argument
@click.option(
    "--tasks",
    metavar="TASK,...",
    multiple=True,
    required=True,
    help="Names of tasks, groups or tags of the lm-evaluation-harness, with wildcards, or YAML "
    "files; with commas between them. Repeatable.",
)
@click.option(
    "--policy",
    "policies",
    metavar="POLICY",
    multiple=True,
    shell_complete=completes("policies", "trained"),
    help="A name (see `multicolm ls policies`), a YAML file, a folder with a policy.yaml, or "
    "file.py:Class. Repeatable.  [default: the ensemble's]",
)
@click.option(
    "--include-path",
    metavar="FOLDER",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder with tasks of your own; Python that their YAML names is run. Repeatable.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results; repeat the command to resume.",
)
@click.option(
    "--likelihood",
    type=click.Choice(["auto", "joint", "routed", "both"]),
    default="auto",
    show_default=True,
    help="Score policies by the joint model, or by the models that they route to; auto is the "
    "joint model where the policy has one.",
)
@click.option("--alone/--no-alone", default=True, help="Evaluate every model alone.")
@click.option("--limit", type=Whole(1), help="Use this many questions of each task only.")
@click.option(
    "--num-fewshot", type=Whole(0), help="Number of few-shot examples. [default: the task's]"
)
@click.option(
    "--gen-kwargs",
    "pairs",
    metavar="NAME=VALUE[,...]",
    multiple=True,
    help="Generation settings, such as max_gen_toks=64,temperature=0. Repeatable.",
)
@click.option("--apply-chat-template", is_flag=True, help="Apply each model's own chat template.")
@click.option(
    "--fewshot-as-multiturn/--fewshot-as-one-turn",
    default=True,
    help="Whether examples are turns of the chat.",
)
@click.option("--system-instruction", metavar="TEXT", help="System instruction of every question.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option(
    "--batch-size", type=Whole(1), default=16, show_default=True, help="Texts decoded together."
)
@click.option(
    "--confirm-run-unsafe-code", is_flag=True, help="Allow tasks to run code that the models write."
)
@dry_run_option
@json_option
def command(
    ensemble: str,
    tasks: tuple[str, ...],
    policies: tuple[str, ...],
    include_path: tuple[Path, ...],
    out: Path | None,
    likelihood: Likelihoods,
    alone: bool,
    limit: int | None,
    num_fewshot: int | None,
    pairs: tuple[str, ...],
    apply_chat_template: bool,
    fewshot_as_multiturn: bool,
    system_instruction: str | None,
    seed: int,
    batch_size: int,
    confirm_run_unsafe_code: bool,
    dry_run: bool,
    as_json_: bool,
) -> None:
    """Evaluate policies, and every model of ENSEMBLE alone, on tasks of the lm-evaluation-harness.

    With --out every request is kept as it is answered: repeat the command to resume. If the folder
    holds the results of `multicolm compare`, the figures are shown on its page too.
    """
    # The harness and the libraries below it draw bars of their own, into ours and into logs.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from multicolm.cli.options import load
    from multicolm.cli.progress import say, working
    from multicolm.config import load_ensemble
    from multicolm.evaluation.answering import NamedPolicy, named_policy
    from multicolm.evaluation.harness import check_generation, check_units, evaluate_tasks
    from multicolm.evaluation.harness_tasks import load_units

    names = _names(tasks)
    gen_kwargs = _generation(pairs)
    check_generation(gen_kwargs)
    named = [named_policy(policy) for policy in policies]
    config = load_ensemble(ensemble)
    # First, so that a slip of the pen costs no loading of weights.
    with working("reading the tasks"):
        units = load_units(names, include_path, num_fewshot, gen_kwargs, limit)
    check_units(units, confirm_run_unsafe_code)
    say(_ahead(units, max(1, len(named)) + alone * len(config.models), limit))
    if dry_run:
        return
    loaded, own = load(ensemble, None, ())
    named = named or [NamedPolicy(config.policy.kind, own)]
    try:
        with _Shown() as show:
            results = evaluate_tasks(
                loaded,
                named,
                units,
                out=out,
                likelihood=likelihood,
                alone=alone,
                limit=limit,
                num_fewshot=num_fewshot,
                gen_kwargs=gen_kwargs,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=fewshot_as_multiturn,
                system_instruction=system_instruction,
                seed=seed,
                batch_size=batch_size,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
                title=ensemble,
                progress=show,
            )
    except KeyboardInterrupt:
        if out is not None:
            say(f"What was finished is kept in {out}; repeat the command to resume.")
        raise
    if as_json_:
        from multicolm.evaluation.wording import plain

        click.echo(as_json(plain(results.as_json())))
    else:
        _print(results, out)


def _names(given: Sequence[str]) -> list[str]:
    """The tasks that are named.

    Raises:
        ConfigError: if a name is empty.
    """
    names = [name.strip() for part in given for name in part.split(",")]
    if not all(names):
        raise ConfigError("--tasks: a name is missing beside a comma.")
    return names


def _ahead(units: Sequence[Unit], n_rows: int, limit: int | None) -> str:
    """What will be asked. How long that takes is known once requests are answered."""
    asked = (islice(task.eval_docs, limit) for unit in units for task in unit.tasks)
    n = sum(1 for questions in asked for _ in questions)
    names = ", ".join(unit.name for unit in units)
    rows = f"{n_rows:,} row{'s' * (n_rows != 1)}"
    return f"Ahead: {rows}, {n:,} questions each ({names}), {n_rows * n:,} in all."


def _generation(pairs: Sequence[str]) -> dict[str, Any]:
    """What ``--gen-kwargs`` says: one setting, or several as the harness's own command has them.

    A comma separates settings where another ``name=`` follows, and not within a value that is
    readable with it: a list in brackets, a text in quotes.

    Raises:
        ConfigError: if a setting has no ``=``, or its value is not readable.
    """
    read: dict[str, Any] = {}
    for pair in pairs:
        parts = re.split(r",(?=\s*[A-Za-z_]\w*=)", pair)
        value = pair.partition("=")[2].lstrip()
        if len(parts) > 1 and value[:1] in ("[", "{", "'", '"'):
            with contextlib.suppress(ConfigError):
                read |= parameters((pair,), "--gen-kwargs")
                continue
        read |= parameters(tuple(part.strip() for part in parts if part), "--gen-kwargs")
    return read


class _Shown:
    """A line on stderr for each row of a task that is done, and a bar for the one at work."""

    def __init__(self) -> None:
        from multicolm.cli.progress import work_bar

        self._work = work_bar("requests")

    def __enter__(self) -> _Shown:
        self._bar = self._work.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._work.__exit__(*error)  # type: ignore[arg-type]

    def __call__(self, progress: Progress) -> None:
        from multicolm.cli.progress import say

        label = f"{progress.row}, {progress.task}"
        if progress.finished:
            say(f"{label}: done")
        else:
            self._bar(progress.done, progress.total, label)


def _print(results: HarnessResults, out: Path | None) -> None:
    from multicolm.cli.console import print_table, visible
    from multicolm.evaluation.harness_results import figure_text, leaders

    rows: list[Sequence[object]] = []
    for column in results.columns():
        best = leaders(column)
        for figure in column:
            mark = " *" if figure in best else ""
            cells = (figure.likelihood or "-", figure_text(figure) + mark)
            rows.append((figure.task, figure.label, figure.row, *cells))
    print_table(["task", "metric", "row", "likelihood", "figure"], rows)
    click.echo("* the best of its task and metric; ± is the standard error")
    for warning in results.warnings:
        click.echo(visible(f"Warning: {warning}"), err=True)
    if out is not None:
        click.echo(f"\n{out / 'lm_eval.md'}")
