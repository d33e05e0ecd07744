"""Imports run one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import multicolm

PACKAGE = Path(multicolm.__file__).parent

# From the bottom up; a part imports its own layer and those below it.
LAYERS = [
    {"errors", "types"},
    {"files", "keys", "numbers", "records"},
    {"artefacts"},
    {"plugins", "catalog", "config", "views"},
    {"score_table"},
    {"learning"},
    {"policy", "tokenizer", "backend"},
    {"decoding"},
    {"ensemble", "live", "streaming"},
    {"scoring", "generative"},
    {"testing", "tiny", "training", "calibration", "evaluation", "hub", "serving"},
    {"cli", "__main__"},
]
# Within one layer: these never meet.
STRANGERS = {("policy", "backend"), ("backend", "policy"), ("policy", "tokenizer")}
HEAVY = (
    *("torch", "transformers", "sklearn", "accelerate", "peft", "fastapi", "uvicorn"),
    "llama_cpp",
)


def part_of(module: str) -> str:
    """`multicolm.policy.cosd` -> `policy`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(file: Path) -> set[str]:
    """Parts of multicolm that a file imports, be it inside of functions."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            parts |= {part_of(a.name) for a in node.names if a.name.startswith("multicolm.")}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "multicolm":
                known = {p.stem for p in PACKAGE.iterdir()}
                parts |= {a.name for a in node.names if a.name in known}
            elif node.module.startswith("multicolm."):
                parts.add(part_of(node.module))
    return parts


def layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


FILES = sorted(f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    relative = file.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    for imported in imports_of(file):
        assert layer(imported) <= layer(part), f"{relative} imports {imported}"
        assert (part, imported) not in STRANGERS, f"{relative} imports {imported}"


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after running ``code``."""
    program = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import multicolm",
        "import multicolm; multicolm.SelectPolicy, multicolm.register_policy, multicolm.Answer",
        "import multicolm.policy, multicolm.backend, multicolm.config, multicolm.cli",
        "from multicolm.plugins import policies; import multicolm.policy\n"
        "[policies.get(name)() for name in policies]",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_check_for_heavy_imports_sees_torch() -> None:
    assert "torch" in loaded_after("import torch")


def test_every_public_name_is_there_and_documented() -> None:
    for name in multicolm.__all__:
        assert getattr(multicolm, name) is not None
        if name != "__version__":
            assert getattr(multicolm, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        multicolm.nonsense  # noqa: B018  # the access is the test


def test_no_public_name_is_also_a_module_which_would_hide_it() -> None:
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert modules.isdisjoint(multicolm.__all__)
