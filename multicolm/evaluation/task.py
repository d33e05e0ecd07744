"""A task: where its questions are, how they are asked, and how answers are judged.

A task is a YAML file (a name in ``registry/tasks/``, or a path). Data are JSON lines, CSV, Parquet,
or a data set of the Hub; the last two through the library ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from multicolm import catalog
from multicolm.config.document import Document, read_text
from multicolm.config.policy import is_path
from multicolm.config.wording import Place, Problem, Strict, check, problems_of, unknown_key
from multicolm.errors import ConfigError, InputError, UnknownNameError, unknown
from multicolm.evaluation.metrics import FunctionMetric, Metric, load_function
from multicolm.plugins import metrics
from multicolm.records import Source
from multicolm.types import Message, Prompt, prompt_digest

__all__ = [
    "DataConfig",
    "MetricConfig",
    "Question",
    "Task",
    "TaskConfig",
    "completion_task",
    "load_task",
]

# As in `package.module:function` or `file.py:function`; a template has braces or blanks.
_FUNCTION = re.compile(r"[\w./~-]+:[A-Za-z_]\w*")


def _as_data(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class DataConfig(Strict):
    """Where one split's records are.

    Attributes:
        source: a file of JSON lines, a ``.csv`` or ``.parquet`` file, or ``org/name`` on the Hub.
        split: of a data set of the Hub.
        subset: of a data set of the Hub, where it has several.
        revision: of a data set of the Hub.
    """

    source: str = Field(min_length=1, description="a file, or org/name on the Hub")
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def found_from(self, base_dir: Path) -> Source:
        """Where its records are, if relative paths start from a folder."""
        source = Source(self.source, self.split, self.subset, self.revision)
        if source.is_file:
            return replace(source, name=str(base_dir / Path(self.source).expanduser()))
        return source


class MetricConfig(Strict):
    """How answers are judged.

    Attributes:
        kind: a name in :data:`multicolm.plugins.metrics`, or ``package.module:function``, or
            ``file.py:function``.
        params: values of the metric's fields.
    """

    kind: str = Field(min_length=1, description="the name of a metric")
    params: dict[str, Any] = Field(default_factory=dict)


class TaskConfig(Strict):
    """The schema of a task file.

    Attributes:
        summary: one line for ``multicolm ls``.
        data: the splits, by name.
        prompt: what is asked, with the record's fields as ``{field}``.
        gold: the right answer, likewise.
        completion: a text that is right from the first token to the last, likewise; or, where many
            are, ``package.module:function`` that gives all of a record's. For the oracle.
        chat: whether the prompt is a message that goes through each model's chat template.
        stop: texts that end an answer and are not part of it; they may name special tokens.
        max_new_tokens: maximum number of tokens of an answer.
        metric: how answers are judged.
        source: the publication it is from.
    """

    summary: str = ""
    data: dict[str, Annotated[DataConfig, BeforeValidator(_as_data)]] = Field(
        min_length=1, description="a mapping from a split's name to its file"
    )
    prompt: str = Field(min_length=1, description="what is asked, such as '{question}'")
    gold: str = Field(min_length=1, description="the right answer, such as '{answer}'")
    completion: str | None = None
    chat: bool = False
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)
    ] = ()
    max_new_tokens: int = Field(default=64, ge=1)
    metric: MetricConfig
    source: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its right answer.

    Attributes:
        id: unique within its split.
        prompt: what is asked, as text.
        gold: the right answer.
        completions: texts that are right throughout; none if the task has none.
        record: what the data hold.
        chat: whether the prompt is a message.
    """

    id: str
    prompt: str
    gold: str
    completions: tuple[str, ...]
    record: Mapping[str, Any]
    chat: bool = False

    @property
    def asked(self) -> Prompt:
        """The prompt as models get it."""
        if not self.chat:
            return self.prompt
        message: Message = {"role": "user", "content": self.prompt}
        return [message]

    @property
    def fingerprint(self) -> str:
        """See :func:`multicolm.types.prompt_digest`."""
        return prompt_digest(self.prompt)


