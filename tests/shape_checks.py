"""Shapes in signatures are checked while tests run, at each call of a function that names one.

jaxtyping's own import hook wraps every function of a module, at 20 microseconds a call and more;
most name no shape, and mypy checks their types. Here only those are wrapped that do, each once.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

__all__ = ["CHECKED", "check_shapes", "checked", "checked_fields", "names_a_shape"]

CHECKED: set[str] = set()
"""Full names of the functions that were wrapped so far."""

_SHAPE = re.compile(r"\b(Bool|Float|Int|Shaped)\[")


def names_a_shape(annotations: Iterable[str]) -> bool:
    """Whether one of a function's annotations has a shape."""
    return any(map(_SHAPE.search, annotations))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and result are checked at every call."""
    every = function.__annotations__
    # The others may name what is only imported for mypy, which checks them.
    function.__annotations__ = {
        name: note for name, note in every.items() if _SHAPE.search(str(note))
    }
    inner = beartype(function)
    function.__annotations__ = every

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with jaxtyped("context"):  # Axes of one name have one size within a call.
            return inner(*arguments, **named)

    CHECKED.add(f"{function.__module__}.{function.__qualname__}")
    return call


def checked_fields(kind: type) -> type:
    """A class whose fields are checked when it is made, if it is a dataclass of shapes."""
    made = dataclasses.is_dataclass(kind) and "__init__" in vars(kind)
    if made and names_a_shape(map(str, kind.__init__.__annotations__.values())):
        kind.__init__ = checked(kind.__init__)  # type: ignore[misc]
    return kind


class _Decorate(ast.NodeTransformer):
    """Put the checks around functions, below what else decorates them, and around classes."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        arguments = (a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg))
        if names_a_shape(ast.unparse(note) for note in (*arguments, node.returns) if note):
            node.decorator_list.append(_named(checked, node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, _named(checked_fields, node))
        return node


def _named(check: Callable[..., Any], node: ast.stmt) -> ast.expr:
    """The expression by which a module that imports nothing of here comes to a function."""
    text = f"__import__('sys').modules[{__name__!r}].{check.__name__}"
    expression = ast.parse(text, mode="eval").body
    for part in ast.walk(expression):
        ast.copy_location(part, node)
    return expression


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Never from the cache of bytecode, which is for programs that check nothing."""
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def __init__(self, modules: set[str]) -> None:
        self.modules = modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def check_shapes(package: Path) -> None:
    """Check the shapes in a package's signatures; to be called before anything imports it."""
    # On Python 3.10 beartype cannot read `**settings` with typed keys.
    if sys.version_info < (3, 11):
        return
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in package.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    sys.meta_path.insert(0, _Finder(modules))
