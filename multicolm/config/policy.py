"""A policy by name: its kind, and params that the kind's own fields check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation

from multicolm import catalog
from multicolm.artefacts import Artefact
from multicolm.config.document import Document, check_length, read_text
from multicolm.config.policy_code import (
    CodeFile,
    is_code,
    policy_class,
    split_address,
    with_absolute_code,
)
from multicolm.config.wording import Place, Problem, Strict, check, problems_of, show, unknown_key
from multicolm.errors import ConfigError, MulticolmError, UnknownNameError, unknown
from multicolm.files import leads_out
from multicolm.numbers import as_python
from multicolm.plugins import policies
from multicolm.views import Role

__all__ = [
    "PolicyConfig",
    "PolicyFile",
    "catalog_file",
    "check_params",
    "declared_code",
    "file_params",
    "is_path",
    "load_policy",
    "load_policy_file",
    "load_task_params",
    "parse_policy",
    "policy_names",
    "policy_problems",
    "with_paths",
]


_LONGEST_FILE = 1 << 18  # characters; reading YAML takes seconds per megabyte


class PolicyConfig(Strict):
    """A policy's kind and its params, which the kind's class checks.

    Attributes:
        kind: a name in :data:`multicolm.plugins.policies`, or ``file.py:Class``; see
            :mod:`multicolm.config.policy_code`.
        params: values of the policy's fields.
    """

    kind: str = Field(min_length=1, description="the name of a policy")
    params: dict[str, Any] = Field(default_factory=dict)


class PolicyFile(Strict):
    """A named policy: the schema of ``policies/*.yaml`` and of a checkpoint's ``policy.yaml``.

    Attributes:
        summary: one line for ``multicolm ls``.
        kind: a name in :data:`multicolm.plugins.policies`, or ``file.py:Class`` with a path that
            starts from this file's folder.
        code: SHA-256 of that Python file, which must not have changed since.
        params: values of the policy's fields.
        source: the publication it is from.
        tasks: by task, params that suit it better; for comparisons on that task.
    """

    summary: str = ""
    kind: str = Field(min_length=1, description="the name of a policy")
    code: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    source: str = ""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict, max_length=1000)


def load_policy(source: str | Path, base_dir: Path) -> PolicyConfig:
    """Read a named policy.

    Args:
        source: a name in ``policies/``, that of a trained policy in ``registry/``, a policy's
            kind, a YAML file, or a folder that holds a ``policy.yaml``.
        base_dir: the folder that a relative path starts from.

    Raises:
        ConfigError: if the file is missing or wrong.
        UnknownNameError: if it is neither a known name nor a path.
    """
    named = catalog_file(source)
    if named is not None:
        return _policy_of(load_policy_file(str(source)), named)
    path = base_dir / Path(source).expanduser()
    check_length(path, "a policy file")
    if isinstance(source, str) and not is_path(source):
        if source in policies:
            return PolicyConfig(kind=source)
        if not path.exists():
            raise UnknownNameError(unknown("policy", source, policy_names()))
    if not path.is_dir():
        return parse_policy(read_text(path, "a policy file"), path)
    config = parse_policy(read_text(path / "policy.yaml", "a policy file"), path / "policy.yaml")
    _refuse_outside(config, path)
    return config


def catalog_file(source: str | Path) -> Path | None:
    """The file of a policy that is named as the catalogue does; ``None`` if it is none of those."""
    kinds: tuple[catalog.Kind, ...] = ("policies", "trained")
    for kind in kinds:
        if isinstance(source, str) and source in catalog.names(kind):
            return catalog.path(kind, source)
    return None


def _refuse_outside(config: PolicyConfig, folder: Path) -> None:
    """A folder with a policy is handed on as a whole: what it names lies inside it.

    Raises:
        ConfigError: naming the param.
    """
    kind = config.kind
    names = sorted(file_params(policy_class(kind)))
    files = {f"params.{name}": config.params.get(name) for name in names}
    if is_code(kind):
        files["kind"] = str(split_address(kind)[0])
    for place, value in files.items():
        if isinstance(value, str) and leads_out(Path(value), folder):
            raise ConfigError(
                f"{folder / 'policy.yaml'}: {place}: {value} leads out of the folder; keep what a "
                "policy has learned in the folder of its policy.yaml."
            )


def parse_policy(text: str, origin: str | Path) -> PolicyConfig:
    """Read a policy from YAML text.

    Args:
        text: the YAML.
        origin: the file it is from; named in messages, and relative paths start from its folder.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    return _policy_of(_parse_file(text, str(origin)), origin)


def _policy_of(file: PolicyFile, origin: str | Path) -> PolicyConfig:
    config = PolicyConfig(kind=file.kind, params=file.params)
    return with_paths(config, Path(origin).absolute().parent)


def load_task_params(folder: Path, task: str) -> dict[str, Any]:
    """Params that a checkpoint has for a task; none if it has none for that one.

    Raises:
        ConfigError: if its ``policy.yaml`` is wrong.
    """
    path = folder / "policy.yaml"
    if not path.is_file():
        return {}
    return _parse_file(read_text(path, "a policy file"), str(path)).tasks.get(task, {})


def load_policy_file(name: str) -> PolicyFile:
    """Read an entry of ``policies/``, or a trained policy of ``registry/``.

    Raises:
        UnknownNameError: if there is none of that name.
        ConfigError: if it is wrong.
    """
    path = catalog_file(name) or catalog.path("policies", name)
    return _read_preset(path, path.stat().st_mtime_ns).model_copy(deep=True)


@lru_cache(maxsize=128)
def _read_preset(path: Path, modified_ns: int) -> PolicyFile:
    """Read once: each text written by a policy's name would parse its YAML again."""
    return _parse_file(path.read_text(encoding="utf-8"), str(path))


def _parse_file(text: str, origin: str) -> PolicyFile:
    if len(text) > _LONGEST_FILE:
        raise ConfigError(
            f"{origin}: holds {len(text)} characters, and a policy file at most {_LONGEST_FILE}; "
            "what a policy has learned is in a file beside it."
        )
    document = Document.parse(text, origin)
    file, problems = check(PolicyFile, document.data)
    if file is not None:
        kind = with_absolute_code(file.kind, Path(origin).absolute().parent)
        problems = _code_problems(kind, file.code)
        problems += policy_problems(PolicyConfig(kind=kind, params=file.params), ())
        for task, params in file.tasks.items() if not problems else ():
            config = PolicyConfig(kind=kind, params={**file.params, **params})
            found = policy_problems(config, ())
            problems += [replace(p, place=("tasks", task, *p.place[1:])) for p in found]
    if problems or file is None:
        raise document.error(problems)
    return file


def _code_problems(kind: str, digest: str) -> list[Problem]:
    """Whether the file of a kind is the one that a policy file was written for."""
    if not digest or not is_code(kind):
        return []
    path = split_address(kind)[0]
    if path.is_file() and CodeFile.read(path).digest != digest:
        text = (
            f"{path} has changed since this checkpoint was made; bring it back as it was, or train "
            "or tune with the new one."
        )
        return [Problem(("code",), text)]
    return []


def declared_code(path: Path) -> CodeFile | None:
    """The Python file that a policy file names for its kind; ``None`` if it names none.

    It is not run.

    Raises:
        ConfigError: if the policy file is no YAML, or the Python file is missing.
    """
    data = Document.parse(read_text(path, "a policy file"), str(path)).data
    kind = data.get("kind")
    if not isinstance(kind, str) or not is_code(kind):
        return None
    return CodeFile.read(split_address(with_absolute_code(kind, path.absolute().parent))[0])


def policy_names() -> list[str]:
    """What one may write for a policy: presets, trained ones, and kinds without a preset."""
    return sorted({*catalog.names("policies"), *catalog.names("trained"), *policies})


def check_params(kind: str | type, params: Mapping[str, Any], origin: str) -> None:
    """Check params against the fields of a policy.

    Args:
        kind: the policy's kind, or its class.
        params: values by field name.
        origin: what the message begins with.

    Raises:
        ConfigError: if a param is unknown, missing or of the wrong type.
        UnknownNameError: if there is no such kind.
    """
    cls = policy_class(kind) if isinstance(kind, str) else kind
    problems = _param_problems(cls, params, ())
    if problems:
        raise Document(origin).error(problems)


def policy_problems(config: PolicyConfig, place: Place) -> list[Problem]:
    """What is wrong with a policy at ``place``."""
    try:
        cls = policy_class(config.kind)
    except ConfigError as error:
        is_unknown = isinstance(error, UnknownNameError)
        return [Problem((*place, "kind"), str(error), unknown_name=is_unknown)]
    return _param_problems(cls, config.params, (*place, "params"))


def with_paths(config: PolicyConfig, base_dir: Path) -> PolicyConfig:
    """The policy with paths made absolute: of its code, and of params.

    A param is a path if its field is annotated ``pathlib.Path`` or an artefact, such as weights.
    """
    kind = with_absolute_code(config.kind, base_dir)
    params = dict(config.params)
    for name in file_params(policy_class(kind)):
        if isinstance(params.get(name), str):
            params[name] = str(base_dir / Path(params[name]).expanduser())
    return PolicyConfig(kind=kind, params=params)


def file_params(cls: type) -> frozenset[str]:
    """The params of a policy's class whose values, or some of them, are files."""
    return frozenset(name for name, kind in _annotations(cls).items() if _is_file(kind))


def _is_file(annotation: Any) -> bool:
    """Whether a param's values, or some of them, are files."""
    kinds = (annotation, *get_args(annotation))
    # Python 3.10 takes `list[float]` for a class.
    kinds = tuple(kind for kind in kinds if get_origin(kind) is None)
    return any(isinstance(kind, type) and issubclass(kind, Path | Artefact) for kind in kinds)


def is_path(text: str) -> bool:
    """Whether the user meant a file or a folder, not a name of the catalogue."""
    return (
        "/" in text
        or "\\" in text
        or text.startswith((".", "~"))
        or text.endswith((".yaml", ".yml"))
    )


def _annotations(cls: type) -> dict[str, Any]:
    """The fields that are params, with what their values may be."""
    if not dataclasses.is_dataclass(cls):
        return {}
    typed = getattr(cls, "__pydantic_fields__", {})
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: typed[name].annotation if name in typed else Any for name in names}


def _param_problems(cls: type, params: Mapping[str, Any], place: Place) -> list[Problem]:
    allowed = _annotations(cls)
    if params and not dataclasses.is_dataclass(cls):
        text = (
            f"class {cls.__name__} takes no params; write @multicolm.register_policy"
            f'("{getattr(cls, "name", cls.__name__).lower()}") above it, and its fields are params.'
        )
        return [Problem(place, text)]
    problems = [
        Problem((*place, key), unknown_key(key, allowed), at_key=True)
        for key in params
        if key not in allowed
    ]
    known = {key: as_python(value) for key, value in params.items() if key in allowed}
    problems += [
        Problem((*place, *inside), f"must be less than 2^63 either way, got {show(value)}.")
        for key, given in known.items()
        for inside, value in _parts(key, given)
        if isinstance(value, int) and abs(value) >= 1 << 63  # what tensors hold
    ]
    try:
        TypeAdapter(cls).validate_python(known)
    except ValidationError as error:
        found = problems_of(error, cls, known)
        problems += [dataclasses.replace(p, place=(*place, *p.place)) for p in found]
    except MulticolmError as error:
        own = f"{getattr(cls, 'name', cls.__name__)}: "  # the message begins with the place anyway
        problems.append(Problem(place, str(error).removeprefix(own)))
    except (PydanticUserError, PydanticUndefinedAnnotation):
        pass  # A plain dataclass whose types pydantic does not know: only its names are checked.
    seen = {problem.place for problem in problems}
    return problems + [
        Problem((*place, *inside), f"must be {word}, got {show(value)}.")
        for key, given in known.items()
        if (word := _number_word(allowed[key])) is not None
        for inside, value in _parts(key, given)
        if _is_no_number(value, allowed[key]) and not seen & {(*place, key), (*place, *inside)}
    ]


_WORDS = {int: "a whole number", float: "a number", Role: "a whole number or text"}


def _number_word(annotation: Any) -> str | None:
    """What a param, or each part of it, must be if that is a number; ``None`` if it is not."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    kinds = set(_types(annotation))
    kind = next((kind for kind in (float, int) if kind in kinds), None)
    return None if kind is None or bool in kinds else _WORDS[kind]


def _types(annotation: Any) -> Iterator[Any]:
    """``float`` and ``str`` of ``dict[str, float]``."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _types(part)


def _parts(key: str, value: object) -> Iterator[tuple[Place, object]]:
    """The value of a param, or what stands in it, each with its place."""
    if isinstance(value, Mapping):
        yield from (((key, name), part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        yield from (((key, number), part) for number, part in enumerate(value))
    else:
        yield (key,), value


def _is_no_number(value: object, annotation: object) -> bool:
    """What pydantic takes for a number and nobody means: `true`, `"0.5"`, `.nan`."""
    if isinstance(value, str):
        return annotation is not Role
    return isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))
