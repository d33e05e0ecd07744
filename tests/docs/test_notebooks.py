"""The notebooks run from the first cell to the last, and keep no outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import blocks
import pytest

NOTEBOOKS = sorted((blocks.ROOT / "examples/notebooks").glob("*.ipynb"))


def _code(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow  # scores two hundred texts, compares two policies
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(blocks.checkout(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(_code(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert os.path.isdir("runs/notebook")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_no_outputs(notebook: Path) -> None:
    assert _code(notebook)
    assert all(not c["outputs"] and c["execution_count"] is None for c in _code(notebook))
