"""Nothing heavy is imported before it is needed, and every public name is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import multicolm

PACKAGE = Path(multicolm.__file__).parent

HEAVY = (
    *("torch", "transformers", "sklearn", "accelerate", "peft", "fastapi", "uvicorn"),
    "llama_cpp",
)


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
    with pytest.raises(AttributeError, match="nonsense"):
        multicolm.nonsense  # noqa: B018  # the access is the test


def test_no_public_name_is_also_a_module_which_would_hide_it() -> None:
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert modules.isdisjoint(multicolm.__all__)
