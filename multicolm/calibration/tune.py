"""Finds a policy's thresholds from data: for a budget, or for the best answers.

The values are tried on questions of a development split, never on test data. Answers are kept in a
ledger, so a run that was stopped resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, get_args

from multicolm.calibration.choice import Params, Point, Rule, Unit, cross_validated
from multicolm.calibration.thresholds import thresholds_for_shares
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError, InputError
from multicolm.evaluation.answering import Answering, Measured, NamedPolicy, Plan, Progress
from multicolm.evaluation.estimate import Estimate, OnEstimate, estimated
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.statistics import mean_interval
from multicolm.evaluation.task import Question, Task
from multicolm.numbers import as_python, check_seed, check_whole
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy
from multicolm.training.checkpoint import Checkpoint, made_once, unfinished
from multicolm.training.provenance import read_provenance
from multicolm.version import __version__

__all__ = ["Point", "Unit", "tune"]

Grid: TypeAlias = Mapping[str, Sequence[float]]

_SHARES = tuple(tenth / 10 for tenth in range(11))
_REFINEMENTS = 4
_HALVINGS = 20


def tune(
    ensemble: Ensemble,
    policy: NamedPolicy,
    tasks: Sequence[Task],
    out: str | Path,
    *,
    budget: float | None = None,
    unit: Unit = "share",
    spend: bool = False,
    grid: Grid | None = None,
    split: str = "dev",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    on_estimate: OnEstimate | None = None,
) -> Checkpoint:
    """Find params of a policy, and write it with them as a checkpoint.

    A policy that hands over where a score passes one threshold is tried at the quantiles of that
    score on texts of the base model alone, for shares of 0, 0.1, ... 1; with a budget, at some more
    where it lies. Any other is tried on a grid of values that it declares worth trying, those of
    ``cost_weight`` for assistants of which the dearest costs 1.

    The params are chosen that give the best answers, the cheapest of equally good ones; with a
    budget, of those that keep within it, as measured, not as predicted. The quality measured on
    the questions that chose them is too high; beside it is that of
    :func:`multicolm.calibration.choice.cross_validated`.

    Args:
        ensemble: whose models write.
        policy: what is tuned; a checkpoint keeps what it has learned.
        tasks: questions and how answers are judged; with several, params are found for each, too.
        out: folder of the checkpoint.
        budget: in ``unit``.
        unit: of the budget.
        spend: whether the params are chosen that spend most of the budget, whatever the answers.
        grid: values to try, by param, in place of those above, just as they are.
        split: which of the tasks' data.
        limit: only this many questions of each task.
        seed: of everything random.
        batch_size: how many texts are written at a time.
        max_new_tokens: maximum number of tokens of an answer; the task's if not given.
        progress: called after every answer.
        on_estimate: called first, with what the answers take at most.

    Raises:
        InputError: if the split is the test split, or its questions are in the test split too, or
            nothing keeps within the budget, or a number or a task makes no sense.
        CapabilityError: if there is nothing to tune, or the budget is a share of tokens and the
            policy's tokens are nobody's alone.
        ArtefactError: if ``out`` holds another checkpoint.
        MulticolmError: if a task, the policy or a value of the grid cannot be used.
    """
    limit, seed, batch_size = _numbers(limit, seed, batch_size)
    budget, grid = as_python(budget), _plain(grid)
    check_request(policy.policy, tasks, budget, unit, spend, grid)
    request = {
        "budget": budget,
        "unit": unit if budget is not None else None,
        "by_metric": not spend,  # what 0.1 calls it
        "grid": grid,
        "limit": limit,
        "seed": seed,
    }
    questions = {task.name: task.development(split, limit) for task in tasks}
    how = (seed, batch_size, max_new_tokens, progress)
    bench = _Bench(ensemble, policy, tasks, questions, split, *how)
    bench.announce(on_estimate, grid, budget)
    folder, key = Path(out), bench.key(request)

    def make() -> Checkpoint:
        bench.check(grid)
        rule = Rule(budget, unit, spend)
        with bench.opened(unfinished(folder, "tune")):
            points = list(_curve(bench, grid, rule))
        return bench.checkpoint(points, rule, {"key": key, **request})

    return made_once(folder, key, make, "tune")


def _numbers(limit: int | None, seed: int, batch_size: int) -> tuple[int | None, int, int]:
    """The whole numbers of a call, as Python's own.

    Raises:
        InputError: naming one that is out of range.
    """
    return (
        limit if limit is None else check_whole("limit", limit, least=1),
        check_seed(seed),
        check_whole("batch_size", batch_size, least=1),
    )


def _plain(grid: Grid | None) -> Grid | None:
    """With Python's own numbers."""
    if grid is None:
        return None
    return {name: [as_python(value) for value in values] for name, values in grid.items()}


