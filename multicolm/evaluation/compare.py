"""Runs a comparison: every model alone, every policy, and the baselines of both, on one task.

All rows answer the same questions with the same settings and seed. Answers are kept in a ledger, a
chunk of questions at a time, so that a run that was killed goes on where it was. Of a row that was
run before, nothing is computed again.

    plans      what the rows of the table will be
    measured   a plan and what its answers came to, from the ledger
    results    a measured row beside the best model alone, with intervals and a test
    traces     answers whose tokens all models have read once more, teacher forced
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import multicolm
from multicolm.artefacts import Artefact
from multicolm.config import GenerationConfig, policy_names
from multicolm.decoding.prompts import encode_prompt
from multicolm.decoding.sampling import Sampling
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.errors import ArtefactError, InputError, PolicyError
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.metrics import FunctionMetric
from multicolm.evaluation.results import (
    Comparison,
    ModelUse,
    RowKind,
    RowResult,
    ShownToken,
    TracedAnswer,
)
from multicolm.evaluation.statistics import bootstrap_interval, paired_interval, paired_test
from multicolm.evaluation.task import Question, Task, load_task
from multicolm.files import sha256
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.reading import Text, read_texts
from multicolm.streaming import Answers
from multicolm.types import MIXTURE
from multicolm.views import View, Views

__all__ = ["NamedPolicy", "Progress", "compare", "named_policy"]

_CHUNK_BATCHES = 4
_N_TOP = 3
# The most numbers that all models' logits may hold while written texts are read; 256 MiB.
_MAX_LOGITS = 1 << 26
_ORACLE_NOTE = (
    "Counts a question if, at every place of its gold completion and at its end, the most likely "
    "token of some model is the right one."
)


@dataclass(frozen=True)
class NamedPolicy:
    """A policy and what the table calls it.

    Attributes:
        name: unique within a comparison.
        policy: the policy.
        folder: its checkpoint, which may say what it was made from.
    """

    name: str
    policy: Policy
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a row of the table has come.

    Attributes:
        row: its name.
        done: questions that it has answered.
        total: of these there will be.
        quality: mean so far; ``None`` before the first answer.
        finished: whether the row is done.
    """

    row: str
    done: int
    total: int
    quality: float | None
    finished: bool = False


@dataclass(frozen=True)
class _Plan:
    """A row that will be. ``policy`` is ``None`` for the oracle; see :class:`RowResult`."""

    name: str
    kind: RowKind
    policy: Policy | None
    of: str = ""
    point: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """What the row's records are kept under: another policy of the same name has another."""
        if self.policy is None:
            return self.name
        content = json.dumps(_identity(self.policy), sort_keys=True)
        return f"{self.name}#{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Measured:
    """A row's chunks, in the order of the questions."""

    plan: _Plan
    chunks: Sequence[Mapping[str, Any]]

    @property
    def qualities(self) -> list[float]:
        return [quality for chunk in self.chunks for quality in chunk["qualities"]]

    @property
    def quality(self) -> float:
        return _mean(self.qualities)

    def total(self, what: str, model: str) -> Any:
        """A number of a model, over all chunks."""
        return sum(chunk["models"][model][what] for chunk in self.chunks)


def named_policy(source: str | Path | Policy) -> NamedPolicy:
    """A policy by whatever a user may write for it, which is also its name in the table.

    Args:
        source: see :func:`multicolm.policy.resolve.resolve_policy`.

    Raises:
        ConfigError: if there is no such policy, or its file is wrong.
    """
    policy = resolve_policy(source)
    if isinstance(source, Policy):
        return NamedPolicy(policy.name, policy)
    text = str(source)
    if text in policy_names():
        return NamedPolicy(text, policy)
    path = Path(text).expanduser()
    return NamedPolicy(text.removeprefix("./").rstrip("/"), policy, _checkpoint(path))


