"""Tasks of EleutherAI's lm-evaluation-harness, found by name and set up for a run.

The harness is imported when it is used (the extra ``eval``).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicolm.errors import ConfigError, MulticolmError, UnknownNameError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["Unit", "load_units", "quiet"]


@dataclass(frozen=True)
class Unit:
    """A task, or a group of tasks, as it was asked for.

    Attributes:
        name: by which it was asked for.
        loaded: what the harness made of it.
        digest: of its definition and questions.
    """

    name: str
    loaded: Mapping[str, Any]
    digest: str

    @property
    def tasks(self) -> list[Any]:
        """The tasks themselves."""
        return list(self.loaded["tasks"].values())

    @property
    def asks_for_likelihoods(self) -> bool:
        """Whether any of them does, so that it matters which ones they are."""
        return any(task.OUTPUT_TYPE != "generate_until" for task in self.tasks)


@contextmanager
def quiet() -> Iterator[None]:
    """Of what the harness logs, show errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@quiet()
def load_units(
    tasks: Sequence[str | Unit],
    include_path: Sequence[str | Path],
    num_fewshot: int | None,
    gen_kwargs: Mapping[str, Any] | None,
    limit: int | None,
) -> list[Unit]:
    """The tasks, loaded and set up; those that are so already stay as they are.

    Raises:
        ConfigError: if the harness is not installed, or a task cannot be loaded.
        UnknownNameError: if there is no such task.
    """
    units = [task for task in tasks if isinstance(task, Unit)]
    names = [task for task in tasks if not isinstance(task, Unit)]
    manager, found = _manager(names, include_path) if names or not units else (None, [])
    for name in found:
        # What a task file may do to fail is not ours to enumerate: it downloads, and runs Python.
        try:
            loaded = manager.load([name])  # type: ignore[union-attr]  # there is one for names
            for task in loaded["tasks"].values():
                _set_up(task, num_fewshot, gen_kwargs)
            digest = _digest(loaded["tasks"].values(), limit)
        except MulticolmError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"task '{name}' cannot be loaded: {reason}") from error
        units.append(Unit(name, loaded, digest))
    return units


def _manager(
    names: Sequence[str], include_path: Sequence[str | Path]
) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, and their names without wildcards.

    Raises:
        ConfigError: if the harness is not installed, or a folder is missing.
        UnknownNameError: if there is no such task.
    """
    try:
        import lm_eval.models  # noqa: F401  # before anything registers a model of its own
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "tasks of the lm-evaluation-harness need lm-eval: pip install 'multicolm[eval]'."
        ) from error
    if not names:
        raise ConfigError("no task; name one or more of the lm-evaluation-harness.")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"there is no folder {folder}, which should hold tasks.")
    own = TaskManager(include_path=[str(p) for p in include_path], include_defaults=False)
    known = _matched(own, names)
    # Reading the definitions of the harness's own thousands of tasks takes ten seconds.
    manager = own if all(known) else TaskManager(include_path=[str(p) for p in include_path])
    known = known if all(known) else _matched(manager, names)
    for name, found in zip(names, known, strict=True):
        if not found:
            raise UnknownNameError(_unknown(name, manager.all_tasks, include_path))
    return manager, list(dict.fromkeys(name for found in known for name in found))


def _matched(manager: TaskManager, names: Sequence[str]) -> list[list[str]]:
    """Per name, the tasks that it stands for."""
    found: list[list[str]] = []
    for name in names:
        if name.endswith((".yaml", ".yml")) and Path(name).is_file():
            found.append([name])
        elif "*" in name:
            found.append(sorted(manager.match_tasks([name])))
        else:
            found.append([name] if name in manager.all_tasks else [])
    return found


def _unknown(name: str, known: Sequence[str], include_path: Sequence[str | Path]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    where = f"and {', '.join(map(str, include_path))} have" if include_path else "has"
    return (
        f"unknown task '{name}'.{hint} The lm-evaluation-harness {where} {len(known)}; "
        "`lm_eval ls tasks` lists its own, and --include-path adds a folder of yours."
    )


def _set_up(task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> None:
    """Settings of this run in the place of a task's own, as the harness's command puts them."""
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _digest(tasks: Any, limit: int | None) -> str:
    """Of definitions, questions and examples: what would make it another task."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
        documents = [*task.eval_docs] if limit is None else _first(task.eval_docs, limit)
        if task.get_config("num_fewshot"):
            documents += list(task.fewshot_docs() or ())
        for document in documents:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _first(documents: Any, n: int) -> list[Any]:
    return [document for document, _ in zip(documents, range(n), strict=False)]
