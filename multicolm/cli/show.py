"""``multicolm show``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from multicolm.cli.options import (
    as_json,
    examples,
    json_option,
)
from multicolm.errors import ArtefactError, CapabilityError

__all__ = ["command"]

_FACTS = ("provenance.json",)
_MANY = 8
_INDENT = "  "


@click.command(
    epilog=examples(
        "show runs/cosd-tree --tree",
        "show tiny/co-llm",
    )
)
@click.argument("checkpoint")
@click.option("--tree", "tree_only", is_flag=True, help="Print a decision tree alone.")
@click.option(
    "--trust",
    "trusts",
    is_flag=True,
    help="Allow the Python code that comes with it to be run here from now on; read it first.",
)
@json_option
def command(checkpoint: str, tree_only: bool, trusts: bool, as_json_: bool) -> None:
    """Show what CHECKPOINT holds: a folder, a policy file, or the name of a policy.

    A decision tree is printed as text; what can be edited is its tree.json. No model is loaded.
    """
    path = _policy_file(checkpoint)
    if trusts:
        _trust(path)
    found = _read(path)
    if tree_only:
        if "tree" not in found:
            raise CapabilityError(f"{checkpoint}: there is no decision tree in it; leave --tree.")
        click.echo(found["tree"], nl=False)
    elif as_json_:
        click.echo(as_json(found))
    else:
        _print(found)


def _policy_file(source: str) -> Path:
    from multicolm.config import catalog_file

    named = catalog_file(source)
    if named is not None:
        return named
    path = Path(source).expanduser()
    return path / "policy.yaml" if path.is_dir() else path


def _trust(path: Path) -> None:
    """Allow the code of a checkpoint.

    Raises:
        CapabilityError: if it has none.
    """
    from multicolm.config.policy import declared_code
    from multicolm.config.policy_code import trust

    code = declared_code(path)
    if code is None:
        raise CapabilityError(f"{path} names no Python code; leave out --trust.")
    trust(code)
    click.echo(f"{code.path} may be run here from now on (SHA-256 {code.digest}).", err=True)


def _read(path: Path) -> dict[str, Any]:
    """All that is to be shown: what ``policy.yaml`` says, and what lies beside it.

    Raises:
        ConfigError: if there is no policy file, or it is wrong.
        ArtefactError: if a file that belongs to it is missing or damaged.
    """
    from multicolm.config import parse_policy
    from multicolm.config.document import Document, read_text
    from multicolm.policy.resolve import resolve_policy
    from multicolm.policy.tree import Tree

    text = read_text(path, "a policy file, or the folder of a checkpoint")
    policy = resolve_policy(parse_policy(text, path))
    found: dict[str, Any] = {"file": str(path), **Document.parse(text, str(path)).data}
    tree = getattr(policy, "tree", None)
    if isinstance(tree, Tree):
        found["tree"] = tree.as_text()
    # Presets lie side by side in one folder; only in a checkpoint are the other files its own.
    if path.name == "policy.yaml":
        for file in sorted(path.parent.glob("*.safetensors")):
            found.setdefault("tensors", {})[file.name] = _shapes(file)
        for name in _FACTS:
            if (path.parent / name).is_file():
                found[name] = _facts(path.parent / name)
    return found


def _shapes(file: Path) -> dict[str, list[int]]:
    """The tensors of a file by name; only its header is read.

    Raises:
        ArtefactError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in sorted(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{file} cannot be read ({error}); is it whole?") from error


def _facts(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{file} is damaged ({error}).") from error


def _print(found: Mapping[str, Any]) -> None:
    from multicolm.cli.console import visible

    for title, value in found.items():
        if title == "tree":
            lines = [f"{title}:", *(_INDENT + line for line in value.splitlines())]
        else:
            lines = list(_lines(title, value, ""))
        for line in lines:
            click.echo(visible(line))


def _lines(key: str, value: Any, indent: str) -> Iterator[str]:
    """``key: value``; a mapping one level deeper; of a long list only how long it is."""
    deeper = indent + _INDENT
    if isinstance(value, Mapping) and value:
        yield f"{indent}{key}:"
        for name, part in value.items():
            yield from _lines(name, part, deeper)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        yield f"{indent}{key}:"
        for part in value[:_MANY]:
            yield f"{deeper}- {_short(part)}"
        if len(value) > _MANY:
            yield f"{deeper}... {len(value) - _MANY} more"
    elif isinstance(value, list) and len(value) > _MANY:
        yield f"{indent}{key}: {len(value)} entries"
    else:
        yield f"{indent}{key}: {_short(value)}"


def _short(value: Any) -> str:
    """A value on one line, as YAML has it where it is simple."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items()) or "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if value != "" else '""'
