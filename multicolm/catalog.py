"""Finds the catalogue: ``policies/`` and ``registry/``, whichever way multicolm was installed.

A wheel holds both folders inside the package, as ``multicolm/_catalog``; in a checkout (and so in
an editable install) they stand beside it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

from multicolm.errors import ConfigError, UnknownNameError, unknown

__all__ = ["Kind", "names", "path", "read", "registry", "root"]

Kind: TypeAlias = Literal["policies", "trained", "models", "ensembles", "tasks", "chat_templates"]

_FOLDERS: dict[Kind, str] = {
    "policies": "policies",
    "trained": "registry",
    "models": "registry/models",
    "ensembles": "registry/ensembles",
    "tasks": "registry/tasks",
    "chat_templates": "registry/chat_templates",
}
_NOUNS: dict[Kind, str] = {
    "policies": "policy",
    "trained": "trained policy",
    "models": "model",
    "ensembles": "ensemble",
    "tasks": "task",
    "chat_templates": "chat template",
}


def root() -> Path:
    """The folder that holds ``policies/`` and ``registry/``.

    Raises:
        ConfigError: if the installation holds neither.
    """
    return _root_of(__file__)


@cache
def _root_of(file: str) -> Path:
    package = Path(file).resolve().parent
    # The wheel's own first: beside an installed package, `policies/` would be somebody else's.
    for folder in (package / "_catalog", package.parent):
        if (folder / "policies").is_dir() and (folder / "registry").is_dir():
            return folder
    raise ConfigError(
        f"the catalogue (policies/ and registry/) is neither in {package} nor beside it; "
        "install multicolm again."
    )


def registry() -> Path:
    """The folder that the ``path`` of an embedded model starts from."""
    return root() / "registry"


def names(kind: Kind) -> list[str]:
    """The names of all entries of one kind, sorted; of a trained policy ``tiny/co-llm``."""
    folder, suffix = root() / _FOLDERS[kind], _suffix(kind)
    if kind == "trained":
        files = [file.relative_to(folder).as_posix() for file in folder.glob(f"*/*{suffix}")]
    else:
        files = os.listdir(folder)
    return sorted(file.removesuffix(suffix) for file in files if file.endswith(suffix))


def _suffix(kind: Kind) -> str:
    return {"chat_templates": ".jinja", "trained": "/policy.yaml"}.get(kind, ".yaml")


def path(kind: Kind, name: str) -> Path:
    """The file of one entry.

    Raises:
        UnknownNameError: if there is no such entry; the message offers the nearest one.
    """
    known = names(kind)
    if name not in known:
        raise UnknownNameError(unknown(_NOUNS[kind], name, known))
    return root() / _FOLDERS[kind] / f"{name}{_suffix(kind)}"


def read(kind: Kind, name: str) -> str:
    """The text of one entry: YAML, or of a chat template jinja.

    Raises:
        UnknownNameError: if there is no such entry.
    """
    return path(kind, name).read_text(encoding="utf-8")
