"""Whether an ensemble or a policy can be used, as far as that shows without loading a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from multicolm import catalog
from multicolm.config.document import Document, read_text
from multicolm.config.ensemble import EnsembleConfig, load_ensemble
from multicolm.config.model import ModelConfig
from multicolm.config.policy import PolicyConfig, load_policy
from multicolm.config.policy_code import policy_class
from multicolm.errors import ConfigError, MulticolmError, UnknownNameError, unknown
from multicolm.views import ModelNames

__all__ = ["Report", "is_task", "validate"]

_POLICIES: tuple[catalog.Kind, ...] = ("policies", "trained")


@dataclass
class Report:
    """What was checked, and what was found.

    Attributes:
        source: what was asked about.
        kind: whether it is an ensemble, a policy or a task; ``None`` if it could not be read.
        checked: what was checked and found right.
        warnings: what is allowed and unwise.
        errors: what is wrong.
    """

    source: str
    kind: Literal["ensemble", "policy", "task"] | None = None
    checked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return {**asdict(self), "ok": not self.errors}


def validate(source: str) -> Report:
    """Check an ensemble or a policy. No model is loaded, and nothing is fetched.

    Args:
        source: a name of the catalogue (ensembles go first), a YAML file, or a folder with an
            ``ensemble.yaml`` or a ``policy.yaml``.
    """
    report = Report(source)
    try:
        report.kind = _kind(source)
        if report.kind == "policy":
            policy = load_policy(source, Path.cwd())
            report.checked.append(f"policy {policy.kind}: kind and params")
        else:
            _check_ensemble(load_ensemble(source), report)
    except MulticolmError as error:
        report.errors.extend(str(error).split("\n"))
    return report


def is_task(source: str) -> bool:
    """Whether a source is a task: a name of the catalogue, or a YAML file of one."""
    path = Path(source).expanduser()
    others = {name for kind in _POLICIES for name in catalog.names(kind)}
    others |= set(catalog.names("ensembles"))
    if source in others or path.is_dir() or not path.exists():
        return source in catalog.names("tasks") and source not in others
    try:
        data = Document.parse(read_text(path, "a task file"), source).data
    except MulticolmError:
        return False
    return (
        not {"models", "kind"} & data.keys() and len({"data", "gold", "metric"} & data.keys()) > 1
    )


def _kind(source: str) -> Literal["ensemble", "policy"]:
    ensembles = catalog.names("ensembles")
    presets = [name for kind in _POLICIES for name in catalog.names(kind)]
    if source in ensembles:
        return "ensemble"
    if source in presets:
        return "policy"
    path = Path(source).expanduser()
    if path.is_dir():
        has_policy = (path / "policy.yaml").is_file()
        return "policy" if has_policy and not (path / "ensemble.yaml").is_file() else "ensemble"
    if not path.exists() and not source.endswith((".yaml", ".yml")) and "/" not in source:
        known = [*ensembles, *presets, *catalog.names("tasks")]
        raise UnknownNameError(unknown("ensemble, policy or task", source, known))
    data = Document.parse(read_text(path, "an ensemble or a policy file"), source).data
    return "policy" if "kind" in data and "models" not in data else "ensemble"


def _check_ensemble(config: EnsembleConfig, report: Report) -> None:
    base, *assistants = config.names
    who = f"base model {base}, assistants {', '.join(assistants)}" if assistants else f"only {base}"
    report.checked.append(f"settings: {who}")
    try:
        _check_roles(config.policy, config.names)
        report.checked.append(f"policy {config.policy.kind}: kind, params, the models it speaks of")
    except MulticolmError as error:
        report.errors.append(f"policy: {error}")
    for name, model in config.models.items():
        try:
            report.checked.append(f"model {name}: {_check_model(model)}")
        except ConfigError as error:
            report.errors.append(f"models.{name}: {error}")
        for key in ("trust_remote_code", "allow_pickled_weights"):
            if getattr(model, key):
                report.warnings.append(f"models.{name}: `{key}` lets the model's author run code.")
    report.warnings.extend(config.warnings)


def _check_roles(config: PolicyConfig, names: tuple[str, ...]) -> None:
    cls: Any = policy_class(config.kind)
    cls(**config.params).needs(ModelNames(names))


def _check_model(model: ModelConfig) -> str:
    """What was checked of a model.

    Raises:
        ConfigError: if a file is missing or unreadable.
    """
    where = model.resolved
    if where.adapter is not None:
        _check_weights(Path(where.adapter), "adapter_model", model.allow_pickled_weights)
    if model.backend == "llama-cpp":
        return _check_gguf(Path(where.location))
    if model.url is not None:
        return f"{model.url} was not asked"
    if model.backend != "transformers":
        return f"{where.location} is for the backend '{model.backend}' to check"
    if not where.is_local:
        return f"{where.location} was not looked up"
    folder = Path(where.location)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / 'config.json'} is not readable as JSON: {error}.") from error
    _check_weights(folder, "*", model.allow_pickled_weights)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(f"{folder} holds no tokenizer; save it beside the weights.")
    return f"{folder} holds config.json, weights and a tokenizer"


def _check_gguf(path: Path) -> str:
    """What was checked of a GGUF file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    if begin != b"GGUF":
        raise ConfigError(
            f"{path} is no GGUF file; convert the model with llama.cpp's convert_hf_to_gguf.py."
        )
    return f"{path} is a GGUF file"


def _check_weights(folder: Path, stem: str, pickled: bool) -> None:
    if any(folder.glob(f"{stem}.safetensors")) or (pickled and any(folder.glob(f"{stem}.bin"))):
        return
    if pickled:
        raise ConfigError(f"{folder} holds no weights.")
    raise ConfigError(
        f"{folder} holds no safetensors; convert the weights, or set `allow_pickled_weights: true` "
        "if you trust their author."
    )
