"""From whatever a user may write for a policy to the policy itself."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from multicolm.config import PolicyConfig, check_params, load_policy
from multicolm.config.policy_code import policy_class, run_named_file, split_address
from multicolm.errors import ConfigError, UnknownNameError, unknown
from multicolm.numbers import as_python
from multicolm.policy.base import MixPolicy, Policy, SegmentPolicy, SelectPolicy, VerifyPolicy

__all__ = ["resolve_policy"]

_FORMS = (
    'a policy is a name, a path, {"kind": "confidence", "params": {"threshold": 0.6}}, or an '
    "instance of a policy's class"
)


def resolve_policy(
    source: str | Path | Policy | PolicyConfig | Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    *,
    base_dir: Path | None = None,
) -> Policy:
    """The policy that ``source`` speaks of.

    Args:
        source: a policy; ``{"kind": ..., "params": {...}}``; the name of a preset or of a kind; a
            YAML file or a folder with a ``policy.yaml``; or ``file.py:Class``, which runs that
            file.
        params: params that replace those of ``source``.
        base_dir: the folder that relative paths start from; the working folder if not given.

    Raises:
        ConfigError: if there is no such policy, or a param is unknown or of the wrong type.
    """
    if isinstance(source, Policy):
        if not params:
            return source
        own = source.as_config()["params"]
        return _build(type(source), {**own, **params}, source.name)
    if isinstance(source, str) and ".py:" in source:
        cls = _from_file(source, base_dir or Path.cwd())
        return _build(cls, dict(params or {}), source)
    if isinstance(source, str | Path) and str(source).endswith(".py"):
        raise _without_class(str(source), (base_dir or Path.cwd()) / source)
    if isinstance(source, Mapping):
        config = _from_mapping(source)
    elif isinstance(source, PolicyConfig):
        config = source
    elif isinstance(source, str | Path):
        config = load_policy(source, base_dir or Path.cwd())
    else:
        made = f"; make one: {source.__name__}(...)" if isinstance(source, type) else ""
        raise ConfigError(f"policy {source!r}: {_FORMS}{made}.")
    cls = policy_class(config.kind)
    if not issubclass(cls, Policy):
        raise ConfigError(f"policy {config.kind}: {cls.__name__} is no policy's class.")
    return _build(cls, {**config.params, **(params or {})}, config.kind)


def _from_mapping(source: Mapping[str, Any]) -> PolicyConfig:
    try:
        return PolicyConfig.model_validate(dict(source))
    except ValidationError as error:
        raise ConfigError(f"policy {dict(source)!r}: {_FORMS}.") from error


def _build(cls: type[Policy], params: dict[str, Any], origin: str) -> Policy:
    check_params(cls, params, origin)
    return cls(**as_python(params))


def _from_file(source: str, base_dir: Path) -> type[Policy]:
    """The class of ``file.py:Class``; the file is run, as the user asked for it by name."""
    path, name = split_address(source)
    path = base_dir / path
    if not path.is_file():
        raise ConfigError(f"policy {source}: there is no file {path}.")
    return _checked(source, name, run_named_file(path))


def _without_class(source: str, path: Path) -> ConfigError:
    """What to say of a file of policies of which none is named."""
    try:
        parsed = ast.parse(path.read_bytes())
    except OSError as error:
        return ConfigError(f"policy {source}: cannot be read: {error.strerror}.")
    except (SyntaxError, ValueError) as error:
        return ConfigError(f"policy {source}: not readable as Python: {error}.")
    names = [node.name for node in parsed.body if isinstance(node, ast.ClassDef)]
    held = f"it holds {', '.join(names)}" if names else "it holds none"
    return ConfigError(f"policy {source}: name the class, {source}:Class; {held}.")


def _checked(source: str, name: str, module: ModuleType) -> type[Policy]:
    """A class of a module, if it is a policy's.

    Raises:
        UnknownNameError: naming those that are.
    """
    cls = getattr(module, name, None)
    kinds = (SelectPolicy, MixPolicy, VerifyPolicy, SegmentPolicy)
    if isinstance(cls, type) and issubclass(cls, kinds):
        return cls
    own = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, kinds) and value not in kinds
    ]
    raise UnknownNameError(f"policy {source}: " + unknown("policy class", name, own))
