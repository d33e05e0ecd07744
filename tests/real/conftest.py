"""Tests on pretrained weights that nobody here made: SmolLM2-135M-Instruct and Gemma 3 270M.

`make test-real` fetches them once, into ~/.cache/multicolm/real-models, and runs these in one
process. Where they are not, all of these are one skipped test, which says why.

    MULTICOLM_REAL_MODELS     the folder of examples/real-models/fetch.py, if it is another one
    MULTICOLM_REAL_MISSING    why there is none
    MULTICOLM_REAL=all        with Gemma in transformers, too: a minute and 2 GB more

The weights are quantised (4 bits): llama.cpp runs them as they are, transformers de-quantised.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from multicolm.backend.llama_cpp.model import LlamaCppModel
    from multicolm.backend.transformers import TransformersModel

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE.parents[1] / "examples" / "real-models"))
import fetch  # noqa: E402  # it is a script, in no package

FOLDER = Path(os.environ.get("MULTICOLM_REAL_MODELS") or fetch.FOLDER)
ALL = os.environ.get("MULTICOLM_REAL") == "all"
SMOL, GEMMA = (FOLDER / model.file for model in fetch.MODELS)


def _missing() -> str | None:
    """Why these tests cannot run; ``None`` if they can."""
    reason = os.environ.get("MULTICOLM_REAL_MISSING")
    if reason:
        return reason
    if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        return "llama-cpp-python is not installed: make test-real installs it"
    wanted = [SMOL, GEMMA, FOLDER / "smollm2", *([FOLDER / "gemma3"] if ALL else [])]
    absent = [path.name for path in wanted if not path.exists()]
    return f"no {', '.join(absent)} in {FOLDER}: make test-real fetches them" if absent else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests without their weights keep one, and let it say why it is skipped."""
    its = [item for item in items if _HERE in item.path.parents]
    reason = _missing() if its else None
    if reason is not None:
        its[0].add_marker(pytest.mark.skip(reason=f"{reason}; {len(its) - 1} more tests wait"))
        rest = set(its[1:])
        config.hook.pytest_deselected(items=its[1:])
        items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def smol_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 for transformers, with its tokenizer as it was published."""
    folder = tmp_path_factory.mktemp("smollm2")
    for file in (FOLDER / "smollm2").iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    text = json.dumps(fetch.with_digits_alone(settings), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def smol(smol_folder: Path) -> TransformersModel:
    """SmolLM2 in transformers, in float32."""
    return in_transformers("smol", smol_folder)


@pytest.fixture(scope="session")
def smol_gguf() -> LlamaCppModel:
    """SmolLM2 in llama.cpp."""
    return in_llama_cpp("smol", SMOL)


@pytest.fixture(scope="session")
def gemma_gguf() -> LlamaCppModel:
    """Gemma 3 270M in llama.cpp."""
    return in_llama_cpp("gemma", GEMMA)


@pytest.fixture(scope="session")
def gemma() -> TransformersModel:
    """Gemma 3 270M in transformers, in float32, where that is wanted."""
    if not ALL:
        pytest.skip("Gemma in transformers is loaded with MULTICOLM_REAL=all")
    return in_transformers("gemma", FOLDER / "gemma3")


def in_transformers(name: str, folder: Path, **settings: Any) -> TransformersModel:
    """The model of a folder, in float32."""
    from multicolm.backend.transformers import TransformersModel
    from multicolm.config import ModelConfig

    config = ModelConfig(model=str(folder), dtype="float32", **settings)
    return TransformersModel.from_config(name, config)


def in_llama_cpp(name: str, path: Path, **settings: Any) -> LlamaCppModel:
    """The model of a GGUF file, whose cache is in float32."""
    from multicolm.backend.llama_cpp.model import LlamaCppModel
    from multicolm.config import ModelConfig

    config = ModelConfig(backend="llama-cpp", model=str(path), cache_type="f32", **settings)
    return LlamaCppModel.from_config(name, config)
