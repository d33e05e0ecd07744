"""A decision tree as JSON."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from multicolm.config.wording import show, unknown_key, worded
from multicolm.errors import ArtefactError
from multicolm.policy.tree_nodes import KINDS, TOO_DEEP, AssistantSplit, Node, Split, every_node

__all__ = ["as_json", "from_json"]

_FORMATS = (1, 2)  # 2 has questions about who the assistant is


def as_json(root: Node) -> str:
    """The text of a file; equal trees give equal bytes."""
    asks_who = any(isinstance(node, AssistantSplit) for node in every_node(root))
    data = {"format": _FORMATS[asks_who], "tree": _plain(root)}
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _plain(node: Node) -> dict[str, Any]:
    if isinstance(node, Split):
        return {
            "feature": node.feature,
            "threshold": float(node.threshold),
            "below": _plain(node.below),
            "above": _plain(node.above),
        }
    if isinstance(node, AssistantSplit):
        return {
            "assistants": list(node.assistants),
            "among": _plain(node.among),
            "others": _plain(node.others),
        }
    leaf: dict[str, Any] = {"replace": node.replace, "probability": float(node.probability)}
    if node.samples is not None:
        leaf |= {"samples": node.samples, "assistant_right": node.assistant_right}
    return leaf


class _File(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    format: int
    tree: Node


@cache
def _schema() -> TypeAdapter[_File]:
    return TypeAdapter(_File)


def from_json(text: str, origin: str) -> Node:
    """The tree of a file's text.

    Raises:
        ArtefactError: naming ``origin``, the place in the tree, and what is allowed there.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
        if isinstance(data, dict) and "format" in data and data["format"] not in _FORMATS:
            raise ArtefactError(
                f"{origin}: format must be {' or '.join(map(str, _FORMATS))}, got "
                f"{show(data['format'])}; a newer multicolm may read it."
            )
        return _schema().validate_json(text)["tree"]
    except RecursionError as error:
        raise ArtefactError(f"{origin}: {TOO_DEEP}") from error
    except ValidationError as error:
        raise ArtefactError(f"{origin}: {_complaint(error)}") from error
    except ValueError as error:
        raise ArtefactError(f"{origin} is no JSON ({error}); is it whole?") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' is there twice")
    return dict(pairs)


def _complaint(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    item = error.errors(include_url=False)[0]
    kind, last = item["type"], str(item["loc"][-1]) if item["loc"] else ""
    names = [str(part) for part in item["loc"] if part not in KINDS]
    if kind == "json_invalid":  # what Python's parser reads is wrong for its depth alone
        return TOO_DEEP
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "missing"):
        node = next((str(part) for part in reversed(item["loc"]) if part in KINDS), "file")
        keys = KINDS.get(node, ("format", "tree"))
        needed = ", ".join(keys[:2] if node == "leaf" else keys)
        said = f"needs {needed}; '{last}' is missing." if kind == "missing" else ""
        return f"{'.'.join(names[:-1]) or 'the file'}: {said or unknown_key(last, keys)}"
    said = item["msg"] if kind == "node" else worded(item)
    return f"{'.'.join(names) or 'the file'}: {said}"
