"""Answers the questions of a task with one policy after another, so that it can be stopped.

plan       a policy, and what a table calls it
answering  asks all questions, a chunk at a time, and keeps every answer in a ledger
measured   a plan and what its answers came to, as the ledger has it
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from multicolm.config import GenerationConfig, catalog_file, policy_names
from multicolm.decoding.prompts import encode_prompt
from multicolm.decoding.sampling import Sampling
from multicolm.decoding.streaming import Answers
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError
from multicolm.evaluation.ledger import Ledger
from multicolm.evaluation.metrics import FunctionMetric
from multicolm.evaluation.oracle import Riddle, can_be_written
from multicolm.evaluation.provenance import code_digest, identity_of_policy, versions
from multicolm.evaluation.results import RowKind
from multicolm.evaluation.task import Question, Task
from multicolm.policy.base import Policy
from multicolm.policy.resolve import resolve_policy
from multicolm.types import MIXTURE, finite

__all__ = [
    "ASIDE",
    "Answering",
    "Measured",
    "NamedPolicy",
    "Plan",
    "Progress",
    "check_names",
    "named_policy",
    "plans_alone",
    "plans_of",
]

ASIDE = {"seed", "top_logprobs"}
"""Settings of an ensemble's that a comparison leaves out: it has a seed of its own, and keeps no
alternatives to what was written."""

_CHUNK_BATCHES = 4
_WARM_UP_TOKENS = 4


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
        total: of these there will be; 0 for work after the rows, such as the report, whose name is
            then in ``row``.
        quality: mean so far; ``None`` before the first answer.
        finished: whether the row is done.
        number: of the row, counted from 1 in the order in which rows are answered.
        of: how many rows there will be, as far as that is known; 0 if it is not.
    """

    row: str
    done: int
    total: int
    quality: float | None
    finished: bool = False
    number: int = 0
    of: int = 0


@dataclass(frozen=True)
class Plan:
    """A row that will be. ``policy`` is ``None`` for the oracle; see :class:`RowResult`."""

    name: str
    kind: RowKind
    policy: Policy | None
    of: str = ""
    point: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def checked(self) -> Policy:
        """The policy of a row that has one."""
        assert self.policy is not None
        return self.policy

    @cached_property
    def key(self) -> str:
        """What the row's records are kept under: another policy of the same name has another."""
        if self.policy is None:
            return self.name
        content = json.dumps(identity_of_policy(self.policy), sort_keys=True)
        return f"{self.name}#{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Measured:
    """A row's chunks, in the order of the questions."""

    plan: Plan
    chunks: Sequence[Mapping[str, Any]]

    @property
    def qualities(self) -> list[float]:
        """Of every answer, in the order of the questions; 0 to 1."""
        return [quality for chunk in self.chunks for quality in chunk["qualities"]]

    @property
    def quality(self) -> float:
        """Their mean."""
        return _mean(self.qualities)

    @property
    def n_mixed(self) -> int:
        """Tokens that several models wrote together."""
        return int(sum(chunk["mixed"] for chunk in self.chunks))

    @property
    def n_cut_off(self) -> int:
        """Answers that ended at ``max_new_tokens``."""
        return sum(chunk["cut_off"] for chunk in self.chunks)

    @property
    def n_shared(self) -> int | None:
        """Answers that more than one model wrote at; ``None`` if these were not counted."""
        counts = [chunk["shared"] for chunk in self.chunks if "shared" in chunk]
        return sum(counts) if len(counts) == len(self.chunks) else None

    @property
    def seconds(self) -> float:
        """Wall-clock time of the answers."""
        return math.fsum(chunk["seconds"] for chunk in self.chunks)

    @property
    def n_unknown(self) -> int:
        """Questions for which the oracle's search was cut."""
        return sum(chunk.get("unknown", 0) for chunk in self.chunks)

    def total(self, what: str, model: str) -> Any:
        """A number of a model, over all chunks."""
        return sum(chunk["models"][model][what] for chunk in self.chunks)

    def calls(self, model: str) -> int | None:
        """HTTP requests to a model; ``None`` if they were not counted when a chunk was answered."""
        counts = [chunk["models"][model].get("calls") for chunk in self.chunks]
        return None if None in counts else sum(counts)

    def n_tokens(self, models: Sequence[str]) -> int:
        """Tokens that were written, by whomever."""
        return self.n_mixed + int(sum(self.total("written", name) for name in models))


