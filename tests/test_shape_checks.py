"""What signatures say of shapes is held against every call while tests run."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Bool, Float, Int
from shape_checks import CHECKED, checked
from torch import Tensor

import multicolm

PACKAGE = Path(multicolm.__file__).parent
KINDS = {"Bool", "Float", "Int", "Shaped"}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="beartype cannot read it all")


def has_shape(note: ast.expr | None) -> bool:
    """Whether an annotation has a part such as ``Float[Tensor, "rows"]``."""
    parts = [] if note is None else [p for p in ast.walk(note) if isinstance(p, ast.Subscript)]
    return any(isinstance(part.value, ast.Name) and part.value.id in KINDS for part in parts)


def functions_with_shapes(body: list[ast.stmt], name: str) -> Iterator[str]:
    """Full names of what has to be checked in a module, class or function."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            inner = f"{name}.{node.name}"
            yield from functions_with_shapes(node.body, inner)
            made = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            fields = [n.annotation for n in node.body if isinstance(n, ast.AnnAssign)]
            if made and any(map(has_shape, fields)):
                yield f"{inner}.__init__"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{node.name}"
            notes = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)]
            if any(map(has_shape, [*notes, node.returns])):
                yield inner
            yield from functions_with_shapes(node.body, f"{inner}.<locals>")


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def test_every_function_that_names_a_shape_is_checked_and_no_other() -> None:
    wanted = set()
    for file in PACKAGE.rglob("*.py"):
        found = set(functions_with_shapes(ast.parse(file.read_text("utf-8")).body, module_of(file)))
        if found:
            importlib.import_module(module_of(file))
        wanted |= found
    assert len(wanted) > 200
    assert wanted <= CHECKED
    # A dataclass that inherits its shapes is checked, too.
    assert {name for name in CHECKED - wanted if not name.endswith(".__init__")} == set()


def test_a_function_of_the_package_refuses_other_axes_and_kinds_of_numbers() -> None:
    from multicolm.learning.losses import cross_entropy

    scores, weights = torch.zeros(2, 3), torch.ones(3)
    assert cross_entropy(scores, scores, weights).shape == (2,)
    for labels in (torch.zeros(4, 3), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(BeartypeCallHintViolation, match="parameter labels"):
            cross_entropy(scores, labels, weights)


def test_a_result_is_checked_too_and_axes_are_forgotten_after_the_call() -> None:
    def first(rows: Float[Tensor, "rows n"], ids: Int[Tensor, "rows"]) -> Float[Tensor, "n"]:
        return rows[ids[0]] if len(rows) < 3 else rows[:, 0]

    same = checked(first)
    for n in (1, 2):
        assert same(torch.zeros(n, 4 + n), torch.zeros(n, dtype=torch.long)).shape == (4 + n,)
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        same(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))


def test_a_result_of_other_shape_is_refused_after_calls_of_the_same_shapes_passed() -> None:
    def chosen(
        rows: Float[Tensor, "rows n"], mask: Bool[Tensor, "rows"], other: Any = None
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "rows n"] | None]:
        return rows[mask][0], other

    same, rows, mask = checked(chosen), torch.zeros(3, 4), torch.ones(3, dtype=torch.bool)
    for other in (None, rows, None, rows):
        assert same(rows, mask, other)[1] is other
        assert same(rows=rows, mask=mask, other=other)[1] is other
    for wrong in (rows[:2], rows[:, :2], rows.long(), rows.tolist()):
        for _ in range(2):
            with pytest.raises(BeartypeCallHintViolation, match="return"):
                same(rows, mask, wrong)
            with pytest.raises(BeartypeCallHintViolation, match="return"):
                same(rows, mask=mask, other=wrong)
    with pytest.raises(BeartypeCallHintViolation, match="parameter mask"):
        same(rows, mask.long())
    assert same(rows, mask)[1] is None


def test_of_a_list_every_call_is_checked_since_a_check_reads_one_item_alone() -> None:
    def longest(rows: list[Float[Tensor, "_"]]) -> int:
        return max(map(len, rows))

    same = checked(longest)
    assert same([torch.zeros(2)]) == 2
    with pytest.raises(BeartypeCallHintViolation, match="parameter rows"):
        same([torch.zeros(2, 2)])
