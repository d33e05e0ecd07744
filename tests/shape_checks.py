"""Shapes in signatures are checked while tests run, at each call of a function that names one.

jaxtyping's own import hook wraps every function of a module, at 20 microseconds a call and more;
most name no shape, and mypy checks their types. Here only those are wrapped that do, each once, and
a call is checked unless one of the same shapes has passed: of a tensor, its kind, shape and dtype
are all that a check reads.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

__all__ = ["CHECKED", "check_shapes", "checked", "checked_fields", "names_a_shape"]

CHECKED: set[str] = set()
"""Full names of the functions that were wrapped so far."""

_SHAPE = re.compile(r"\b(Bool|Float|Int|Shaped)\[")
_OF_ANY_LENGTH = re.compile(r"\btuple\[.*, \.\.\.\]")


def names_a_shape(annotations: Iterable[str]) -> bool:
    """Whether one of a function's annotations has a shape."""
    return any(map(_SHAPE.search, annotations))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and result are checked at every call of new shapes."""
    # The others may name what is only imported for mypy, which checks them.
    notes = {n: note for n, note in function.__annotations__.items() if _SHAPE.search(str(note))}
    result_of_this_thread = threading.local()

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if done := vars(result_of_this_thread):
            return done.pop("result")
        return function(*arguments, **named)

    run.__annotations__ = notes
    check = beartype(run)
    shapes_of = _reader(function, notes)
    passed: dict[Any, set[Any]] = {}  # for shapes of arguments those of results

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        shapes = shapes_of(arguments, named)
        results = passed.get(shapes)
        if results is not None:
            result = function(*arguments, **named)
            if "return" not in notes or _shape(result) in results:
                return result
            result_of_this_thread.result = result
        with jaxtyped("context"):  # Axes of one name have one size within a call.
            result = check(*arguments, **named)
        if shapes is not None:
            passed.setdefault(shapes, set()).add(_shape(result))
            passed[shapes].discard(None)
        return result

    CHECKED.add(f"{function.__module__}.{function.__qualname__}")
    return call


def _reader(
    function: Callable[..., Any], notes: Mapping[str, Any]
) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]:
    """Gives the shapes of the arguments that have one in the signature; ``None``: to be checked."""
    parameters = inspect.signature(function).parameters
    fixed = {p.name for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    places = [place for place, name in enumerate(parameters) if name in notes]
    names = [name for name in parameters if name in notes]
    if not fixed.issuperset(names) or any(_OF_ANY_LENGTH.search(str(n)) for n in notes.values()):
        return lambda arguments, named: None

    def shapes_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...] | None:
        n_given = len(arguments)
        found = [
            _shape(arguments[place] if place < n_given else named.get(name))
            for place, name in zip(places, names, strict=True)
        ]
        return None if None in found else tuple(found)

    return shapes_of


def _shape(value: Any) -> Any:
    """All that a check reads of a value; ``None`` if that may be more than is said here."""
    kind = type(value)
    if isinstance(value, Tensor | np.ndarray):
        return kind, value.shape, value.dtype
    if kind is tuple:
        parts = tuple(map(_shape, value))
        return None if None in parts else parts
    return kind if value is None or kind in (bool, int, float, str) else None


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
