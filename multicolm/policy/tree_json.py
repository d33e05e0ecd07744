"""A decision tree as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multicolm.config.wording import show
from multicolm.errors import ArtefactError, unknown
from multicolm.policy.tree_nodes import (
    MAX_DEPTH,
    TOO_DEEP,
    AssistantSplit,
    Leaf,
    Node,
    Split,
    every_node,
)

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


_SPLIT = ("feature", "threshold", "below", "above")
_WHO = ("assistants", "among", "others")
_LEAF = ("replace", "probability")
_COUNTS = ("samples", "assistant_right")


def from_json(text: str, origin: str) -> Node:
    """The tree of a file's text.

    Raises:
        ArtefactError: naming ``origin``, the place in the tree, and what may stand there.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ArtefactError(f"{origin}: {TOO_DEEP}") from error
    except ValueError as error:
        raise ArtefactError(f"{origin} is no JSON ({error}); is it whole?") from error
    try:
        _check_keys(data, "the file", ("format", "tree"))
        if type(data["format"]) is not int or data["format"] not in _FORMATS:
            raise ArtefactError(
                f"format must be {' or '.join(map(str, _FORMATS))}, got {show(data['format'])}; "
                "a newer multicolm may read it."
            )
        return _node(data["tree"], "tree", 0)
    except ArtefactError as error:
        raise ArtefactError(f"{origin}: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' stands twice in one place")
    return dict(pairs)


def _node(data: Any, place: str, level: int) -> Node:
    if level > MAX_DEPTH:
        raise ArtefactError(f"{place}: {TOO_DEEP}")
    if isinstance(data, dict) and not data.keys().isdisjoint(_LEAF):
        _check_keys(data, f"{place}: a leaf", _LEAF, _COUNTS)
        return _placed(place, lambda: _leaf(data))
    if isinstance(data, dict) and "assistants" in data:
        _check_keys(data, f"{place}: a question about the assistant", _WHO)
        among = _node(data["among"], f"{place}.among", level + 1)
        others = _node(data["others"], f"{place}.others", level + 1)
        return _placed(place, lambda: _who(data, among, others))
    _check_keys(data, f"{place}: a split", _SPLIT)
    below = _node(data["below"], f"{place}.below", level + 1)
    above = _node(data["above"], f"{place}.above", level + 1)
    return _placed(place, lambda: _split(data, below, above))


def _leaf(data: Mapping[str, Any]) -> Leaf:
    if not isinstance(data["replace"], bool):
        raise ArtefactError(f"replace must be true or false, got {show(data['replace'])}.")
    for key in _COUNTS:
        if key in data and type(data[key]) is not int:
            raise ArtefactError(f"{key} must be a whole number, got {show(data[key])}.")
    return Leaf(data["replace"], _real(data, "probability"), *(data.get(key) for key in _COUNTS))


def _split(data: Mapping[str, Any], below: Node, above: Node) -> Split:
    if not isinstance(data["feature"], str):
        raise ArtefactError(f"feature must be text, got {show(data['feature'])}.")
    return Split(data["feature"], _real(data, "threshold"), below, above)


def _who(data: Mapping[str, Any], among: Node, others: Node) -> AssistantSplit:
    names = data["assistants"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtefactError(f"assistants must be a list of names, got {show(names)}.")
    return AssistantSplit(tuple(names), among, others)


def _real(data: Mapping[str, Any], key: str) -> float:
    value = data[key]
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise ArtefactError(f"{key} must be a finite number, got {show(value)}.")


def _placed(place: str, make: Callable[[], Node]) -> Node:
    try:
        return make()
    except ArtefactError as error:
        raise ArtefactError(f"{place}: {error}") from error


def _check_keys(
    data: Any, what: str, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if not isinstance(data, dict):
        raise ArtefactError(
            f"{what} must be a mapping with {', '.join(required)}, got {show(data)}."
        )
    for key in required:
        if key not in data:
            raise ArtefactError(f"{what} needs {', '.join(required)}; '{key}' is missing.")
    for key in data:
        if key not in (*required, *optional):
            raise ArtefactError(f"{what}: {unknown('key', key, [*required, *optional])}")