class _Bench:
    """Measures params, each of them once."""

    def __init__(
        self,
        ensemble: Ensemble,
        named: NamedPolicy,
        tasks: Sequence[Task],
        questions: Mapping[str, Sequence[Question]],
        split: str,
        seed: int,
        batch_size: int,
        max_new_tokens: int | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self.policy = named.policy
        self._named = named
        self._ensemble = ensemble
        self._split = split
        self._seed = seed
        self._runs = {
            task.name: Answering(
                ensemble,
                task,
                questions[task.name],
                seed=seed,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
            for task in tasks
        }

    @cached_property
    def headers(self) -> list[dict[str, Any]]:
        """Per task, what its answers depend on besides the policy."""
        split = self._split
        return [run.header("tune", split, run.task.digest(split)) for run in self._runs.values()]

    def key(self, request: Mapping[str, Any]) -> str:
        """What decides the checkpoint; neither versions do, nor how many texts are written at once.

        Answers that are half done are another matter: their ledgers hold those, too.
        """
        no_matter = ("versions", "batch_size")
        facts = [
            Plan("", "policy", self.policy).key,
            [{k: v for k, v in header.items() if k not in no_matter} for header in self.headers],
            list(self._ensemble.costs),
            dict(request),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def checkpoint(
        self, points: Sequence[Point], rule: Rule, request: Mapping[str, Any]
    ) -> Checkpoint:
        """The policy with the params that a rule chooses, and how these were found."""
        chosen, runs = rule.choose(points), self._runs.values()
        by_task = {
            task: dict(rule.choose([point.on(task) for point in points]).params)
            for task in self._runs
        }
        digests = [header["digest"] for header in self.headers]
        facts = {
            "multicolm": __version__,
            "split": self._split,
            "source": ", ".join(f"{run.task.name} ({self._split})" for run in runs),
            "digest": digests[0] if len(digests) == 1 else "",
            "metric": ", ".join(dict.fromkeys(run.task.config.metric.kind for run in runs)),
            "questions": sum(len(run.questions) for run in runs),
            "chosen_by": "spending" if rule.spend else "quality",
            **{k: v for k, v in request.items() if v is not None and k != "by_metric"},
            "chosen": dict(chosen.params),
            "measured": {k: v for k, v in chosen.as_json().items() if k not in chosen.params},
            **_caution(points, rule, self._seed),
            "curve": [point.as_json() for point in points],
            "prompts": [q.fingerprint for run in runs for q in run.questions],
        }
        return Checkpoint(
            resolve_policy(self.policy, chosen.params),
            _provenance(self._named, self._ensemble, facts),
            f"A {self.policy.name} policy, tuned on {facts['source']}.",
            by_task if len(by_task) > 1 else {},
        )

    def check(self, grid: Grid | None) -> None:
        """Find now, before any model has run, what would stop it later.

        Raises:
            MulticolmError: if there is nothing to tune, a value to be tried is out of range, the
                policy does not fit, or a question cannot be asked or judged.
        """
        plans = [self._plan(params) for params in self.trials(grid)]
        for run in self._runs.values():
            run.check(plans[:1])
            run.n_rows = len(plans) if self._knows_trials(grid) else 0

    def trials(self, grid: Grid | None) -> list[dict[str, float]]:
        """The params that are sure to be tried; of a threshold to be found, its two ends.

        Raises:
            CapabilityError: if there are none.
        """
        policy, deferral = self.policy, self.policy.deferral
        if grid is None and deferral is not None:
            return [{deferral.param: deferral.never}, {deferral.param: deferral.always}]
        values = policy.tunable if grid is None else grid
        if not values:
            raise CapabilityError(
                f"policy '{policy.name}' declares no params to tune; name some with their values, "
                "such as --grid alpha=0.2,0.4,0.6."
            )
        dearest = max(self._ensemble.costs[1:], default=0.0)
        if grid is None and "cost_weight" in values and dearest > 0:
            scaled = [weight / dearest for weight in values["cost_weight"]]
            values = {**values, "cost_weight": scaled}
        combinations = itertools.product(*values.values())
        return [dict(zip(values, each, strict=True)) for each in combinations]

    def announce(
        self, on_estimate: OnEstimate | None, grid: Grid | None, budget: float | None
    ) -> None:
        """Tell what trying all values takes at most."""
        if on_estimate is None:
            return
        self.check(grid)
        trials = self.trials(grid)
        # Of a threshold that is to be found: one for each share, and more about the budget.
        n_more = 0 if self._knows_trials(grid) else len(_SHARES) + 1 - len(trials)
        n_more += _REFINEMENTS if n_more and budget is not None else 0
        picked = [trials[i] for i in sorted({0, len(trials) // 2, len(trials) - 1})]
        rows = len(trials) + n_more
        shares = [rows // len(picked) + (i < rows % len(picked)) for i in range(len(picked))]
        plans = list(zip(map(self._plan, picked), shares, strict=True))
        on_estimate(sum((estimated(run, plans) for run in self._runs.values()), Estimate()))

    def _knows_trials(self, grid: Grid | None) -> bool:
        """Whether all values that will be tried are known before."""
        return grid is not None or self.policy.deferral is None

    def opened(self, folder: Path) -> ExitStack:
        """Keep answers in this folder, one ledger per task, until the stack is closed."""
        with ExitStack() as stack:
            runs = zip(self._runs.values(), self.headers, strict=True)
            for number, (run, header) in enumerate(runs):
                path = folder / str(number) / "ledger.jsonl"
                run.ledger = stack.enter_context(Ledger.open(path, header))
            return stack.pop_all()

    def _plan(self, params: Params) -> Plan:
        name = " ".join([self.policy.name, *(f"{k}={v:.4g}" for k, v in params.items())])
        return Plan(name, "policy", resolve_policy(self.policy, params))

    def measure(self, params: Params) -> Point:
        """Answer all questions with these params."""
        plan = self._plan(params)
        return self._point(params, {task: run.row(plan) for task, run in self._runs.items()})

    def _point(self, params: Params, rows: Mapping[str, Measured]) -> Point:
        models = self._ensemble.models
        n_written = sum(row.n_tokens(models) for row in rows.values())
        n_assistants = sum(
            row.total("written", name) for row in rows.values() for name in models[1:]
        )
        passes = sum(
            row.total("passes", name) * cost
            for row in rows.values()
            for name, cost in zip(models, self._ensemble.costs, strict=True)
        )
        low, high = mean_interval(*(row.qualities for row in rows.values()), seed=self._seed)
        return Point(
            params=params,
            share=n_assistants / n_written,
            cost=passes / n_written,
            low=low,
            high=high,
            qualities={task: tuple(row.qualities) for task, row in rows.items()},
        )

    def scores(self, params: Params) -> list[float]:
        """What the policy decides on at every token that it writes with these params."""
        policy = resolve_policy(self.policy, params)
        name = f"{self.policy.name} never handing over"
        found: list[float] = []
        for run in self._runs.values():
            plan = Plan(name, "policy", policy)
            run.row(plan)
            for record in run.answers(plan):
                found += [token[4] for token in record["tokens"] if token[4] is not None]
        return found


def _caution(points: Sequence[Point], rule: Rule, seed: int) -> dict[str, Any]:
    """What has to be said beside the quality that was measured."""
    if len(points) == 1:
        return {}
    elsewhere = cross_validated(points, rule, seed)
    note = f"the best of {len(points)} on the questions that chose it: too high"
    return {"note": note} | ({} if elsewhere is None else {"cross_validated": elsewhere})


def _curve(bench: _Bench, grid: Grid | None, rule: Rule) -> list[Point]:
    """Every point that is tried; of a threshold, in the order of the shares it was tried for."""
    if grid is None and bench.policy.deferral is not None:
        return _quantiles(bench, rule)
    return [bench.measure(params) for params in bench.trials(grid)]


def _quantiles(bench: _Bench, rule: Rule) -> list[Point]:
    """Points at the quantiles of the score; and some more where the budget lies."""
    deferral = bench.policy.deferral
    assert deferral is not None
    scores = bench.scores({deferral.param: deferral.never})
    if not scores:
        raise CapabilityError(f"policy '{bench.policy.name}' gives no score to tune by.")
    points: dict[float, Point] = {}
    by_threshold: dict[float, Point] = {}

    def at(share: float) -> None:
        """Put down the point for a share; a threshold that was tried is not tried again."""
        [threshold] = thresholds_for_shares(scores, [share], deferral)
        if threshold not in by_threshold:
            by_threshold[threshold] = bench.measure({deferral.param: threshold})
        points[share] = by_threshold[threshold]

    for share in _SHARES:
        at(share)
    if rule.budget is not None:
        most = len(by_threshold) + _REFINEMENTS
        for _ in range(_HALVINGS):
            share_between = _between(points, rule)
            if share_between is None or len(by_threshold) == most:
                break
            at(share_between)
    return list({id(points[share]): points[share] for share in sorted(points)}.values())


def _between(points: Mapping[float, Point], rule: Rule) -> float | None:
    """The middle of the last share within the budget and the next one beyond it, if both are."""
    within = [share for share, point in points.items() if rule.allows(point)]
    if not within:
        return None
    last = max(within)
    beyond = [share for share in points if share > last]
    return (last + min(beyond)) / 2 if beyond else None


def check_request(
    policy: Policy,
    tasks: Sequence[Task],
    budget: float | None,
    unit: str,
    spend: bool,
    grid: Grid | None,
) -> None:
    """Refuse what makes no sense, whatever the models say.

    Raises:
        InputError: if there is no task, or two have one name; if the budget is no number that can
            be spent, or there is none and it is to be spent; if a param of the grid has no values,
            or values that are no finite numbers.
        CapabilityError: if a share is to be kept of tokens that are nobody's alone.
    """
    if unit not in get_args(Unit):
        raise InputError(f"unit must be {' or '.join(get_args(Unit))}, got {unit!r}.")
    if not tasks:
        raise InputError("there is no task to tune on; name one or more.")
    twice = [name for name, n in Counter(task.name for task in tasks).items() if n > 1]
    if twice:
        raise InputError(
            f"two tasks are called '{twice[0]}'; name each once, or copy it to a file of another "
            "name."
        )
    most = 1.0 if unit == "share" else math.inf
    if budget is not None and not (0 <= budget <= most and math.isfinite(budget)):
        words = "0 to 1" if unit == "share" else "0 or more"
        raise InputError(f"a budget in {unit} is a number of {words}, got {budget:g}.")
    if budget is not None and unit == "share" and policy.acts == "mix":
        raise CapabilityError(
            f"policy '{policy.name}' makes every token out of several models' distributions, so "
            "assistants have no share of their own; give the budget in cost (--unit cost)."
        )
    for name, values in (grid or {}).items():
        if not values or not all(math.isfinite(value) for value in values):
            raise InputError(f"the grid's '{name}' needs finite numbers, one or more.")
    if spend and budget is None:
        raise InputError("spend says to spend a budget, and there is none; give one, or leave it.")


def _provenance(
    policy: NamedPolicy, ensemble: Ensemble, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the policy was made from before, and now."""
    before = {} if policy.folder is None else read_provenance(policy.folder)
    models = [{"name": m.name, "identity": m.identity} for m in ensemble.backends]
    return {"multicolm": __version__, "models": models, **before, "tune": dict(facts)}