def plans_of(ensemble: Ensemble, named: Sequence[NamedPolicy], alone: bool) -> list[Plan]:
    """A row for every model alone, if these are wanted, and for every policy."""
    plans = [Plan(each.name, "policy", each.policy) for each in named]
    return [*plans_alone(ensemble), *plans] if alone else plans


def plans_alone(ensemble: Ensemble) -> list[Plan]:
    """A row for every model alone."""
    return [
        Plan(f"{name} alone", "model", resolve_policy({"kind": "single", "params": {"model": k}}))
        for k, name in enumerate(ensemble.models)
    ]


def check_names(names: Sequence[str]) -> None:
    """Refuse a table in which two rows have one name.

    Raises:
        InputError: naming it.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"two rows of the table are called '{name}'; name each policy once, or copy it to "
                "a file of another name."
            )


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
    named = catalog_file(text)
    if named is not None or text in policy_names():
        return NamedPolicy(text, policy, named and _checkpoint(named))
    path = Path(text).expanduser()
    return NamedPolicy(text.removeprefix("./").rstrip("/"), policy, _checkpoint(path))


def _checkpoint(path: Path) -> Path | None:
    if path.is_dir():
        return path
    return path.parent if path.name == "policy.yaml" else None


class Answering:
    """Some questions of a task, the settings that all policies share, and a ledger of answers.

    Args:
        ensemble: whose models write.
        task: that the questions are of.
        questions: to be answered.
        seed: of everything random.
        batch_size: how many texts are written at a time.
        max_new_tokens: maximum number of tokens of an answer; the task's if not given.
        progress: called after every answer, and when a row is done.

    Attributes:
        ledger: where answers are kept; to be set before the first row is run.
        warm_up: rows that write a few tokens, which are not kept, before any row is timed; each
            other row does so before it is timed itself. ``None``: time is of no interest.
        n_rows: how many rows will be answered, as far as that is known; 0 if it is not.
        settings: of the generation.
        sampling: how tokens are drawn.
        ensemble, task, questions, seed, batch_size: as given.
    """

    ledger: Ledger
    warm_up: Sequence[Plan] | None = None

    def __init__(
        self,
        ensemble: Ensemble,
        task: Task,
        questions: Sequence[Question],
        *,
        seed: int,
        batch_size: int,
        max_new_tokens: int | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.settings = _generation(ensemble, task, max_new_tokens)
        self.sampling = Sampling(
            self.settings.temperature, self.settings.top_k, self.settings.top_p
        )
        self.ensemble = ensemble
        self.task = task
        self.questions = questions
        self._arguments: dict[str, Any] = self.settings.model_dump(exclude=ASIDE)
        self.seed = seed
        self.batch_size = batch_size
        self._progress = progress
        self._warm: set[str] = set()
        self._numbers: dict[str, int] = {}
        self.n_rows = 0

    @property
    def has_completions(self) -> bool:
        """Whether there are gold completions of every question."""
        return all(question.completions for question in self.questions)

    def header(self, verb: str, split: str, digest: str) -> dict[str, Any]:
        """What all answers of a ledger share. Not the policies: each row has a key of its own.

        Args:
            verb: what the answers are for.
            split: that the questions are of.
            digest: of that split.
        """
        task = self.task
        asked = task.config.model_dump(mode="json", exclude={"summary", "source", "data"})
        if isinstance(task.metric, FunctionMetric):
            asked["metric"]["code"] = code_digest(task.metric.function)
        return {
            "verb": verb,
            "models": [[m.name, m.identity, m.precision] for m in self.ensemble.backends],
            "task": task.name,
            "asked": asked,
            "split": split,
            "digest": digest,
            "seed": self.seed,
            "settings": self.settings.model_dump(mode="json", exclude=ASIDE),
            "batch_size": self.batch_size,
            "versions": versions(),
        }

    def check(self, plans: Sequence[Plan]) -> None:
        """Find now, before any model has run, what would stop a row later.

        Raises:
            MulticolmError: if a policy does not fit, or a question cannot be asked or judged.
        """
        for question in self.questions:
            self.task.score("", question)
        asked = [question.asked for question in self.questions]
        every_model_reads = any(plan.kind == "model" for plan in plans)
        for number, plan in enumerate(plans):
            # Reading all prompts with every policy would only say the same once more.
            all_of_them = plan.kind == "model" if every_model_reads else number == 0
            prompts = asked if all_of_them else asked[:1]
            try:
                self._stream(plan, prompts).close()
            except InputError as error:
                raise InputError(f"task '{self.task.name}': {error}") from error

    def row(self, plan: Plan) -> Measured:
        """Answer all questions, as far as the ledger does not hold the answers."""
        done: list[Mapping[str, Any]] = []
        for key, questions in self._chunks(plan):
            if key not in self.ledger:
                self._answer(plan, key, questions, done)
            done.append(self.ledger.get(key))
        self._tell(plan, done, 0, finished=True)
        return Measured(plan, done)

    def share(self, plans: Sequence[Plan], known: Container[str], rank: int, n_ranks: int) -> None:
        """Answer this process's part of the questions of some rows, a chunk at a time.

        Args:
            plans: the rows.
            known: keys of what was answered before, the same for all processes.
            rank: of this process.
            n_ranks: how many processes there are.
        """
        chunks = [
            (plan, key, questions)
            for plan in plans
            for key, questions in self._chunks(plan)
            if key not in known
        ]
        for plan, key, questions in chunks[rank::n_ranks]:
            if key not in self.ledger:
                self._answer(plan, key, questions, [])

    def _chunks(self, plan: Plan) -> Iterator[tuple[str, Sequence[Question]]]:
        """Keys and questions of what is answered at a time."""
        size = _CHUNK_BATCHES * self.batch_size
        for start in range(0, len(self.questions), size):
            questions = self.questions[start : start + size]
            yield f"chunk {plan.key} {start}-{start + len(questions)}", questions

    def _answer(
        self,
        plan: Plan,
        key: str,
        questions: Sequence[Question],
        done: Sequence[Mapping[str, Any]],
    ) -> None:
        """Answer a chunk, and note it as done."""
        self._tell(plan, done, 0)
        if plan.policy is None:
            with torch_threads(self.ensemble.backends, self.settings.threads):
                chunk = self._oracle(questions)
        else:
            if self.warm_up is not None:
                for each in (*self.warm_up, plan):
                    self._first_use(each)
            chunk = self._chunk(plan, questions, done)
        # Last of all: a chunk without this line is done again.
        self.ledger.append(key, chunk)
        self.ledger.sync()

    def _tell(
        self, plan: Plan, done: Sequence[Mapping[str, Any]], n_more: int, finished: bool = False
    ) -> None:
        qualities = Measured(plan, done).qualities
        mean = _mean(qualities) if qualities else None
        number = self._numbers.setdefault(plan.key, len(self._numbers) + 1)
        counted = number, max(number, self.n_rows) if self.n_rows else 0
        n_done = len(qualities) + n_more
        self._progress(Progress(plan.name, n_done, len(self.questions), mean, finished, *counted))

    def say(self, what: str) -> None:
        """Report work that is no row of the table."""
        self._progress(Progress(what, 0, 0, None))

    def _first_use(self, plan: Plan) -> None:
        """Write a few tokens with the row's policy, unless it or one of its kind has done so.

        The first use of a model, of a pair of tokenizers or of a policy builds caches and asks
        servers what they can do; that must not slow the row that happens to come first.
        """
        name = plan.of or plan.name
        if name in self._warm:
            return
        self._warm.add(name)
        first = [self.questions[0].asked]
        n_tokens = min(_WARM_UP_TOKENS, self.settings.max_new_tokens)
        with self._stream(plan, first, max_new_tokens=n_tokens) as stream:
            for _ in stream.finished():
                pass

    def sample(self, plan: Plan, n_questions: int, n_tokens: int) -> Answers:
        """A few tokens of the answers to the first questions; nothing is kept."""
        asked = [question.asked for question in self.questions[:n_questions]]
        with self._stream(plan, asked, max_new_tokens=n_tokens) as stream:
            for _ in stream.finished():
                pass
            answers: Answers = stream.answers
        return answers

    def _stream(self, plan: Plan, prompts: Sequence[Any], **more: Any) -> Any:
        arguments = {**self._arguments, **more}
        return self.ensemble.stream(
            prompts, plan.policy, seed=self.seed, batch_size=self.batch_size, **arguments
        )

    def _chunk(
        self, plan: Plan, questions: Sequence[Question], done: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write the answers to some questions; what they came to together."""
        with self._stream(plan, [question.asked for question in questions]) as stream:
            for n_more, _ in enumerate(stream.finished(), start=1):
                self._tell(plan, done, n_more)
            answers: Answers = stream.answers
        qualities = []
        for question, answer in zip(questions, answers, strict=True):
            qualities.append(self.task.score(answer.content, question))
            record = {
                "text": answer.text,
                "quality": qualities[-1],
                "finish_reason": answer.finish_reason,
                "tokens": [
                    [t.id, t.text, t.model, finite(t.logprob), finite(t.score)]
                    for t in answer.trace
                ],
            }
            self.ledger.append(f"answer {plan.key} {question.id}", record)
        return _account(answers, qualities)

    def _oracle(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Whether first choices alone can write a right completion of each question."""
        models, vocabulary = self.ensemble.backends, self.ensemble.vocabulary
        riddles = [
            Riddle(
                [encode_prompt(q.asked, k, model, vocabulary) for k, model in enumerate(models)],
                q.completions,
            )
            for q in questions
        ]
        found = can_be_written(self.ensemble, riddles, batch_size=len(riddles))
        return {
            "qualities": [float(bool(flag)) for flag in found],
            "unknown": sum(flag is None for flag in found),
        }

    def answers(self, plan: Plan, n: int | None = None) -> list[Mapping[str, Any]]:
        """What the ledger holds of the first ``n`` answers of a row that was run."""
        key = f"answer {plan.key}"
        return [self.ledger.get(f"{key} {q.id}") for q in self.questions[:n]]


def _account(answers: Answers, qualities: Sequence[float]) -> dict[str, Any]:
    """What a chunk of answers came to, as the ledger keeps it."""
    models = {}
    writers = [{token.model for token in answer.trace} for answer in answers]
    for name, usage in answers.usage.items():
        models[name] = {
            "alone": sum(names == {name} for names in writers),
            "written": usage.tokens_written,
            "forwards": usage.forwards,
            "passes": sum(answer.usage[name].forwards for answer in answers),
            "read": usage.tokens_read,
            "seconds": usage.seconds,
            "calls": usage.calls,
        }
    return {
        "qualities": list(qualities),
        "models": models,
        "mixed": sum(t.model == MIXTURE for answer in answers for t in answer.trace),
        "shared": sum(len(names) > 1 or MIXTURE in names for names in writers),
        "cut_off": sum(answer.finish_reason == "length" for answer in answers),
        "seconds": answers.seconds,
    }


def _generation(ensemble: Ensemble, task: Task, max_new_tokens: int | None) -> GenerationConfig:
    """The ensemble's settings with the task's in their place."""
    settings: dict[str, Any] = {"max_new_tokens": task.config.max_new_tokens}
    if max_new_tokens is not None:
        settings["max_new_tokens"] = max_new_tokens
    if task.config.stop:
        settings["stop"] = task.config.stop
    return ensemble.generation.updated(settings)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