@dataclass(frozen=True)
class Task:
    """A task that is ready to be read and judged.

    Attributes:
        name: as it was asked for.
        config: its file.
        base_dir: the folder that its data's relative paths start from.
        metric: what judges.
        completions: gives the right texts of a record, where the file names a function for that.
    """

    name: str
    config: TaskConfig
    base_dir: Path
    metric: Metric | FunctionMetric
    completions: Callable[[Mapping[str, Any]], Sequence[str]] | None = None

    def questions(self, split: str) -> list[Question]:
        """All questions of a split, in their order.

        Raises:
            UnknownNameError: if there is no such split.
            InputError: if a record is not right, two have one id, or there is none.
            ConfigError: if the data cannot be read.
        """
        questions: dict[str, Question] = {}
        for place, record in self._records(split):
            question = self._question(place, record)
            if question.id in questions:
                raise InputError(f"{place}: the id '{question.id}' is there already; ids differ.")
            questions[question.id] = question
        return list(questions.values())

    def sample(self, split: str, limit: int | None) -> list[Question]:
        """The questions of a split, or some of them, spread evenly: files are often sorted by kind.

        Raises:
            MulticolmError: see :meth:`questions`.
        """
        questions = self.questions(split)
        if limit is None or limit >= len(questions):
            return questions
        return [questions[i * len(questions) // limit] for i in range(limit)]

    def development(self, split: str, limit: int | None = None) -> list[Question]:
        """The questions of a split that something may be learned from; see :meth:`sample`.

        Raises:
            InputError: if it is the test split, or shares questions with that.
            MulticolmError: see :meth:`questions`.
        """
        if split == "test":
            raise InputError(
                "nothing is learned or tuned on the test split; choose another one with --split."
            )
        questions = self.sample(split, limit)
        if "test" in self.config.data:
            tested = {question.fingerprint for question in self.questions("test")}
            n = sum(question.fingerprint in tested for question in questions)
            if n:
                raise InputError(
                    f"{n} of the {len(questions)} questions of task '{self.name}' ({split}) are in "
                    "its test split too; what has seen test data cannot be judged on it."
                )
        return questions

    def digest(self, split: str) -> str:
        """SHA-256 over all records of a split: equal for equal records, in any format.

        Raises:
            MulticolmError: see :meth:`questions`.
        """
        digest = hashlib.sha256()
        for _, record in self._records(split):
            canonical = json.dumps(record, ensure_ascii=False, sort_keys=True, default=str)
            digest.update(canonical.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()

    def with_data(self, split: str, source: str) -> Task:
        """The same task with other records, in the same form, as a split of it.

        Args:
            split: which one they are from now on.
            source: a file, or the name of a data set on the Hub.

        Raises:
            ConfigError: if it is neither.
        """
        data = DataConfig(source=source)
        if data.found_from(Path.cwd()).is_file:
            data = DataConfig(source=str(Path(source).expanduser().absolute()))
        if problem := data.found_from(self.base_dir).problem:
            raise ConfigError(problem)
        splits = {**self.config.data, split: data}
        return replace(self, config=self.config.model_copy(update={"data": splits}))

    def judged_by(self, kind: str) -> Task:
        """The same task, its answers judged by a metric of this name.

        Raises:
            ConfigError: if the metric cannot be used.
            UnknownNameError: if there is none of this name.
        """
        if kind == self.config.metric.kind:
            return self  # With the params that the task gives it.
        config = MetricConfig(kind=kind)
        if problems := _metric_problems(config):
            raise UnknownNameError(problems[0].text)
        metric = _metric(config, Path.cwd())
        return replace(
            self, config=self.config.model_copy(update={"metric": config}), metric=metric
        )

    def score(self, text: str, question: Question) -> float:
        """How good an answer is, 0 to 1.

        Raises:
            InputError: if the metric cannot judge it, or gives what is no number of 0 to 1.
        """
        where = f"task '{self.name}', question '{question.id}'"
        try:
            if isinstance(self.metric, FunctionMetric):
                quality = self.metric.function(text, question.gold, question.record)
            else:
                quality = self.metric.score(text, question.gold)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not isinstance(quality, int | float) or not 0 <= quality <= 1:
            raise InputError(
                f"{where}: metric '{self.config.metric.kind}' gave {quality!r}; a quality is a "
                "number of 0 to 1."
            )
        return float(quality)

    def _records(self, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Place and content of every record."""
        if split not in self.config.data:
            raise UnknownNameError(
                f"task '{self.name}': {unknown('split', split, self.config.data)}"
            )
        data = self.config.data[split]
        empty = True
        for place, record in data.found_from(self.base_dir):
            if not isinstance(record, Mapping):
                raise InputError(f"{place}: a record is an object, such as {{...}}.")
            empty = False
            yield place, record
        if empty:
            raise InputError(f"task '{self.name}': {data.source} holds no question.")

    def _question(self, place: str, record: Mapping[str, Any]) -> Question:
        given = record.get("id", place.rpartition(":")[2])
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise InputError(f"{place}: the id must be text or a whole number, got {given!r}.")
        texts = {
            key: None if template is None else _filled(template, key, place, record)
            for key, template in self._templates.items()
        }
        prompt, gold = texts["prompt"], texts["gold"]
        assert prompt is not None and gold is not None
        if not prompt:
            raise InputError(f"{place}: the prompt is empty.")
        completions = self._completions(place, record, texts.get("completion"))
        return Question(str(given), prompt, gold, completions, record, self.config.chat)

    def _completions(
        self, place: str, record: Mapping[str, Any], text: str | None
    ) -> tuple[str, ...]:
        if self.completions is None:
            return () if text is None else (text,)
        found = self.completions(record)
        texts = isinstance(found, list | tuple) and all(isinstance(t, str) for t in found)
        if not texts or not found:
            raise InputError(
                f"{place}: {self.config.completion} gave {type(found).__name__}; expected a list "
                "of texts that are right for the record, one or more."
            )
        return tuple(found)

    @cached_property
    def _templates(self) -> dict[str, str | None]:
        config = self.config
        templates = {"prompt": config.prompt, "gold": config.gold}
        if self.completions is None:
            return {**templates, "completion": config.completion}
        return {**templates}


def load_task(source: str | Path) -> Task:
    """Read a task; its data are not read yet.

    Args:
        source: a name in ``registry/tasks/``, or a YAML file. A metric that the file names as a
            Python function is imported.

    Raises:
        ConfigError: if the file is missing or wrong; one line for each thing.
        UnknownNameError: if it is neither a known name nor a path.
    """
    if isinstance(source, str) and source in catalog.names("tasks"):
        path = catalog.path("tasks", source)
        return _parse(catalog.read("tasks", source), path, catalog.registry(), source)
    path = Path(source).expanduser()
    if isinstance(source, str) and not is_path(source) and not path.exists():
        known = catalog.names("tasks")
        raise UnknownNameError(f"{unknown('task', source, known)} A file's name ends in .yaml.")
    return _parse(read_text(path, "a task file"), path, path.absolute().parent, path.stem)


def completion_task(source: str, split: str) -> Task:
    """The task of giving completions to prompts, as in a corpus to learn from.

    Args:
        source: records of ``{"prompt", "completion"}``, both texts: a file, or the name of a data
            set on the Hub.
        split: what these records are.

    Raises:
        ConfigError: if it is no file and no name of a data set.
    """
    config = TaskConfig(
        data={split: DataConfig(source=source)},
        prompt="{prompt}",
        gold="{completion}",
        completion="{completion}",
        metric=MetricConfig(kind="exact-match"),
    )
    task = Task(Path(source).stem, config, Path.cwd(), _metric(config.metric, Path.cwd()))
    return task.with_data(split, source)


def _parse(text: str, origin: Path, base_dir: Path, name: str) -> Task:
    document = Document.parse(text, str(origin))
    config, problems = check(TaskConfig, document.data)
    problems = [*problems, *_template_problems(document.data)]
    if config is None or problems:
        raise document.error(problems)
    problems = [*_data_problems(config, base_dir), *_metric_problems(config.metric)]
    if problems:
        raise document.error(problems)
    completions = None
    if config.completion is not None and _FUNCTION.fullmatch(config.completion):
        completions = load_function(config.completion, base_dir)
    return Task(name, config, base_dir, _metric(config.metric, base_dir), completions)


def _template_problems(data: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key in ("prompt", "gold", "completion"):
        if isinstance(data.get(key), str) and (text := _template_problem(data[key])):
            problems.append(Problem((key,), text))
    return problems


def _template_problem(template: str) -> str:
    """What is wrong with a template; empty if nothing is."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return f"{error}; write a literal brace twice."
    for _, field, form, conversion in parts:
        if field is not None and (not field.isidentifier() or form or conversion):
            return f"'{{{field}}}' is not allowed; write a field's name alone, such as {{answer}}."
    return ""


def _data_problems(config: TaskConfig, base_dir: Path) -> list[Problem]:
    problems = []
    for split, data in config.data.items():
        place: Place = ("data", split)
        if text := data.found_from(base_dir).problem:
            problems.append(Problem(place, text))
    return problems


def _metric_problems(config: MetricConfig) -> list[Problem]:
    """What is wrong with a metric, as its class' fields see it."""
    place: Place = ("metric", "params")
    if ":" in config.kind:
        text = "a Python function takes no params; write them into the function."
        return [Problem(place, text)] if config.params else []
    if config.kind not in metrics:
        text = unknown("metric", config.kind, metrics.names())
        return [Problem(("metric", "kind"), text, unknown_name=True)]
    cls: Any = metrics.get(config.kind)
    allowed = [field.name for field in fields(cls)]
    problems = [
        Problem((*place, key), unknown_key(key, allowed), at_key=True)
        for key in config.params
        if key not in allowed
    ]
    known = {key: value for key, value in config.params.items() if key in allowed}
    try:
        cls(**known)
    except ValidationError as error:
        found = problems_of(error, cls, known)
        problems += [replace(problem, place=(*place, *problem.place)) for problem in found]
    return problems


def _metric(config: MetricConfig, base_dir: Path) -> Metric | FunctionMetric:
    if ":" in config.kind:
        return FunctionMetric.load(config.kind, base_dir)
    cls: Any = metrics.get(config.kind)
    made: Metric = cls(**config.params)
    return made


def _filled(template: str, key: str, place: str, record: Mapping[str, Any]) -> str:
    """A template with a record's values in it.

    Raises:
        InputError: if the record lacks a field, or its value is neither text nor a number.
    """
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        if field not in record:
            known = unknown("field", field, map(str, record))
            raise InputError(f"{place}: `{key}` of the task asks for an {known}")
        value = record[field]
        usable = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not usable or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{place}: '{field}' must be text or a number, got {value!r}.")
        parts.append(str(value))
    text = "".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: `{key}` is not valid Unicode.") from error
    return text