def _checkpoint(path: Path) -> Path | None:
    if path.is_dir():
        return path
    return path.parent if path.name == "policy.yaml" else None


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
    progress: Callable[[Progress], None] = lambda _: None,
) -> Comparison:
    """Compare policies with each other and with every model alone.

    Called again with the same arguments, it goes on where it was stopped. What is written does not
    depend on that; only times do.

    Args:
        ensemble: whose models write.
        policies: what is compared.
        task: the questions, and how answers are judged.
        out: the folder of the results; see :func:`multicolm.evaluation.report.write_report`.
        split: which of the task's data.
        limit: only this many questions, the first ones.
        seed: of everything random, the statistics included.
        batch_size: how many texts are written at a time.
        alone: whether to run every model alone; gains are measured against the best of them.
        random: whether to run, for every policy that let several models write, a lottery with the
            same shares.
        oracle: whether to count what the best choice of writers could do, on the task's gold
            completions.
        sweep: how many other values to try of the first param that a policy calls tunable.
        traces: of how many questions to keep the traces, for every model and policy.
        max_new_tokens: the most tokens of an answer; the task's if not given.
        title: what the results call the ensemble; its models' names if not given.
        progress: told after every answer, and when a row is done.

    Raises:
        InputError: if two rows have one name, a number is out of range, a question cannot be asked
            or judged, or ``out`` holds another comparison.
        CapabilityError: if a policy does not fit the ensemble.
        ArtefactError: if the ledger or what a checkpoint says of its origin is damaged.
        MulticolmError: if the task, its data or a policy cannot be used.
    """
    _check_numbers(limit, batch_size, sweep, traces)
    if not isinstance(task, Task):
        task = load_task(task)
    named = [p if isinstance(p, NamedPolicy) else named_policy(p) for p in policies]
    plans = _plans(ensemble, named, alone, sweep)
    questions = task.questions(split)[:limit]
    generation = _generation(ensemble, task, max_new_tokens)
    run = _Run(ensemble, task, questions, generation, seed, batch_size, progress)
    run.check(plans)
    digest = task.digest(split)
    warnings = _contamination(named, digest, questions)
    if oracle and any(question.completion is None for question in questions):
        oracle = False
        warnings.append(f"Task '{task.name}' has no gold completions, so there is no oracle row.")
    folder = Path(out)
    with Ledger.open(
        folder / "ledger.jsonl",
        _header(ensemble, task, split, digest, generation, seed, batch_size),
    ) as ledger:
        run.ledger = ledger
        measured = [run.row(plan) for plan in plans if plan.kind != "sweep"]
        if random:
            measured += [run.row(plan) for plan in _random_plans(measured, ensemble.models)]
        measured += [run.row(plan) for plan in plans if plan.kind == "sweep"]
        if oracle:
            with torch_threads(ensemble.backends, generation.threads):
                measured.append(run.row(_Plan("oracle", "oracle", None, note=_ORACLE_NOTE)))
        with torch_threads(ensemble.backends, generation.threads):
            traced, unread = run.traces(measured, traces)
        comparison = Comparison(
            ensemble=title or ", ".join(ensemble.models),
            models=tuple(ensemble.models),
            identities=tuple(model.identity for model in ensemble.backends),
            costs=tuple(ensemble.costs),
            task=task.name,
            metric=task.config.metric.kind,
            split=split,
            digest=digest,
            seed=seed,
            settings={
                **generation.model_dump(mode="json", exclude={"seed"}),
                "batch_size": batch_size,
                "limit": limit,
            },
            versions=_versions(),
            machine=_machine(ensemble),
            rows=tuple(_results(measured, ensemble, seed)),
            warnings=(*warnings, *unread),
        )
        from multicolm.evaluation.report import write_report

        write_report(comparison, traced, folder)
    return comparison


