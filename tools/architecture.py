"""How the package is built: who imports whom, on how many floors, and how large its parts are.

    python tools/architecture.py            print the figures
    python tools/architecture.py --draw     redraw the picture in CONTRIBUTING.md

A *part* is a direct child of `multicolm/`: a package or a module. Part A is above part B if a
module of A imports one of B, wherever the import is written; the floor of a part is the longest way
down from it. Imports for type checkers alone count in no floor: nothing is loaded by them.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "multicolm"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by tools/architecture.py -->", "<!-- end of the drawing -->"

When: TypeAlias = Literal["load", "call", "typing"]
Graph: TypeAlias = Mapping[str, set[str]]


@dataclass(frozen=True, order=True)
class Import:
    """One module imports another: when it is loaded, in a call, or for type checkers alone."""

    source: str
    target: str
    when: When


@dataclass(frozen=True, order=True)
class Size:
    """A class or function and its lines, docstring included, decorators not."""

    lines: int
    name: str


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name and file of every module."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: Path = PACKAGE) -> set[Import]:
    """Every import of one module of the package by another."""
    known = modules(package)
    return {
        Import(name, target, when)
        for name, file in known.items()
        for target, when in _imports_of(file, known)
        if target != name
    }


def graph(found: Iterable[Import], *whens: When) -> dict[str, set[str]]:
    """Module to the modules that it imports at these times."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for each in found:
        if each.when in whens:
            arrows[each.source].add(each.target)
    return dict(arrows)


def of_parts(arrows: Graph) -> dict[str, set[str]]:
    """The same between parts; the package itself is none of them."""
    between: dict[str, set[str]] = defaultdict(set)
    for source, targets in arrows.items():
        for target in targets:
            if part(source) != part(target) and "." in source and "." in target:
                between[part(source)].add(part(target))
    return dict(between)


def part(module: str) -> str:
    """`multicolm.policy.cosd` -> `policy`; the package itself -> its own name."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def circles(arrows: Graph) -> list[list[str]]:
    """Groups of two or more that import each other, directly or not."""
    reached = {node: _reachable(arrows, node) for node in _nodes(arrows)}
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached[other]))
        for node in reached
        if node in reached[node]
    }
    return sorted(list(group) for group in groups)


def floors(arrows: Graph) -> dict[str, int]:
    """The longest way down from each, counted from 1; those of one circle share a floor."""
    together = {node: tuple(circle) for circle in circles(arrows) for node in circle}
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for node in _nodes(arrows):
        own = together.get(node, (node,))
        below[own] |= {together.get(other, (other,)) for other in arrows.get(node, ())} - {own}
    heights: dict[tuple[str, ...], int] = {}

    def height(group: tuple[str, ...]) -> int:
        if group not in heights:
            heights[group] = 1 + max((height(other) for other in below[group]), default=0)
        return heights[group]

    return {node: height(group) for group in list(below) for node in group}


def classes(package: Path = PACKAGE) -> list[Size]:
    """All classes, the longest first."""
    return _sizes(package, ast.ClassDef)


def functions(package: Path = PACKAGE) -> list[Size]:
    """All functions and methods, the longest first."""
    return _sizes(package, ast.FunctionDef, ast.AsyncFunctionDef)


def lines(package: Path = PACKAGE) -> tuple[int, int]:
    """Lines of all modules: all of them, and those that hold code (no comment, no docstring)."""
    texts = [file.read_text(encoding="utf-8") for file in modules(package).values()]
    return sum(len(text.splitlines()) for text in texts), sum(map(_code_lines, texts))


def drawing(package: Path = PACKAGE) -> str:
    """The parts by floors, and the arrows that do not follow from others, for Mermaid.

    An arrow A -> C is left out where A -> B and B -> C are there.
    """
    arrows = of_parts(graph(imports(package), "load", "call"))
    levels = floors(arrows)
    out = ["```mermaid", "flowchart TD"]
    for level in sorted(set(levels.values()), reverse=True):
        names = sorted(name for name, found in levels.items() if found == level)
        out.append(f"  subgraph floor{level}[{level}]")
        out += [f"    {_node(name)}[{name}]" for name in names]
        out.append("  end")
    for source in sorted(arrows):
        direct = arrows[source]
        implied = set().union(*(_reachable(arrows, other) for other in direct), set())
        out += [f"  {_node(source)} --> {_node(target)}" for target in sorted(direct - implied)]
    return "\n".join([*out, "```"])


def draw(page: Path = PAGE, package: Path = PACKAGE) -> str:
    """The page with the drawing as it is now."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{drawing(package)}\n{END}{after}"


