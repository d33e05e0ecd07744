"""An ensemble file: which models write together, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from multicolm import catalog
from multicolm.config.document import Document, check_length, read_text
from multicolm.config.generation import GenerationConfig
from multicolm.config.model import ModelConfig
from multicolm.config.policy import (
    PolicyConfig,
    is_path,
    load_policy,
    policy_problems,
    with_paths,
)
from multicolm.config.policy_code import with_absolute_code
from multicolm.config.wording import Place, Problem, Strict, check, show
from multicolm.errors import ConfigError, UnknownNameError, unknown
from multicolm.plugins import backends

__all__ = ["EnsembleConfig", "load_ensemble", "parse_ensemble"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("assistant", "base", "mixture")


def _single() -> PolicyConfig:
    return PolicyConfig(kind="single")


class EnsembleConfig(Strict):
    """Which models write together, and how.

    Attributes:
        summary: one line for ``multicolm ls``.
        base_model: which of ``models`` is model 0.
        models: settings by name, in the order of the file.
        policy: who writes if a call does not say.
        generation: settings of calls that do not give their own.
        bridge: how models of different vocabularies hand over. ``auto`` takes ``shared`` where
            vocabularies agree in content, else ``boundary``; ``shared`` refuses models that do not
            agree; ``exact`` lets assistants continue within their own tokens.
    """

    summary: str = ""
    base_model: str = Field(min_length=1, description="the name of one of `models`")
    models: dict[str, ModelConfig] = Field(
        min_length=1, description="a mapping from a name to a model's settings"
    )
    policy: PolicyConfig = Field(default_factory=_single)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    bridge: Literal["auto", "shared", "boundary", "exact"] = "auto"
    _base_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _names_fit(self) -> EnsembleConfig:
        problems = _name_problems(self.base_model, self.models)
        if problems:
            raise ValueError("\n".join(problem.text for problem in problems))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, the base model first, the assistants in the order of the file."""
        return (self.base_model, *(name for name in self.models if name != self.base_model))

    @property
    def base_dir(self) -> Path:
        """The folder that relative paths start from."""
        return self._base_dir or Path.cwd()

    @property
    def warnings(self) -> list[str]:
        """What is allowed and unwise, one sentence each."""
        return [
            f"models.{name}: the Hub id '{model.location}' has no `revision`, so its weights may "
            "change under you; pin the commit."
            for name, model in self.models.items()
            if model.backend == "transformers"
            and not model.resolved.is_local
            and model.resolved_revision is None
        ]


def load_ensemble(source: str | Path) -> EnsembleConfig:
    """Read an ensemble.

    Args:
        source: a name in ``registry/ensembles/``, a YAML file, or a folder that holds an
            ``ensemble.yaml``. A name goes before a folder of that name; ``./name`` is the folder.

    Raises:
        ConfigError: if it is missing or wrong.
        UnknownNameError: if it is neither a known name nor a path.
    """
    known = catalog.names("ensembles")
    if isinstance(source, str) and source in known:
        return parse_ensemble(catalog.read("ensembles", source), catalog.path("ensembles", source))
    path = Path(source).expanduser()
    check_length(path, "an ensemble file")
    if isinstance(source, str) and not is_path(source) and not path.exists():
        raise UnknownNameError(
            f"{unknown('ensemble', source, known)} A file's name ends in .yaml; a folder needs an "
            "ensemble.yaml."
        )
    if path.is_dir():
        path = path / "ensemble.yaml"
    return parse_ensemble(read_text(path, "an ensemble file"), path)


def parse_ensemble(text: str, origin: str | Path) -> EnsembleConfig:
    """Read an ensemble from YAML text.

    Args:
        text: the YAML.
        origin: the file it is from; named in messages, and relative paths start from its folder.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    document = Document.parse(text, str(origin))
    base_dir = Path(origin).expanduser().absolute().parent
    data = dict(document.data)
    problems = _name_problems(data.get("base_model"), data.get("models"))
    data["models"], found = _read_models(data.get("models"), base_dir)
    problems += found
    data["policy"], found = _read_policy(data.get("policy", {"kind": "single"}), base_dir)
    problems += found
    config, found = check(EnsembleConfig, {k: v for k, v in data.items() if k in document.data})
    # What is wrong with the names comes from there too, without a place.
    problems += [problem for problem in found if problem.place]
    if problems or config is None:
        raise document.error(problems)
    config._base_dir = base_dir
    return config


def _read_models(models: object, base_dir: Path) -> tuple[object, list[Problem]]:
    """The models that are right, found where they are, and what can be said only of those."""
    if not isinstance(models, dict):
        return models, []
    read: dict[str, object] = {}
    problems = []
    for name, settings in models.items():
        read[name] = settings
        model, _ = check(ModelConfig, settings)
        if model is None:
            continue
        read[name] = model
        place: Place = ("models", name)
        if model.backend not in backends:
            text = unknown("backend", model.backend, backends.names())
            problems.append(Problem((*place, "backend"), text, unknown_name=True))
        found = model.resolve(base_dir)
        problems += [replace(problem, place=(*place, *problem.place)) for problem in found]
    return read, problems


def _read_policy(policy: object, base_dir: Path) -> tuple[object, list[Problem]]:
    """The policy if it is right, and what is wrong with its kind and params."""
    if isinstance(policy, str):
        try:
            return load_policy(policy, base_dir), []
        except ConfigError as error:
            unknown_name = isinstance(error, UnknownNameError)
            problem = Problem(("policy",), str(error), unknown_name=unknown_name)
            return _single(), [problem]
    if not isinstance(policy, dict):
        text = f"must be a policy's name, a path, or `kind` and `params`, got {show(policy)}."
        return _single(), [Problem(("policy",), text)]
    config, _ = check(PolicyConfig, policy)
    if config is None:
        return policy, []
    config = config.model_copy(update={"kind": with_absolute_code(config.kind, base_dir)})
    problems = policy_problems(config, ("policy",))
    return config if problems else with_paths(config, base_dir), problems


def _name_problems(base_model: object, models: object) -> list[Problem]:
    """What is wrong with the names, in values that may be of any type."""
    if not isinstance(models, Mapping) or not models:
        return []
    problems = []
    for name in models:
        if not _NAME.fullmatch(name):
            text = f"a model's name is letters, digits, '.', '_' and '-', got '{name}'."
            problems.append(Problem(("models", name), text, at_key=True))
        elif name in _RESERVED:
            text = f"'{name}' cannot be a model's name: it is reserved."
            problems.append(Problem(("models", name), text, at_key=True))
    if isinstance(base_model, str) and base_model and base_model not in models:
        text = unknown("model", base_model, models)
        problems.append(Problem(("base_model",), text, unknown_name=True))
    return problems
