"""Runs tasks of EleutherAI's lm-evaluation-harness with an ensemble as the model.

One row per policy and per model alone. What was answered is kept, request by request, so that a
stopped run resumes. The harness is imported when it is used (the extra ``eval``).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from multicolm.ensemble import Ensemble
from multicolm.errors import (
    CapabilityError,
    ConfigError,
    InputError,
    MulticolmError,
    ServerError,
)
from multicolm.evaluation.answering import (
    NamedPolicy,
    Plan,
    check_names,
    named_policy,
    plans_of,
)
from multicolm.evaluation.harness_ledger import RowRequests, Rows
from multicolm.evaluation.harness_results import FILE, HarnessFigure, HarnessResults, as_bytes
from multicolm.evaluation.harness_tasks import Unit, load_units, quiet
from multicolm.evaluation.provenance import machine, plain, versions
from multicolm.evaluation.results import read_comparison, read_traces
from multicolm.files import write_whole
from multicolm.numbers import check_seed, check_whole
from multicolm.policy.base import Policy
from multicolm.scoring.likelihood import Kind, LikelihoodReader

__all__ = ["Likelihoods", "Progress", "check_generation", "check_units", "evaluate_tasks"]

Likelihoods: TypeAlias = Literal["auto", "joint", "routed", "both"]
"""Which log-likelihoods a policy is judged by: the joint ones where it has them and else the
routed ones (``auto``), one of the two, or each in a row of its own where it has both."""

# As the harness's own command has it, so that equal tasks draw equal examples.
_FEW_SHOT_SEED = 1234


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an evaluation has come.

    Attributes:
        row: at work.
        task: at work.
        done: requests that are answered, in this sitting or before.
        total: of these there are, of the kind at work.
        finished: whether the row is done with the task.
    """

    row: str
    task: str
    done: int
    total: int
    finished: bool = False


@dataclass(frozen=True)
class _Row:
    """A policy and by which likelihood it is judged; ``None`` where none is asked for."""

    plan: Plan
    likelihood: Kind | None

    @property
    def policy(self) -> Policy:
        """The plan's."""
        return self.plan.checked


def evaluate_tasks(
    ensemble: Ensemble,
    policies: Sequence[NamedPolicy | str | Path | Policy],
    tasks: Sequence[str | Unit],
    *,
    out: str | Path | None = None,
    include_path: Sequence[str | Path] = (),
    likelihood: Likelihoods = "auto",
    alone: bool = True,
    limit: int | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    system_instruction: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    confirm_run_unsafe_code: bool = False,
    title: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> HarnessResults:
    """Judge policies, and every model alone, by tasks of the harness.

    Called again with the same arguments and ``out``, it resumes at the first request that is not
    answered. The figures do not depend on that, but as
    :class:`~multicolm.evaluation.harness_model.EnsembleLM` says for texts that are written.

    Args:
        ensemble: whose models read and write.
        policies: what is judged.
        tasks: names of tasks, groups or tags, with wildcards; YAML files; or what is loaded.
        out: folder for ``lm_eval.json`` and ``lm_eval.md``; if it holds a comparison, the figures
            are shown on its page too. Nothing is written and nothing resumed if not given.
        include_path: folders with tasks of your own. What their YAML names is Python that is run.
        likelihood: by which one policies are judged.
        alone: whether every model is judged alone.
        limit: only this many questions of each task, from its beginning.
        num_fewshot: examples in front of each question; the task's own number if not given.
        gen_kwargs: settings that replace the tasks' own when texts are written.
        apply_chat_template: whether questions are asked as chats, by each model's own template.
        fewshot_as_multiturn: whether examples are turns of that chat, not a part of the question.
        system_instruction: what the chat, or the text, begins with.
        seed: of whatever a policy, or drawing texts, decides at random.
        batch_size: how many texts are written at a time.
        confirm_run_unsafe_code: whether tasks may run code that the models wrote.
        title: what the results call the ensemble; its models' names if not given.
        progress: called as requests are answered, and when a row is done with a task.

    Raises:
        ConfigError: if the harness is not installed, or a task cannot be loaded.
        UnknownNameError: if there is no such task.
        InputError: if a number is out of range, two rows have one name, a request cannot be
            answered, or ``out`` holds another evaluation.
        CapabilityError: if a policy does not fit the ensemble, or has no such likelihood.
    """
    limit = limit if limit is None else check_whole("limit", limit, least=1)
    if num_fewshot is not None:
        num_fewshot = check_whole("num_fewshot", num_fewshot, least=0)
    seed, batch_size = check_seed(seed), check_whole("batch_size", batch_size, least=1)
    check_generation(gen_kwargs)
    plans = _plans(ensemble, policies, alone)
    units = load_units(tasks, include_path, num_fewshot, gen_kwargs, limit)
    check_units(units, confirm_run_unsafe_code)
    # Found out now, so that no policy is refused when others have run for hours.
    rows = {unit.name: list(_rows(ensemble, plans, unit, likelihood)) for unit in units}
    settings = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "gen_kwargs": plain(dict(gen_kwargs or {})),
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
        "seed": seed,
        "batch_size": batch_size,
    }
    run = _Run(ensemble, settings, confirm_run_unsafe_code, progress)
    if out is None:
        return run.results(units, rows, title, None)
    with Rows.open(Path(out), run.header) as done:
        return _written(run.results(units, rows, title, done), Path(out))