def _node(name: str) -> str:
    return f"part_{name}"  # some names are words of Mermaid's


def _nodes(arrows: Graph) -> set[str]:
    return set(arrows).union(*arrows.values())


def _reachable(arrows: Graph, start: str) -> set[str]:
    """What there is a way to, by one arrow or more."""
    seen: set[str] = set()
    waiting = list(arrows.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(arrows.get(node, ()))
    return seen


def _imports_of(file: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, When]]:
    def walk(node: ast.AST, when: When) -> Iterator[tuple[str, When]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((each.name, when) for each in child.names if each.name in known)
            elif isinstance(child, ast.ImportFrom) and child.module is not None:
                for each in child.names:
                    inner = f"{child.module}.{each.name}"
                    if inner in known or child.module in known:
                        yield (inner if inner in known else child.module), when
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.body, []), "typing")
                yield from walk(ast.Module(child.orelse, []), when)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, "call" if when == "load" else when)
            else:
                yield from walk(child, when)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "load")


def _sizes(package: Path, *kinds: type[ast.stmt]) -> list[Size]:
    found = []
    for module, file in modules(package).items():
        waiting: list[tuple[str, ast.AST]] = [(module, ast.parse(file.read_text(encoding="utf-8")))]
        while waiting:
            prefix, node = waiting.pop()
            for child in ast.iter_child_nodes(node):
                name = f"{prefix}.{child.name}" if hasattr(child, "name") else prefix
                waiting.append((name, child))
                if isinstance(child, kinds):
                    assert child.end_lineno is not None
                    found.append(Size(child.end_lineno - child.lineno + 1, name))
    return sorted(found, reverse=True)


def _code_lines(text: str) -> int:
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    return len(
        {
            line
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in silent
            for line in range(token.start[0], token.end[0] + 1)
        }
        - docstrings
    )


def _report() -> Iterator[str]:
    found = imports()
    at_load, loaded = graph(found, "load"), graph(found, "load", "call")
    everything = graph(found, "load", "call", "typing")
    parts = of_parts(loaded)
    levels = floors(parts)
    all_lines, code = lines()
    yield f"lines: {all_lines:,}, of code {code:,}, modules: {len(modules())}"
    yield f"parts: {len(levels)} on {max(levels.values())} floors"
    yield f"arrows: {sum(map(len, parts.values()))} between parts, {len(found)} between modules"
    for level in sorted(set(levels.values()), reverse=True):
        yield f"  {level:2} {' '.join(sorted(name for name in levels if levels[name] == level))}"
    yield f"floors of modules at load: {max(floors(at_load).values())}"
    for title, arrows in {
        "parts": parts,
        "parts, with imports for type checkers": of_parts(everything),
        "modules at load": at_load,
        "modules, with imports in calls": loaded,
        "modules, with imports for type checkers": everything,
    }.items():
        yield f"circles of {title}: {len(circles(arrows))}"
        yield from (f"  {' '.join(circle)}" for circle in circles(arrows))
    for title, sizes, most in (("classes", classes(), 300), ("functions", functions(), 80)):
        longer = [size for size in sizes if size.lines > most]
        yield f"{title} of more than {most} lines: {len(longer)}"
        yield from (f"  {size.lines} {size.name}" for size in longer)


def main() -> None:
    """Print the figures, or redraw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="redraw the picture in CONTRIBUTING.md")
    if parser.parse_args().draw:
        PAGE.write_text(draw(), encoding="utf-8")
    else:
        print("\n".join(_report()))


if __name__ == "__main__":
    main()
