"""A decision tree as text for people."""

from __future__ import annotations

import json
from collections.abc import Iterator

from multicolm.policy.tree_nodes import MEANINGS, Leaf, Node, Split, branches, every_node

__all__ = ["as_text"]

_HEAD = """\
# keep P: the base model's token stays. replace P: the assistant's takes its place.
# P is how likely the assistant is right; where several would replace, the greatest P does.
"""
_INDENT = "    "


def as_text(root: Node) -> str:
    """The tree as lines of ``if`` and ``else``, below comments that say what it asks."""
    return _head(root) + "\n".join(_lines(root, "")) + "\n"


def _head(root: Node) -> str:
    asked = {node.feature for node in every_node(root) if isinstance(node, Split)}
    return _HEAD + "".join(
        f"# {name}: {meaning}.\n" for name, meaning in MEANINGS.items() if name in asked
    )


def _lines(node: Node, indent: str) -> Iterator[str]:
    if isinstance(node, Leaf):
        yield indent + _leaf_text(node)
        return
    if isinstance(node, Split):
        question = f"{node.feature} <= {float(node.threshold)!r}"
    else:
        question = f"assistant in [{', '.join(map(_quoted, node.assistants))}]"
    yes, no = branches(node)
    yield from _branch(f"{indent}if {question}:", yes)
    yield from _branch(f"{indent}else:", no)


def _quoted(name: str) -> str:
    """A name as JSON has it, on one line."""
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _branch(head: str, node: Node) -> Iterator[str]:
    if isinstance(node, Leaf):
        yield f"{head} {_leaf_text(node)}"
        return
    yield head
    indent = head[: len(head) - len(head.lstrip())]
    yield from _lines(node, indent + _INDENT)


def _leaf_text(leaf: Leaf) -> str:
    text = f"{'replace' if leaf.replace else 'keep'} {float(leaf.probability)!r}"
    if leaf.samples is None:
        return text
    return f"{text}  # assistant right: {leaf.assistant_right} of {leaf.samples}"
