"""Runs a comparison: every model alone, every policy, and the baselines of both, on one task.

All rows answer the same questions with the same settings and seed. Answers are kept in a ledger, a
chunk of questions at a time, so that a killed run resumes where it stopped. Of a row that was run
before, nothing is computed again.

    plans      what the rows of the table will be
    measured   a plan and what its answers came to
    results    a measured row beside the best model alone, with intervals and a test
    traces     answers whose tokens all models have read once more
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multicolm.config import load_task_params
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.errors import ArtefactError, InputError
from multicolm.evaluation.answering import (
    ASIDE,
    Answering,
    Measured,
    NamedPolicy,
    Plan,
    Progress,
    check_names,
    plans_of,
)
from multicolm.evaluation.answering import named_policy as named_policy
from multicolm.evaluation.baselines import (
    question_oracle,
    random_by_question,
    random_by_token,
)
from multicolm.evaluation.estimate import OnEstimate, announce
from multicolm.evaluation.explain import Explainer
from multicolm.evaluation.findings import findings
from multicolm.evaluation.provenance import machine, plain, versions
from multicolm.evaluation.results import (
    QUESTION_ORACLE,
    TOKEN_ORACLE,
    Comparison,
    ModelUse,
    RowResult,
    TracedAnswer,
    read_comparison,
)
from multicolm.evaluation.statistics import holm, mean_interval, paired_interval, paired_test
from multicolm.evaluation.task import Question, Task, load_task
from multicolm.evaluation.team import Team
from multicolm.files import read_json
from multicolm.numbers import check_seed, check_whole
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy

__all__ = ["NamedPolicy", "Progress", "compare", "named_policy"]

_ORACLE_NOTE = (
    "Counts a question if some right completion can be written, to its end, so that every token is "
    "the most likely one of some model."
)
_BINARY = (
    "Clopper-Pearson; differences by Newcombe's paired square-and-add, p-values by McNemar's exact "
    "test"
)
_OTHER = "BCa bootstrap, of paired differences too; p-values by sign-flip permutation"
_TIMING = "timed after a warm-up: a few tokens of every model and policy, which are not counted"


def compare(
    ensemble: Ensemble,
    policies: Sequence[NamedPolicy | str | Path | Policy],
    task: Task | str | Path,
    *,
    out: str | Path,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    alone: bool = True,
    random: bool = True,
    oracle: bool = True,
    sweep: int = 5,
    traces: int = 50,
    max_new_tokens: int | None = None,
    title: str | None = None,
    rank: int = 0,
    n_ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[Progress], None] = lambda _: None,
    on_estimate: OnEstimate | None = None,
) -> Comparison:
    """Compare policies with each other and with every model alone.

    Called again with the same arguments, it resumes where it was stopped. What is written does not
    depend on that; only times do.

    Args:
        ensemble: whose models write.
        policies: what is compared.
        task: the questions, and how answers are judged.
        out: the folder of the results; see :func:`multicolm.evaluation.report.write_report`.
        split: which of the task's data.
        limit: only this many questions, spread evenly over the data.
        seed: of everything random, the statistics included.
        batch_size: how many texts are written at a time.
        alone: whether to run every model alone; gains are measured against the best of them.
        random: whether to run, for every policy that let several models write, random routing with
            matched shares.
        oracle: whether to count what the best choice of a model for each question could do (from
            the answers of models alone), and for each token (with gold completions).
        sweep: how many other values to try of the first param that a policy calls tunable.
        traces: of how many questions to keep the traces, for every model and policy.
        max_new_tokens: maximum number of tokens of an answer; the task's if not given.
        title: what the results call the ensemble; its models' names if not given.
        rank: of this process among those that share the work. The first one writes the report.
        n_ranks: how many they are; what is written does not depend on it, only times do.
        wait: returns when all of them have come this far.
        progress: called after every answer, and when a row is done.
        on_estimate: called first, with what the answers take at most; see :func:`announce`.

    Raises:
        InputError: if two rows have one name, a number is out of range, a question cannot be asked
            or judged, or ``out`` holds another comparison.
        CapabilityError: if a policy does not fit the ensemble.
        ArtefactError: if the ledger or what a checkpoint says of its origin is damaged.
        MulticolmError: if the task, its data or a policy cannot be used.
    """
    limit, seed, batch_size, sweep, traces = _numbers(limit, seed, batch_size, sweep, traces)
    task = task if isinstance(task, Task) else load_task(task)
    named = [_suited(each, task.name) for each in policies]
    plans = _plans(ensemble, named, alone, sweep)
    how: Any = {"seed": seed, "batch_size": batch_size, "progress": progress}
    asked = task.sample(split, limit)
    run = Answering(ensemble, task, asked, max_new_tokens=max_new_tokens, **how)
    run.check(plans)
    announce(on_estimate, run, [(p, 1 + (random and _has_random(p))) for p in plans])
    digest = task.digest(split)
    warnings = _warnings(run, named, digest, oracle)
    made = _Made(run, split, digest, limit, title or ", ".join(ensemble.models), n_ranks, warnings)
    team = Team(Path(out), made.header, run, rank, n_ranks, wait)
    with team.main_ledger() as run.ledger:
        measured = _measured(team, run, plans, random=random, oracle=oracle)
        mine = made.report(measured, traces, Path(out)) if rank == 0 else None
        wait()
    return mine or read_comparison(Path(out))


def _has_random(plan: Plan) -> bool:
    """Whether a row gets a random baseline with its shares, as far as that shows before."""
    return plan.kind == "policy" and plan.checked.acts == "select"


def _numbers(
    limit: int | None, seed: int, batch_size: int, sweep: int, traces: int
) -> tuple[int | None, int, int, int, int]:
    """The numbers of a comparison, as Python's own.

    Raises:
        InputError: naming one that is out of range.
    """
    return (
        limit if limit is None else check_whole("limit", limit, least=1),
        check_seed(seed),
        check_whole("batch_size", batch_size, least=1),
        check_whole("sweep", sweep, least=0),
        check_whole("traces", traces, least=0),
    )


# --- plans ---------------------------------------------------------------------------------------


def _plans(ensemble: Ensemble, named: Sequence[NamedPolicy], alone: bool, sweep: int) -> list[Plan]:
    """The rows that are known before anything has run.

    Raises:
        InputError: if there is none, or two have one name.
    """
    plans = plans_of(ensemble, named, alone)
    for each in named:
        plans += _sweep_plans(each, sweep)
    # The names of rows that are added later are derived from these, or the oracles'.
    check_names([*(plan.name for plan in plans), TOKEN_ORACLE, QUESTION_ORACLE])
    if not plans:
        raise InputError("there is nothing to compare; name a policy, or run the models alone.")
    return plans


def _suited(policy: NamedPolicy | str | Path | Policy, task: str) -> NamedPolicy:
    """The policy with the params that its checkpoint has for this task, if it has some."""
    named = policy if isinstance(policy, NamedPolicy) else named_policy(policy)
    params = {} if named.folder is None else load_task_params(named.folder, task)
    return replace(named, policy=resolve_policy(named.policy, params)) if params else named


def _sweep_plans(named: NamedPolicy, n: int) -> Iterator[Plan]:
    """The policy at other values of its first tunable param, spread over those worth trying."""
    tunable = named.policy.tunable
    if not tunable or n < 1:
        return
    param, values = next(iter(tunable.items()))
    own = named.policy.as_config()["params"].get(param)
    last = len(values) - 1
    places = [round(i * last / (n - 1)) for i in range(n)] if n > 1 else [last // 2]
    for value in dict.fromkeys(values[place] for place in places):
        if value != own:
            policy = resolve_policy(named.policy, {param: value})
            name = f"{named.name} {param}={value:g}"
            yield Plan(name, "sweep", policy, of=named.name, point={param: value})


def _measured(
    team: Team, run: Answering, plans: Sequence[Plan], *, random: bool, oracle: bool
) -> list[Measured]:
    """Every row of the table, in its order, answered as far as it is not yet."""
    models = run.ensemble.models
    run.warm_up = [plan for plan in plans if plan.kind == "model"]
    n_random = sum(map(_has_random, plans)) if random else 0
    run.n_rows = len(plans) + n_random + (oracle and run.has_completions)
    team.answer(plans)
    measured = [run.row(plan) for plan in plans if plan.kind != "sweep"]
    more = list(random_by_token(measured, models)) if random else []
    if oracle and run.has_completions:
        more.append(Plan(TOKEN_ORACLE, "oracle", None, note=_ORACLE_NOTE))
    run.n_rows = len(plans) + len(more)
    team.answer(more)
    measured += [run.row(plan) for plan in more if plan.kind == "random"]
    measured += random_by_question(measured, models) if random else []
    measured += [run.row(plan) for plan in plans if plan.kind == "sweep"]
    measured += question_oracle(measured, models) if oracle else []
    return measured + [run.row(plan) for plan in more if plan.kind == "oracle"]


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """How a comparison was made.

    Attributes:
        run: that has answered the questions.
        split: that these are of.
        digest: of that split.
        limit: that they were sampled by.
        title: what the results call the ensemble.
        n_ranks: how many processes shared the work.
        warnings: what a reader has to know.
    """

    run: Answering
    split: str
    digest: str
    limit: int | None
    title: str
    n_ranks: int
    warnings: Sequence[str]

    @property
    def header(self) -> dict[str, Any]:
        """Of the ledger."""
        return self.run.header("compare", self.split, self.digest)

    def report(self, measured: Sequence[Measured], n_traced: int, folder: Path) -> Comparison:
        """Write the files of the report into a folder.

        Args:
            measured: every row.
            n_traced: for how many questions the traces are kept.
            folder: of the results.
        """
        from multicolm.evaluation.report import write_report

        run = self.run
        run.say("reading traces for the report")
        with torch_threads(run.ensemble.backends, run.settings.threads):
            traced, unread = _traced(run, measured, run.questions[:n_traced])
        run.say("writing the report")
        comparison = self._comparison(measured, (*self.warnings, *unread))
        comparison = replace(comparison, findings=findings(comparison))
        write_report(comparison, traced, folder)
        return comparison

    def _comparison(self, measured: Sequence[Measured], warnings: tuple[str, ...]) -> Comparison:
        run, ensemble = self.run, self.run.ensemble
        main = [row for row in measured if row.plan.kind in ("model", "policy")]
        binary = {value for row in main for value in row.qualities} <= {0, 1}
        processes = f", {self.n_ranks} processes" if self.n_ranks > 1 else ""
        return Comparison(
            ensemble=self.title,
            models=tuple(ensemble.models),
            identities=tuple(model.identity for model in ensemble.backends),
            costs=tuple(ensemble.costs),
            task=run.task.name,
            metric=run.task.config.metric.kind,
            split=self.split,
            digest=self.digest,
            seed=run.seed,
            settings={
                **run.settings.model_dump(mode="json", exclude=ASIDE),
                "batch_size": run.batch_size,
                "limit": self.limit,
            },
            versions=versions(),
            machine=machine(ensemble) + processes,
            rows=_corrected(_results(measured, ensemble, run.seed)),
            warnings=warnings,
            binary=binary,
            intervals=_BINARY if binary else _OTHER,
            timing=_TIMING,
            questions=tuple(question.id for question in run.questions),
        )


def _results(measured: Sequence[Measured], ensemble: Ensemble, seed: int) -> Iterator[RowResult]:
    """Every row with its intervals, and beside the best model alone."""
    alone = [row for row in measured if row.plan.kind == "model"]
    best = max(alone, key=lambda row: row.quality, default=None)
    bounds = [row.qualities for row in measured if row.plan.name == QUESTION_ORACLE]
    for row in measured:
        low, high = mean_interval(row.qualities, seed=seed)
        plan = row.plan
        yield RowResult(
            name=plan.name,
            kind=plan.kind,
            policy=None if plan.policy is None else plain(plan.policy.as_config()),
            n_questions=len(row.qualities),
            quality=row.quality,
            low=low,
            high=high,
            of=plan.of,
            point=plan.point,
            **_gain(row, best, seed),
            p_question_oracle=(
                paired_test(row.qualities, bounds[0], seed)
                if bounds and plan.kind == "policy"
                else None
            ),
            qualities=tuple(row.qualities),
            **_work(row, ensemble),
        )


def _corrected(rows: Iterable[RowResult]) -> tuple[RowResult, ...]:
    """The rows, with p-values of policies corrected for how many these are."""
    rows = tuple(rows)
    p_values = {row.name: row.p_value for row in rows if row.kind == "policy"}
    known = {name: value for name, value in p_values.items() if value is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    return tuple(replace(row, p_holm=corrected.get(row.name)) for row in rows)


def _gain(row: Measured, best: Measured | None, seed: int) -> dict[str, Any]:
    if best is None or row is best:
        return {}
    low, high = paired_interval(row.qualities, best.qualities, seed)
    return {
        "gain": row.quality - best.quality,
        "gain_low": low,
        "gain_high": high,
        # An oracle is never worse, so there is nothing to test.
        "p_value": None
        if row.plan.kind == "oracle"
        else paired_test(row.qualities, best.qualities, seed),
    }


def _work(row: Measured, ensemble: Ensemble) -> dict[str, Any]:
    """What the models did, what it took, and what a reader of the row has to know."""
    if row.plan.kind == "oracle":
        n_unknown, n = row.n_unknown, len(row.qualities)
        cut = f" The search for {n_unknown} of {n} questions was cut; these count as not written."
        return {"note": row.plan.note + (cut if n_unknown else "")}
    names = ensemble.models
    n_mixed, n_tokens = row.n_mixed, row.n_tokens(names)
    uses = tuple(
        ModelUse(
            model=name,
            tokens_written=row.total("written", name),
            share=row.total("written", name) / n_tokens,
            forwards=row.total("forwards", name),
            tokens_read=row.total("read", name),
            seconds=row.total("seconds", name),
            calls=row.calls(name),
        )
        for name in names
    )
    calls = [use.calls for use in uses if use.calls is not None]
    costs = zip(names, ensemble.costs, strict=True)
    n_cut = row.n_cut_off
    cut = f"{n_cut} of {len(row.qualities)} answers were cut off at max_new_tokens."
    return {
        "uses": uses,
        "n_tokens": n_tokens,
        "n_mixed": n_mixed,
        "n_cut_off": n_cut,
        "n_shared": row.n_shared,
        "seconds": row.seconds,
        "tokens_per_second": n_tokens / row.seconds if row.seconds else 0.0,
        "cost": sum(row.total("passes", name) * cost for name, cost in costs) / n_tokens,
        "calls_per_token": sum(calls) / n_tokens if len(calls) == len(uses) else None,
        "note": " ".join(filter(None, [row.plan.note, cut if n_cut else ""])),
    }


def _traced(
    run: Answering, measured: Sequence[Measured], questions: Sequence[Question]
) -> tuple[list[TracedAnswer], list[str]]:
    """The answers of every model and policy to some questions, and what a reader has to know."""
    reader = Explainer(run.ensemble, run.sampling)
    traced: list[TracedAnswer] = []
    for row in measured:
        if row.plan.kind in ("model", "policy") and row.plan.policy is not None:
            answers = run.answers(row.plan, len(questions))
            asked = list(zip(questions, answers, strict=True))
            traced += reader.explain(row.plan.name, row.plan.policy, asked)
    return traced, reader.warnings


# --- what readers have to know -------------------------------------------------------------------


def _warnings(run: Answering, named: Sequence[NamedPolicy], digest: str, oracle: bool) -> list[str]:
    """What is known before anything has run.

    Raises:
        ArtefactError: if a checkpoint's ``provenance.json`` is damaged.
    """
    warnings = _contamination(named, digest, run.questions)
    if oracle and not run.has_completions:
        name = run.task.name
        warnings.append(f"Task '{name}' has no gold completions, hence no oracle of tokens.")
    return warnings


def _contamination(
    named: Sequence[NamedPolicy], digest: str, questions: Sequence[Question]
) -> list[str]:
    """One sentence for each policy that has seen questions it is compared on.

    Raises:
        ArtefactError: if a checkpoint's ``provenance.json`` is damaged.
    """
    warnings = []
    for each in named:
        for stage, verb in (("train", "trained"), ("tune", "tuned")):
            origin = _provenance(each.folder).get(stage)
            if not isinstance(origin, Mapping):
                continue
            seen = set(origin.get("prompts") or ())
            n = sum(question.fingerprint in seen for question in questions)
            n = len(questions) if origin.get("digest") == digest else n
            if n:
                warnings.append(
                    f"Policy '{each.name}' was {verb} on {n} of the {len(questions)} questions "
                    "that it is compared on, so its quality here says little about new ones."
                )
    return warnings


def _provenance(folder: Path | None) -> Mapping[str, Any]:
    path = None if folder is None else folder / "provenance.json"
    if path is None or not path.is_file():
        return {}
    origin = read_json(path)
    if not isinstance(origin, Mapping):
        raise ArtefactError(f"{path} is damaged; it must hold an object.")
    return origin