class _Run:
    """What all rows of one comparison share, and how a row is run."""

    def __init__(
        self,
        ensemble: Ensemble,
        task: Task,
        questions: Sequence[Question],
        generation: GenerationConfig,
        seed: int,
        batch_size: int,
        progress: Callable[[Progress], None],
    ) -> None:
        self.ledger: Ledger
        self._ensemble = ensemble
        self._task = task
        self._questions = questions
        self._settings: dict[str, Any] = generation.model_dump(exclude={"seed"})
        self._sampling = Sampling(generation.temperature, generation.top_k, generation.top_p)
        self._seed = seed
        self._batch_size = batch_size
        self._progress = progress

    def check(self, plans: Sequence[_Plan]) -> None:
        """Find now, before any model has run, what would stop a row later.

        Raises:
            MulticolmError: if a policy does not fit, or a question cannot be asked or judged.
        """
        for question in self._questions:
            self._task.score("", question)
        asked = [question.asked for question in self._questions]
        every_model_reads = any(plan.kind == "model" for plan in plans)
        for number, plan in enumerate(plans):
            # Reading all prompts with every policy would only say the same once more.
            all_of_them = plan.kind == "model" if every_model_reads else number == 0
            prompts = asked if all_of_them else asked[:1]
            try:
                self._stream(plan, prompts).close()
            except InputError as error:
                raise InputError(f"task '{self._task.name}': {error}") from error

    def row(self, plan: _Plan) -> _Measured:
        """Answer all questions, as far as the ledger does not hold the answers."""
        done: list[Mapping[str, Any]] = []
        size = _CHUNK_BATCHES * self._batch_size
        for start in range(0, len(self._questions), size):
            questions = self._questions[start : start + size]
            key = f"chunk {plan.key} {start}-{start + len(questions)}"
            if key not in self.ledger:
                self._tell(plan, done, 0)
                chunk = (
                    self._oracle(questions)
                    if plan.policy is None
                    else self._chunk(plan, questions, done)
                )
                # Last of all: a chunk without this line is done again.
                self.ledger.append(key, chunk)
                self.ledger.sync()
            done.append(self.ledger.get(key))
        self._tell(plan, done, 0, finished=True)
        return _Measured(plan, done)

    def _tell(
        self, plan: _Plan, done: Sequence[Mapping[str, Any]], n_more: int, finished: bool = False
    ) -> None:
        qualities = _Measured(plan, done).qualities
        mean = _mean(qualities) if qualities else None
        n_done = len(qualities) + n_more
        self._progress(Progress(plan.name, n_done, len(self._questions), mean, finished))

    def _stream(self, plan: _Plan, prompts: Sequence[Any]) -> Any:
        return self._ensemble.stream(
            prompts, plan.policy, seed=self._seed, batch_size=self._batch_size, **self._settings
        )

    def _chunk(
        self, plan: _Plan, questions: Sequence[Question], done: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write the answers to some questions; what they came to together."""
        with self._stream(plan, [question.asked for question in questions]) as stream:
            for n_more, _ in enumerate(stream.finished(), start=1):
                self._tell(plan, done, n_more)
            answers: Answers = stream.answers
        qualities = []
        for question, answer in zip(questions, answers, strict=True):
            qualities.append(self._task.score(answer.text, question))
            record = {
                "text": answer.text,
                "quality": qualities[-1],
                "finish_reason": answer.finish_reason,
                "tokens": [
                    [t.id, t.text, t.model, _finite(t.logprob), _finite(t.score)]
                    for t in answer.trace
                ],
            }
            self.ledger.append(f"answer {plan.key} {question.id}", record)
        return _account(answers, qualities)

    def _oracle(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Whether first choices alone can write each question's gold completion."""
        vocabulary = self._ensemble.vocabulary
        base = self._ensemble.backends[0].tokenizer
        ends = vocabulary.end_ids(0) or vocabulary.end_ids(None)
        golds = []
        for question in questions:
            assert question.completion is not None
            golds.append([*base.encode_continuation(question.completion), *sorted(ends)[:1]])
        right = [torch.zeros(len(gold), dtype=torch.bool) for gold in golds]
        for k, model in enumerate(self._ensemble.backends):
            texts = [
                Text(encode_prompt(question.asked, k, model, vocabulary), gold)
                for question, gold in zip(questions, golds, strict=True)
            ]
            own_ends = vocabulary.end_ids(k)
            for reading in read_texts(model, k, vocabulary, texts):
                tops = reading.logits.argmax(-1).tolist()
                places = zip(reading.numbers.tolist(), reading.places.tolist(), tops, strict=True)
                for number, place, top in places:
                    gold = golds[number][place]
                    right[number][place] |= top == gold or (gold in ends and top in own_ends)
        qualities = [float(flags.all()) for flags in right]
        return {"qualities": qualities}

    def traces(self, measured: Sequence[_Measured], n: int) -> tuple[list[TracedAnswer], list[str]]:
        """The first ``n`` answers of every model and policy, and what a reader has to know."""
        reader = _Explainer(self._ensemble, self._sampling)
        traced: list[TracedAnswer] = []
        for row in measured:
            if row.plan.kind in ("model", "policy") and row.plan.policy is not None:
                key = f"answer {row.plan.key}"
                asked = [(q, self.ledger.get(f"{key} {q.id}")) for q in self._questions[:n]]
                traced += reader.explain(row.plan.name, row.plan.policy, asked)
        return traced, reader.warnings


def _account(answers: Answers, qualities: Sequence[float]) -> dict[str, Any]:
    """What a chunk of answers came to, as the ledger keeps it."""
    models = {}
    for name, usage in answers.usage.items():
        models[name] = {
            "written": usage.tokens_written,
            "forwards": usage.forwards,
            "passes": sum(answer.usage[name].forwards for answer in answers),
            "read": usage.tokens_read,
            "seconds": usage.seconds,
        }
    return {
        "qualities": list(qualities),
        "models": models,
        "mixed": sum(t.model == MIXTURE for answer in answers for t in answer.trace),
        "cut_off": sum(answer.finish_reason == "length" for answer in answers),
        "seconds": answers.seconds,
    }


# --- plans ---------------------------------------------------------------------------------------


def _plans(
    ensemble: Ensemble, named: Sequence[NamedPolicy], alone: bool, sweep: int
) -> list[_Plan]:
    """The rows that are known before anything has run.

    Raises:
        InputError: if there is none, or two have one name.
    """
    plans: list[_Plan] = []
    if alone:
        for k, name in enumerate(ensemble.models):
            policy = resolve_policy({"kind": "single", "params": {"model": k}})
            plans.append(_Plan(f"{name} alone", "model", policy))
    plans += [_Plan(each.name, "policy", each.policy) for each in named]
    for each in named:
        plans += _sweep_plans(each, sweep)
    # The names of rows that are added later are derived from these, and "oracle" is taken.
    counts = Counter([*(plan.name for plan in plans), "oracle"])
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise InputError(
            f"two rows of the table are called '{twice[0]}'; name each policy once, or copy it to "
            "a file of another name."
        )
    if not plans:
        raise InputError("there is nothing to compare; name a policy, or run the models alone.")
    return plans


def _sweep_plans(named: NamedPolicy, n: int) -> Iterator[_Plan]:
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
            yield _Plan(name, "sweep", policy, of=named.name, point={param: value})


def _random_plans(measured: Sequence[_Measured], models: Sequence[str]) -> Iterator[_Plan]:
    """For each policy that let several models write, a lottery with the same shares."""
    for row in measured:
        plan = row.plan
        n_written = {name: row.total("written", name) for name in models}
        n_mixed = sum(chunk["mixed"] for chunk in row.chunks)
        writers = {name: n for name, n in n_written.items() if n}
        if plan.kind != "policy" or n_mixed or len(writers) < 2 or _kind(plan) == "random":
            continue
        total = sum(writers.values())
        weights = {name: n / total for name, n in writers.items()}
        policy = resolve_policy({"kind": "random", "params": {"weights": weights}})
        yield _Plan(f"random as {plan.name}", "random", policy, of=plan.name)


def _kind(plan: _Plan) -> str:
    return "" if plan.policy is None else str(plan.policy.as_config()["kind"])


# --- results -------------------------------------------------------------------------------------


def _results(measured: Sequence[_Measured], ensemble: Ensemble, seed: int) -> Iterator[RowResult]:
    """Every row with its intervals, and beside the best model alone."""
    alone = [row for row in measured if row.plan.kind == "model"]
    best = max(alone, key=lambda row: row.quality, default=None)
    for row in measured:
        low, high = bootstrap_interval(row.qualities, seed)
        plan = row.plan
        yield RowResult(
            name=plan.name,
            kind=plan.kind,
            policy=None if plan.policy is None else _plain(plan.policy.as_config()),
            n_questions=len(row.qualities),
            quality=row.quality,
            low=low,
            high=high,
            of=plan.of,
            point=plan.point,
            **_gain(row, best, seed),
            **_work(row, ensemble),
        )


def _gain(row: _Measured, best: _Measured | None, seed: int) -> dict[str, Any]:
    if best is None or row is best:
        return {}
    low, high = paired_interval(row.qualities, best.qualities, seed)
    return {
        "gain": row.quality - best.quality,
        "gain_low": low,
        "gain_high": high,
        "p_value": paired_test(row.qualities, best.qualities, seed),
    }


def _work(row: _Measured, ensemble: Ensemble) -> dict[str, Any]:
    """What the models did, what it took, and what a reader of the row has to know."""
    if row.plan.policy is None:
        return {"note": row.plan.note}
    names = ensemble.models
    n_mixed = sum(chunk["mixed"] for chunk in row.chunks)
    n_tokens = n_mixed + sum(row.total("written", name) for name in names)
    seconds = math.fsum(chunk["seconds"] for chunk in row.chunks)
    uses = tuple(
        ModelUse(
            model=name,
            tokens_written=row.total("written", name),
            share=row.total("written", name) / n_tokens,
            forwards=row.total("forwards", name),
            tokens_read=row.total("read", name),
            seconds=row.total("seconds", name),
        )
        for name in names
    )
    costs = zip(names, ensemble.costs, strict=True)
    n_cut = sum(chunk["cut_off"] for chunk in row.chunks)
    cut = f"{n_cut} of {len(row.qualities)} answers were cut off at max_new_tokens."
    return {
        "uses": uses,
        "n_tokens": n_tokens,
        "n_mixed": n_mixed,
        "seconds": seconds,
        "tokens_per_second": n_tokens / seconds if seconds else 0.0,
        "cost": sum(row.total("passes", name) * cost for name, cost in costs) / n_tokens,
        "note": cut if n_cut else "",
    }


# --- traces --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What one model predicts at the places of some texts, one after another.

    Attributes:
        logits: [positions, vocab], in float32.
        hidden: [positions, hidden], if the policy looks at it.
        known: [positions], whether the model could read that far.
    """

    logits: Tensor
    hidden: Tensor | None
    known: Tensor


class _Explainer:
    """Reads written texts with all models, teacher forced.

    Attributes:
        warnings: what a reader of the traces has to know.
    """

    def __init__(self, ensemble: Ensemble, sampling: Sampling) -> None:
        self.warnings: list[str] = []
        self._ensemble = ensemble
        self._sampling = sampling

    def explain(
        self, row: str, policy: Policy, asked: Sequence[tuple[Question, Mapping[str, Any]]]
    ) -> Iterator[TracedAnswer]:
        """Traces of some answers of one row.

        Args:
            row: its name.
            policy: that wrote them.
            asked: questions and what the ledger holds of their answers.
        """
        for batch in self._batches(asked):
            seen = self._see(batch, policy)
            flat = [token for _, record in batch for token in record["tokens"]]
            models = self._models(seen, [token[0] for token in flat])
            probs = self._probs(policy, seen, batch)
            shown = [
                ShownToken(text, model, _rounded(logprob), _rounded(score), models[i], probs[i])
                for i, (_, text, model, logprob, score) in enumerate(flat)
            ]
            start = 0
            for question, record in batch:
                end = start + len(record["tokens"])
                yield TracedAnswer(
                    row=row,
                    question=question.id,
                    prompt=question.prompt,
                    gold=question.gold,
                    text=record["text"],
                    quality=record["quality"],
                    finish_reason=record["finish_reason"],
                    tokens=tuple(shown[start:end]),
                )
                start = end

    def _batches(
        self, asked: Sequence[tuple[Question, Mapping[str, Any]]]
    ) -> Iterator[list[tuple[Question, Mapping[str, Any]]]]:
        """Answers whose logits fit into memory together; one at least."""
        budget = _MAX_LOGITS // (self._ensemble.vocabulary.size * len(self._ensemble.models))
        batch: list[tuple[Question, Mapping[str, Any]]] = []
        n_tokens = 0
        for question, record in asked:
            n_tokens += len(record["tokens"])
            if batch and n_tokens > budget:
                yield batch
                batch, n_tokens = [], len(record["tokens"])
            batch.append((question, record))
        if batch:
            yield batch

    def _see(
        self, batch: Sequence[tuple[Question, Mapping[str, Any]]], policy: Policy
    ) -> dict[int, _Seen]:
        """What every model that can read these prompts predicts."""
        needs = policy.needs(self._ensemble.models)
        seen = {}
        for k, model in enumerate(self._ensemble.backends):
            try:
                texts = [
                    Text(
                        encode_prompt(question.asked, k, model, self._ensemble.vocabulary),
                        [token[0] for token in record["tokens"]],
                    )
                    for question, record in batch
                ]
            except InputError as error:
                self._warn(f"Traces do not show model '{model.name}': {error}")
                continue
            seen[k] = self._read(k, texts, hidden="hidden" in needs.of(k))
        return seen

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def _read(self, k: int, texts: Sequence[Text], hidden: bool) -> _Seen:
        ends = list(accumulate(len(text.ids) for text in texts))
        starts = torch.tensor([0, *ends[:-1]])
        vocabulary = self._ensemble.vocabulary
        logits = torch.zeros(ends[-1], vocabulary.size)
        states: Tensor | None = None
        known = torch.zeros(ends[-1], dtype=torch.bool)
        model = self._ensemble.backends[k]
        for reading in read_texts(model, k, vocabulary, texts, hidden=hidden):
            index = starts[reading.numbers] + reading.places
            logits[index] = reading.logits.float().cpu()
            known[index] = True
            if reading.hidden is not None:
                if states is None:
                    states = torch.zeros(ends[-1], reading.hidden.shape[-1])
                states[index] = reading.hidden.float().cpu()
        return _Seen(logits, states, known)

    def _models(self, seen: Mapping[int, _Seen], ids: Sequence[int]) -> list[dict[str, Any]]:
        """Per position and model: the written token's log-probability, and the likeliest tokens."""
        vocabulary = self._ensemble.vocabulary
        shown: list[dict[str, Any]] = [{} for _ in ids]
        for k, model in seen.items():
            logprobs = model.logits.log_softmax(-1)
            written = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
            top = logprobs.topk(min(_N_TOP, vocabulary.size), dim=-1)
            lines = zip(top.values.exp().tolist(), top.indices.tolist(), strict=True)
            for i, (probs, tokens) in enumerate(lines):
                if model.known[i]:
                    shown[i][self._ensemble.models[k]] = {
                        "logprob": _rounded(_finite(written[i])),
                        "top": [
                            [vocabulary.name(token), round(prob, 6)]
                            for token, prob in zip(tokens, probs, strict=True)
                        ],
                    }
        return shown

    def _probs(
        self,
        policy: Policy,
        seen: Mapping[int, _Seen],
        batch: Sequence[tuple[Question, Mapping[str, Any]]],
    ) -> list[dict[str, float]]:
        """Per position, with what probability the policy lets each model write."""
        n_positions = sum(len(record["tokens"]) for _, record in batch)
        found: list[dict[str, float]] = [{} for _ in range(n_positions)]
        always = policy.needs(self._ensemble.models).always
        if type(policy).model_probs is Policy.model_probs or not set(always) <= set(seen):
            return found
        known = torch.ones(n_positions, dtype=torch.bool)
        for k in always:
            known &= seen[k].known
        which = known.nonzero()[:, 0]
        probs = policy.model_probs(self._views(policy, seen, batch, which))
        if probs is None:
            return found
        if probs.shape != (len(which), len(self._ensemble.models)):
            raise PolicyError(
                f"policy '{policy.name}': `model_probs` gave {tuple(probs.shape)} numbers; "
                f"expected [positions, models], here "
                f"{(len(which), len(self._ensemble.models))}."
            )
        for i, line in zip(which.tolist(), probs.tolist(), strict=True):
            found[i] = {
                name: round(prob, 6) for name, prob in zip(self._ensemble.models, line, strict=True)
            }
        return found

    def _views(
        self,
        policy: Policy,
        seen: Mapping[int, _Seen],
        batch: Sequence[tuple[Question, Mapping[str, Any]]],
        which: Tensor,
    ) -> Views:
        """What the policy was shown at the positions numbered ``which``."""
        ensemble, needs = self._ensemble, policy.needs(self._ensemble.models)
        views = {}
        for k in needs.always:
            states = seen[k].hidden
            views[k] = View(
                seen[k].logits[which],
                None if states is None else states[which],
                signals=needs.of(k),
                name=ensemble.models[k],
                embed=self._embed(k),
            )
        names = [*ensemble.models, MIXTURE]
        past = [
            place
            for _, record in batch
            for place in _past([names.index(token[2]) for token in record["tokens"]])
        ]
        columns = torch.tensor(past)[which].unbind(-1)
        return Views(
            ensemble.models,
            views,
            n_positions=len(which),
            context={
                name: lambda column=column: column  # type: ignore[misc]
                for name, column in zip(("previous", "base_run", "place"), columns, strict=True)
            },
            drawn=self._sampling.probs,
            starts_word=ensemble.vocabulary.starts_word,
        )

    def _embed(self, k: int) -> Callable[[Tensor], Tensor]:
        model, vocabulary = self._ensemble.backends[k], self._ensemble.vocabulary
        return lambda ids: model.embed(vocabulary.own_ids(k, ids)).cpu()


def _past(writers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Per place of a text: who wrote the token before, the base model's run up to it, the place."""
    previous, run = -1, 0
    for place, writer in enumerate(writers):
        yield previous, run, place
        previous, run = writer, run + 1 if writer == 0 else 0


# --- what a run is, and what its readers have to know --------------------------------------------


def _check_numbers(limit: int | None, batch_size: int, sweep: int, traces: int) -> None:
    least = {"limit": (limit, 1), "batch_size": (batch_size, 1)}
    least |= {"sweep": (sweep, 0), "traces": (traces, 0)}
    for name, (value, at_least) in least.items():
        if value is not None and value < at_least:
            raise InputError(f"{name} must be {at_least} or more, got {value}.")


def _generation(ensemble: Ensemble, task: Task, max_new_tokens: int | None) -> GenerationConfig:
    """The ensemble's settings with the task's in their place."""
    settings: dict[str, Any] = {"max_new_tokens": task.config.max_new_tokens}
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    if task.config.stop:
        settings["stop"] = task.config.stop
    return ensemble.generation.updated(settings)


def _header(
    ensemble: Ensemble,
    task: Task,
    split: str,
    digest: str,
    generation: GenerationConfig,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """What all answers of a ledger have in common. Not the policies: each row has its own key."""
    asked = task.config.model_dump(mode="json", exclude={"summary", "source", "data"})
    if isinstance(task.metric, FunctionMetric):
        asked["metric"]["code"] = _code(task.metric.function)
    return {
        "verb": "compare",
        "models": [[m.name, m.identity, m.precision] for m in ensemble.backends],
        "task": task.name,
        "asked": asked,
        "split": split,
        "digest": digest,
        "seed": seed,
        "settings": generation.model_dump(mode="json", exclude={"seed"}),
        "batch_size": batch_size,
        "versions": _versions(),
    }


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
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from error
    if not isinstance(origin, Mapping):
        raise ArtefactError(f"{path} is damaged; it must hold an object.")
    return origin


def _identity(policy: Policy) -> Any:
    """What decides what a policy writes: kind, params, learned files, code that is not ours."""
    config = policy.as_config()
    code = "" if type(policy).__module__.startswith("multicolm.") else _code(type(policy))
    params = {
        name: _digest(value) if isinstance(value, Artefact) else _plain(value)
        for name, value in config["params"].items()
    }
    return {"kind": config["kind"], "params": params, "code": code}


def _code(thing: Any) -> str:
    """Digest of the file that a class or function is from; empty where there is none."""
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:
        return ""
    return sha256(Path(file)) if file is not None and Path(file).is_file() else ""


def _digest(artefact: Artefact[Any]) -> str:
    """Digest of a learned param's file, which is made if there is none yet."""
    if artefact.path is not None and artefact.path.is_file():
        return sha256(artefact.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"content{artefact.suffix}"
        artefact.write(artefact.content, path)
        return sha256(path)


def _plain(value: Any) -> Any:
    """A param as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, Artefact):
        return str(value.path) if value.path is not None else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _versions() -> dict[str, str]:
    found = {"multicolm": multicolm.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Ensembles of other backends do without.
            found[name] = "not installed"
    return found


def _machine(ensemble: Ensemble) -> str:
    with torch_threads(ensemble.backends, ensemble.generation.threads):
        n_threads = torch.get_num_threads()
    words = [_processor(), "1 thread" if n_threads == 1 else f"{n_threads} threads"]
    if not all(model.on_cpu for model in ensemble.backends) and torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
