"""The house: floors, circles, and how large its parts are."""

from __future__ import annotations

from pathlib import Path

import architecture
import pytest
from architecture import Import, Size, circles, floors, graph, of_parts

IMPORTS = architecture.imports()
PACKAGE = Path(__file__).parents[1] / "multicolm"
LOADED = graph(IMPORTS, "load", "call")

MOST_FLOORS = 13
MOST_LINES_OF_A_CLASS = 300
MOST_LINES_OF_A_FUNCTION = 80

# These may never import those, not even for type checkers.
STRANGERS = {("policy", "backend"), ("policy", "tokenizer"), ("backend", "policy")}


def test_the_parts_stand_on_few_floors() -> None:
    assert max(floors(of_parts(LOADED)).values()) <= MOST_FLOORS


def test_no_arrow_between_parts_runs_back_up() -> None:
    everything = of_parts(graph(IMPORTS, "load", "call", "typing"))
    assert circles(everything) == []


def test_only_the_command_line_imports_the_public_names_of_the_package() -> None:
    assert {architecture.part(i.source) for i in IMPORTS if i.target == "multicolm"} == {"cli"}


def test_no_modules_import_each_other_not_even_in_calls_or_for_types() -> None:
    assert circles(graph(IMPORTS, "load", "call", "typing")) == []


def test_strangers_never_meet() -> None:
    everything = of_parts(graph(IMPORTS, "load", "call", "typing"))
    assert not {(a, b) for a, below in everything.items() for b in below} & STRANGERS


def test_no_class_and_no_function_is_too_long_to_read() -> None:
    assert [s for s in architecture.classes() if s.lines > MOST_LINES_OF_A_CLASS] == []
    assert [s for s in architecture.functions() if s.lines > MOST_LINES_OF_A_FUNCTION] == []


def test_the_picture_in_contributing_shows_the_imports_of_now() -> None:
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert page == architecture.draw(), "python tools/architecture.py --draw"


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """`top` imports `left` at load and `right` in a call; `right` names `left` for types."""
    package = tmp_path / "small"
    for name, text in {
        "__init__.py": "",
        "top/__init__.py": "from small import left\ndef f():\n    import small.right.inner\n",
        "left.py": '"""Two\n\nlines."""\nONE = """\n"""  # code\n# none\n',
        "right/__init__.py": "",
        "right/inner.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from small.left import ONE\n"
            "class A:\n    def f(self):\n        return 1\n"
        ),
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    return package


def test_imports_are_found_with_the_time_at_which_they_happen(small_package: Path) -> None:
    assert architecture.imports(small_package) == {
        Import("small.top", "small.left", "load"),
        Import("small.top", "small.right.inner", "call"),
        Import("small.right.inner", "small.left", "typing"),
    }


def test_floors_count_the_longest_way_down_and_circles_share_one() -> None:
    arrows = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"c", "e"}}
    assert floors(arrows) == {"e": 1, "d": 2, "c": 2, "b": 3, "a": 4}
    assert circles(arrows) == [["c", "d"]]


def test_lines_and_sizes_are_counted(small_package: Path) -> None:
    assert architecture.lines(small_package) == (15, 11)
    assert architecture.classes(small_package) == [Size(3, "small.right.inner.A")]
    assert Size(2, "small.top.f") in architecture.functions(small_package)


def test_the_drawing_leaves_out_what_follows(small_package: Path) -> None:
    (small_package / "right" / "inner.py").write_text("import small.left\n", encoding="utf-8")
    drawn = architecture.drawing(small_package).splitlines()
    assert [line.strip() for line in drawn if "-->" in line] == [
        "part_right --> part_left",
        "part_top --> part_right",
    ]


def test_a_prompt_goes_from_loop_to_model_without_weak_references_greenlets_or_threads() -> None:
    files = [file for part in ("decoding", "serving") for file in (PACKAGE / part).rglob("*.py")]
    assert len(files) > 20
    holding = {file.name for file in files if "weakref" in file.read_text(encoding="utf-8")}
    switching = {file.name for file in files if "greenlet" in file.read_text(encoding="utf-8")}
    pooling = {file.name for file in files if "ThreadPool" in file.read_text(encoding="utf-8")}
    # A stream is closed with the last who reads it, before the interpreter takes modules apart.
    assert (holding, switching, pooling) == ({"streaming.py"}, set(), {"runner.py"})