def check_generation(gen_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse settings of a generation now, and not when others have been answered for hours.

    Raises:
        ConfigError: if the harness is not installed.
        InputError: naming the setting.
    """
    if not gen_kwargs:
        return
    try:
        from multicolm.evaluation.harness_model import generation_settings
    except ImportError as error:
        raise ConfigError(
            "tasks of the lm-evaluation-harness need lm-eval: pip install 'multicolm[eval]'."
        ) from error
    generation_settings(gen_kwargs)


def check_units(units: Sequence[Unit], confirm_run_unsafe_code: bool) -> None:
    """Refuse tasks that run what models wrote, unless that is wanted, and those that show pictures.

    Raises:
        InputError: if nobody has said that such code may run.
        CapabilityError: if a task has more than text.
    """
    for task in (task for unit in units for task in unit.tasks):
        name = task.config.task
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise InputError(
                f"task '{name}' runs code that the models write; say that it may with "
                "--confirm-run-unsafe-code, on a machine where it can do no harm."
            )
        if getattr(task, "MULTIMODAL", False):
            raise CapabilityError(f"task '{name}' has more than text, which ensembles cannot read.")


# --- rows ----------------------------------------------------------------------------------------


def _plans(
    ensemble: Ensemble, policies: Sequence[NamedPolicy | str | Path | Policy], alone: bool
) -> list[Plan]:
    """The rows, before it is known by which likelihoods they are judged.

    Raises:
        InputError: if there is none, or two have one name.
        CapabilityError: if a policy does not fit the ensemble.
    """
    named = [p if isinstance(p, NamedPolicy) else named_policy(p) for p in policies]
    plans = plans_of(ensemble, named, alone)
    check_names([plan.name for plan in plans])
    if not plans:
        raise InputError("there is nothing to judge; name a policy, or run the models alone.")
    for plan in plans:
        ensemble.check(plan.checked)
    return plans


def _rows(
    ensemble: Ensemble, plans: Sequence[Plan], unit: Unit, wanted: Likelihoods
) -> Iterator[_Row]:
    """A row for each plan and each likelihood that it is judged by.

    Raises:
        CapabilityError: if a policy has no such likelihood.
    """
    for plan in plans:
        if not unit.asks_for_likelihoods:
            yield _Row(plan, None)
            continue
        reader = LikelihoodReader(ensemble, plan.checked)
        if plan.kind != "model" and wanted == "both":
            reader.check()
            yield from (_Row(plan, kind) for kind in reader.kinds)
        elif plan.kind == "model" or wanted in ("auto", "both") or plan.checked.acts != "select":
            # What several models write together is written by all: there is one likelihood.
            yield _Row(plan, reader.check())
        else:
            yield _Row(plan, reader.check("joint" if wanted == "joint" else "routed"))


# --- a row of a task -----------------------------------------------------------------------------


class _Run:
    """Has the harness judge one row after another."""

    def __init__(
        self,
        ensemble: Ensemble,
        settings: Mapping[str, Any],
        confirm_run_unsafe_code: bool,
        progress: Callable[[Progress], None],
    ) -> None:
        self._ensemble = ensemble
        self._settings = settings
        self._confirm = confirm_run_unsafe_code
        self._progress = progress

    @property
    def header(self) -> dict[str, Any]:
        """What all answers of a ledger share."""
        generation = self._ensemble.generation
        # The ensemble's own, which count where a task has texts drawn.
        own = {"top_k": generation.top_k, "top_p": generation.top_p}
        drawing = {name: value for name, value in own.items() if value is not None}
        return {
            "verb": "eval",
            "models": [[m.name, m.identity, m.precision] for m in self._ensemble.backends],
            "settings": self._settings,
            "versions": _versions(),
            **({"drawing": drawing} if drawing else {}),
        }

    def results(
        self,
        units: Sequence[Unit],
        rows: Mapping[str, Sequence[_Row]],
        title: str | None,
        done: Rows | None,
    ) -> HarnessResults:
        """All figures, of every task's rows by its name; without asking again what is kept."""
        figures = [
            figure
            for unit in units
            for row in rows[unit.name]
            for figure in self.figures(row, unit, done)
        ]
        ensemble = self._ensemble
        return HarnessResults(
            ensemble=title or ", ".join(ensemble.models),
            models=tuple(ensemble.models),
            identities=tuple(model.identity for model in ensemble.backends),
            settings=self._settings,
            versions=_versions(),
            machine=machine(ensemble),
            figures=tuple(_in_columns(figures)),
            warnings=tuple(_warnings(figures)),
        )

    def figures(self, row: _Row, unit: Unit, done: Rows | None) -> list[HarnessFigure]:
        """What a row comes to on a task; without asking again what is kept."""
        key = f"{row.plan.key} {row.likelihood or ''} {unit.name}#{unit.digest[:16]}"
        record = None if done is None else done.get(key)
        if record is None:
            with nullcontext() if done is None else done.requests(key) as kept:
                try:
                    record = self._judge(row, unit, kept)
                except MulticolmError as error:
                    _place(error, row, unit, done, kept)
                    raise
            if done is not None:
                done.finish(key, record)
        self._progress(Progress(row.plan.name, unit.name, 0, 0, finished=True))
        return [
            HarnessFigure(
                row=row.plan.name,
                kind="model" if row.plan.kind == "model" else "policy",
                policy=plain(row.policy.as_config()),
                likelihood="" if row.plan.kind == "model" else row.likelihood or "",
                seconds=record["seconds"],
                n_cut=record["n_cut"],
                n_impossible=record["n_impossible"],
                **figure,
            )
            for figure in record["figures"]
        ]

    def _judge(self, row: _Row, unit: Unit, kept: RowRequests | None) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        from multicolm.evaluation.harness_model import EnsembleLM

        settings = self._settings

        def report(done: int, total: int) -> None:
            self._progress(Progress(row.plan.name, unit.name, done, total))

        model = EnsembleLM(
            self._ensemble,
            row.policy,
            likelihood=row.likelihood,
            batch_size=settings["batch_size"],
            seed=settings["seed"],
            kept=kept,
            progress=report,
        )
        for task in unit.tasks:
            task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        start = time.perf_counter()
        # The harness compares choices by differences, which -inf has none of; see `n_impossible`.
        with _seeded(), quiet(), np.errstate(invalid="ignore"):
            found = evaluate(
                lm=model,
                task_dict=unit.loaded,
                limit=settings["limit"],
                log_samples=False,
                apply_chat_template=settings["apply_chat_template"],
                fewshot_as_multiturn=settings["fewshot_as_multiturn"],
                system_instruction=settings["system_instruction"],
                confirm_run_unsafe_code=self._confirm,
            )
        return {
            "figures": list(_figures(found)),
            "seconds": time.perf_counter() - start if kept is None else kept.seconds,
            "n_cut": model.n_cut,
            "n_impossible": model.n_impossible,
        }


def _place(
    error: MulticolmError, row: _Row, unit: Unit, done: Rows | None, kept: RowRequests | None
) -> None:
    """Let an error say where it came, and what was kept. It may know more than its message."""
    if isinstance(error, ServerError):
        error.keeping("")  # what the call for some texts kept is not what is kept here
    message = f"task '{unit.name}', row '{row.plan.name}': {error}"
    if done is not None and kept is not None and (len(done) or len(kept)):
        message += (
            f" Kept in {done.folder}: rows of tasks that are done, {len(done)}; answered requests "
            f"of this one, {len(kept)}. Repeat the command to resume."
        )
    error.args = (message, *error.args[1:])


def _figures(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The harness's figures, those of groups after those of tasks."""
    for part in ("results", "groups"):
        for task, numbers in found.get(part, {}).items():
            if part == "groups" and task in found["results"]:
                continue
            samples = found["n-samples"].get(task, {})
            for key, value in numbers.items():
                metric, comma, filter_ = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                yield {
                    "task": task,
                    "version": str(found["versions"].get(task) or ""),
                    "n_questions": int(samples.get("effective", 0)),
                    "n_shot": int(found["n-shot"].get(task) or 0),
                    "metric": metric,
                    "filter": filter_,
                    "value": _number(value),
                    "stderr": _number(numbers.get(f"{metric}_stderr,{filter_}")),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                }


def _number(value: Any) -> float | None:
    """A number that JSON can hold; ``None`` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(float(value)) else None


@contextmanager
def _seeded() -> Iterator[None]:
    """Some tasks shuffle with the global generators: equal calls are to shuffle equally."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(_FEW_SHOT_SEED)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


# --- results -------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    return {**versions(), "lm-eval": version("lm_eval")}


def _in_columns(figures: Sequence[HarnessFigure]) -> list[HarnessFigure]:
    """In the order of tasks and metrics, and within one of rows."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    return sorted(figures, key=lambda figure: columns.index(figure.column))


def _warnings(figures: Sequence[HarnessFigure]) -> Iterator[str]:
    for figure in {(f.row, f.likelihood, f.task): f for f in figures}.values():
        if figure.n_cut:
            yield (
                f"Of '{figure.row}' on {figure.task}, {figure.n_cut} requests were longer than a "
                "model's context and were cut on the left."
            )
        if figure.n_impossible:
            yield (
                f"Of '{figure.row}' on {figure.task}, {figure.n_impossible} texts were impossible "
                "under the policy, and of impossible choices the harness takes the first one; "
                "tasks that have texts written can judge it."
            )


def _written(results: HarnessResults, folder: Path) -> HarnessResults:
    """The figures, as data and as a table; and on the page of a comparison that is there."""
    write_whole(folder / FILE, as_bytes(results))
    write_whole(folder / "lm_eval.md", results.as_markdown())
    if (folder / "results.json").is_file():
        from multicolm.evaluation.report import write_report

        write_report(read_comparison(folder), read_traces(folder), folder)
    return results
